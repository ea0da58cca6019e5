"""Reads a recipe: YAML plus `--set` overrides in, one checked value out.

Every mistake is reported at once, each at the line that made it. A recipe has no inheritance, no
interpolation and no conditions; its one variant is `preview`, a mapping of dotted keys to the
values they take where the full run is not possible.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from sandbox.errors import SandboxError
from sandbox.interfaces import Dataset, FeatureExtractor, Generator, Observer, Tokenizer
from sandbox.parts import DECIDING, Params, Part
from sandbox.registry import Registry
from sandbox.task import Task

Where = tuple[str | int, ...]
"""Where a value stands in the recipe: ("generator", "backbone", "depth")."""


class Weights(Params):
    """Trained weights to start from: a file, a run folder, `package://package/file` or
    `hf://owner/repository/file@revision`."""

    tokenizer: str | None = None
    generator: str | None = None
    features: str | None = None


class Recipe(Params):
    """All that a person decides about a run."""

    seed: int = Field(0, ge=0)
    """Every random stream of the run derives from it."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, or `auto`: a GPU where there is one."""
    num_classes: int | None = Field(None, ge=1)
    """Classes the models know; the data set's when absent."""
    dataset: Part[Dataset] | None = None
    tokenizer: Part[Tokenizer] | None = None
    generator: Part[Generator] | None = None
    features: Part[FeatureExtractor] | None = None
    weights: Weights = Weights()
    tasks: tuple[Part[Task], ...] = ()
    observers: tuple[Part[Observer], ...] = ()


def load_recipe(
    path: Path, overrides: Sequence[str], registry: Registry, *, preview: bool = False
) -> Recipe:
    """Check a recipe against the plugins at hand; with `preview`, in its preview form.

    Raises SandboxError with one line a mistake, `file:line: key: what is wrong`.
    """
    tree, places = _read(path)
    variant = tree.pop("preview", None)
    if variant is not None and not isinstance(variant, dict):
        raise SandboxError(f"{places[('preview',)]}: preview: expected keys and their values")
    if preview:
        for dotted, value in (variant or {}).items():
            spots = {(): f"{path}: (preview)"} | {
                inner[2:]: f"{spot}: (preview)"
                for inner, spot in places.items()
                if inner[:2] == ("preview", dotted)
            }
            where = _where(str(dotted))
            _assign(where, value, tree, f"{spots[()]}: {dotted}")
            _blame(where, spots, places)
    for override in overrides:
        where = _override(override, tree)
        _blame(where, {(): f"--set {override}"}, places)
    try:
        return Recipe.model_validate(tree, context={"registry": registry})
    except ValidationError as error:
        raise SandboxError("\n".join(_explain(e, places) for e in error.errors())) from None


def has_preview(path: Path) -> bool:
    """Whether a recipe declares a preview."""
    return "preview" in _read(path)[0]


def to_yaml(recipe: Recipe) -> str:
    """The recipe in full, defaults included, as YAML that `load_recipe` reads back."""
    return str(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=100))


def deciding(recipe: Recipe) -> dict[str, Any]:
    """The recipe in full, without what no result depends on."""
    return recipe.model_dump(mode="json", context=DECIDING)


def _read(path: Path) -> tuple[dict[str, Any], dict[Where, str]]:
    try:
        text = path.read_text()
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            raise SandboxError(f"{path}: the file is empty; a recipe names at least its tasks")
        if not isinstance(root, yaml.MappingNode):
            raise SandboxError(f"{path}:1: expected keys and their values, as in `seed: 0`")
        places = {where: f"{path}:{line}" for where, line in _lines(root, path)}
        tree: dict[str, Any] = yaml.safe_load(text)
    except FileNotFoundError:
        raise SandboxError(f"{path}: no such recipe") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SandboxError(f"{path}: cannot be read: {error}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise SandboxError(f"{path}:{line}: not valid YAML: {error.reason}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise SandboxError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    return tree, places


def _lines(node: yaml.Node, path: Path, where: Where = ()) -> Iterator[tuple[Where, int]]:
    yield where, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise SandboxError(f"{path}:{line}: a key is one word, as in `seed: 0`")
            if key.value in first:
                raise SandboxError(
                    f"{path}:{line}: {'.'.join(map(str, (*where, key.value)))}: stands twice, "
                    f"first at line {first[key.value]}; remove one"
                )
            first[key.value] = line
            for place, inner in _lines(value, path, (*where, key.value)):
                yield place, line if place == (*where, key.value) else inner
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _lines(value, path, (*where, index))


def _where(dotted: str) -> Where:
    return tuple(int(key) if key.isdigit() else key for key in dotted.split("."))


def _override(override: str, tree: dict[str, Any]) -> Where:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise SandboxError(
            f"--set {override}: expected key=value, as in generator.backbone.depth=4"
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise SandboxError(f"--set {override}: the value is not valid YAML") from None
    _assign(_where(dotted), value, tree, f"--set {override}")
    return _where(dotted)


def _assign(where: Where, value: Any, tree: dict[str, Any], blame: str) -> None:
    """Set `a.b.c` in place; a bare name on the way becomes a mapping, a missing one is made."""
    target: Any = tree
    for depth, key in enumerate(where[:-1], 1):
        try:
            inner = target[key]
        except KeyError:
            inner = None
        except (IndexError, TypeError):
            inner = ()
        if inner is None or isinstance(inner, str):
            inner = target[key] = {} if inner is None else {"name": inner}
        if not isinstance(inner, dict | list):
            raise SandboxError(f"{blame}: the recipe has no {'.'.join(map(str, where[:depth]))!r}")
        target = inner
    try:
        target[where[-1]] = value
    except (IndexError, TypeError):
        raise SandboxError(f"{blame}: the recipe has no {'.'.join(map(str, where))!r}") from None


def _blame(where: Where, spots: dict[Where, str], places: dict[Where, str]) -> None:
    """Let what stands at `where` come from `spots`; no line that stood there is to blame."""
    for inner in [place for place in places if place[: len(where)] == where]:
        del places[inner]
    for depth in range(1, len(where)):  # mappings that were made on the way
        places.setdefault(where[:depth], spots[()])
    places.update({where + inner: spot for inner, spot in spots.items()})


def _explain(error: Any, places: dict[Where, str]) -> str:
    where = found = tuple(error["loc"])
    while found not in places and found:
        found = found[:-1]
    message = str(error["msg"])
    if error["type"] == "missing":
        message = "is missing; add it"
    return f"{places[found]}: {'.'.join(map(str, where)) or 'recipe'}: {message}"
