"""The same parts without a run: for notebooks and scripts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sandbox.checkpoint import write_tensors
from sandbox.errors import SandboxError
from sandbox.plugins import load_plugins
from sandbox.recipe import load_recipe
from sandbox.run import LiveRun
from sandbox.values import Role

PUBLISHED_NAME: dict[Role, str] = {"tokenizer": "vae", "generator": "var"}


def load(
    source: Path | str,
    *overrides: str,
    plugins: Sequence[Path | str] = (),
    device: str | None = None,
) -> LiveRun:
    """The parts of a run folder (with what it trained) or of a recipe file.

    `overrides` are as after `--set` and `plugins` as after `--plugins`; `device` stands for the
    recipe's where it is given. Nothing is written and no task is run. The result's `dataset`,
    `tokenizer`, `generator` and `features` are built, with their weights, on first use; a recipe's
    weights are those it names, no run's.
    """
    path = Path(source)
    if path.is_dir():
        folder, path = path, path / "recipe.yaml"
    else:
        folder = path.with_suffix(".run")  # nothing was trained yet
    overrides = (*overrides, *([f"device={device}"] if device else []))
    recipe = load_recipe(path, overrides, load_plugins([Path(each) for each in plugins]))
    return LiveRun(recipe, folder)


def export(run: LiveRun, out: Path) -> list[Path]:
    """Write the run's tokenizer and generator with the published names and shapes.

    What has no published layout (a tokenizer with another autoencoder, say) is left out. Raises
    SandboxError where nothing is left, or weights were never trained.
    """
    states, reasons = {}, []
    for role, name in PUBLISHED_NAME.items():
        if not run.settings(role):
            continue
        if not run.has_weights(role):
            raise SandboxError(f"the {role} has no trained weights to export")
        module: Any = run.tokenizer if role == "tokenizer" else run.generator.network
        if not hasattr(module, "to_published"):
            reasons.append(f"the {role} {run.settings(role)['name']!r} has no published layout")
            continue
        try:
            states[out / f"{name}.safetensors"] = module.to_published()
        except ValueError as error:
            reasons.append(f"the {role}: {error}")
    if not states:
        raise SandboxError(f"{run.folder}: nothing to export: {'; '.join(reasons) or 'no parts'}")
    for path, state in states.items():
        write_tensors(path, state)
    return list(states)
