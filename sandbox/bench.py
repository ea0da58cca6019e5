"""A recipe as what `sandbox bench` measures: its parts and nothing else of it.

It becomes a run of the one task `bench`, in a folder of its own. The data set is needed only where
nothing else tells how many classes there are, or how large an image is.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from sandbox import record
from sandbox.assembly import Assembly
from sandbox.errors import RunError, SandboxError
from sandbox.interfaces import Observer
from sandbox.parts import Part
from sandbox.recipe import Recipe
from sandbox.registry import Registry
from sandbox.run import execute
from sandbox.task import Task

LISTS = ("parts", "batch_sizes", "precision", "fast")
"""Settings of which the command line takes several, by comma."""
NUM_CLASSES = 1000
"""Where the recipe says nothing and the data set is not there: as in ImageNet."""


def measure(
    recipe: Recipe,
    registry: Registry,
    settings: Mapping[str, Any],
    folder: Path,
    *,
    name: str,
    command: str = "",
) -> dict[str, Any]:
    """Measure the recipe's parts and return the task's result; the folder keeps the rest.

    `settings` are those of the task `bench`. What an earlier measurement left in the folder is
    replaced. Raises SandboxError for bad settings, and a folder that holds anything else.
    """
    if folder.exists() and (not folder.is_dir() or _holds_anything_else(folder)):
        raise SandboxError(
            f"--out {folder}: holds something other than a measurement; choose another"
        )
    task = Part("bench", registry.find(Task, "bench"), _checked(registry, settings))
    console = registry.find(Observer, "console")
    parts = {
        "tasks": (task,),
        "observers": (Part("console", console, console.Params()),),
        "features": None,
        **_without_data(recipe, folder),
    }
    results = execute(
        recipe.model_copy(update=parts), folder, name=name, command=command, fresh=True
    )
    return dict(results["1-bench"])


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Of the task `bench`, as the command line has them."""
    lists = {key: getattr(arguments, key) for key in LISTS}
    settings = {key: text.split(",") for key, text in lists.items() if text is not None}
    single = {key: getattr(arguments, key) for key in ("repeats", "compile")}
    settings |= {key: value for key, value in single.items() if value is not None}
    return settings | ({"profile": True} if arguments.profile else {})


def _checked(registry: Registry, settings: Mapping[str, Any]) -> Any:
    try:
        return registry.find(Task, "bench").Params.model_validate(settings)
    except ValidationError as error:
        wrong: dict[str, str] = {}
        for mistake in error.errors():
            wrong.setdefault(str(mistake["loc"][0]), mistake["msg"])
        raise SandboxError(
            "\n".join(
                f"--{key.replace('_', '-')} {_put(settings[key])}: {said}"
                for key, said in wrong.items()
            )
        ) from None


def _put(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _holds_anything_else(folder: Path) -> bool:
    """Whether it is neither empty nor the folder of a run that did nothing but measure."""
    names = {path.name for path in folder.iterdir()} - {record.LOCK}
    if not names or not names >= {"recipe.yaml", "environment.json", "log.jsonl"}:
        return bool(names)
    tasks = (yaml.safe_load((folder / "recipe.yaml").read_text()) or {}).get("tasks") or ()
    return [task["name"] for task in tasks] != ["bench"]


def _without_data(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """The data set left out and its number of classes in its place, if that can do."""
    if recipe.tokenizer is None:
        return {}
    if recipe.num_classes is not None or recipe.generator is None:
        return {"dataset": None}
    try:
        known = Assembly(recipe, folder).num_classes
    except (SandboxError, RunError, ValueError, OSError):
        known = NUM_CLASSES
    return {"dataset": None, "num_classes": known}
