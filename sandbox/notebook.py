"""The same parts without a run: for notebooks and scripts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sandbox.checkpoint import write_tensors
from sandbox.errors import SandboxError
from sandbox.plugins import load_plugins
from sandbox.recipe import load_recipe
from sandbox.run import LiveRun
from sandbox.values import Role

ExportLayout = Literal["published", "own"]
ExportDtype = Literal["float32", "bfloat16"]
PUBLISHED_NAME: dict[Role, str] = {"tokenizer": "vae", "generator": "var"}
LARGE = 1024
"""Tensors of at most so many elements (norms, scales, statistics) are never cast: they weigh
nothing, and may need their digits."""


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


def export(
    run: LiveRun, out: Path, *, layout: ExportLayout = "published", dtype: ExportDtype = "float32"
) -> list[Path]:
    """Write the run's tokenizer and generator as safetensors; return the files.

    `published`: with the published names and shapes, as vae and var; what has no published layout
    (a tokenizer with another autoencoder, say) is left out. `own`: as tokenizer and generator, as
    every recipe reads them. Floating tensors of more than 1024 elements take the `dtype`.
    Raises SandboxError where nothing is left, or weights were never trained.
    """
    for value, known in ((layout, ExportLayout), (dtype, ExportDtype)):
        if value not in get_args(known):
            raise SandboxError(f"export: {value!r} is none of {', '.join(get_args(known))}")
    states, reasons = {}, []
    for role, name in PUBLISHED_NAME.items():
        if not run.settings(role):
            continue
        if not run.has_weights(role):
            raise SandboxError(f"the {role} has no trained weights to export")
        module: Any = run.tokenizer if role == "tokenizer" else run.generator.network
        if layout == "own":
            states[out / f"{role}.safetensors"] = module.state_dict()
            continue
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
        write_tensors(path, _cast(state, getattr(torch, dtype)))
    return list(states)


def _cast(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() and tensor.numel() > LARGE else tensor
        for name, tensor in state.items()
    }
