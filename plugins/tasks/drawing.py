"""How images are drawn from a generator: with which sampler, of which classes.

The one thing to hold in mind: a sampler only chooses among what the network predicts, so it can be
replaced in a finished generator, and is put back afterwards.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from pydantic import ValidationError
from torch import Tensor

import sandbox
from sandbox import Part

BEST = "sampler.json"
"""What the task `tune-sampler` leaves in its folder: the best setting found."""


def require_generator(run: sandbox.Run, untrained: bool) -> None:
    """Raise SandboxError where the generator has no weights, unless that is wanted."""
    if not untrained and not run.has_weights("generator"):
        raise sandbox.SandboxError(
            f"{run.label}: the generator has no trained weights: train it in an earlier task, "
            "set weights.generator, or set untrained: true"
        )


def in_turn(classes: Sequence[int], num_images: int) -> Int[Tensor, " n"]:
    """Labels for so many images: the classes one after the other, again and again."""
    return torch.tensor(classes)[torch.arange(num_images) % len(classes)]


def sampler_of(run: sandbox.Run) -> Part[sandbox.Sampler]:
    """The sampler that the recipe's generator has. Raises SandboxError where it has none."""
    part = getattr(getattr(run.generator, "params", None), "sampler", None)
    if not isinstance(part, Part) or not hasattr(run.generator, "sampler"):
        name = run.settings("generator")["name"]
        raise sandbox.SandboxError(f"{run.label}: the generator {name!r} has no sampler to set")
    return part


def adjusted(part: Part[sandbox.Sampler], setting: Mapping[str, Any]) -> Part[sandbox.Sampler]:
    """The part with some of its settings replaced. Raises ValueError, in one line, for bad ones."""
    try:
        params = part.cls.Params.model_validate({**dict(part.params), **setting})
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(f"sampler {part.name!r}: {told}") from None
    return Part(part.name, part.cls, params)


@contextmanager
def drawing_with(run: sandbox.Run, part: Part[sandbox.Sampler] | None) -> Iterator[None]:
    """Let the run's generator draw with another sampler; with None, with its own."""
    if part is None:
        yield
        return
    made: Any = run.generator
    own, made.sampler = made.sampler, part.build()
    try:
        yield
    finally:
        made.sampler = own


@contextmanager
def drawing_fast(run: sandbox.Run, fast: sandbox.Switch) -> Iterator[None]:
    """Let the run's generator draw as its setting `fast` says; one without it, as it does."""
    made: Any = run.generator
    if not hasattr(made, "fast"):
        yield
        return
    own, made.fast = made.fast, fast
    try:
        yield
    finally:
        made.fast = own


def best_sampler(run: sandbox.Run) -> Part[sandbox.Sampler]:
    """The sampler as the run's latest `tune-sampler` set it. Raises SandboxError without one."""
    found = [
        path
        for path in run.folder.glob(f"*-tune-sampler/{BEST}")
        if path.parent.name.partition("-")[0].isdigit()
    ]
    if not found:
        raise sandbox.SandboxError(
            f"{run.label}: sampler: best needs a task tune-sampler before it in this run: add "
            "one, or set sampler: recipe"
        )
    latest = max(found, key=lambda path: int(path.parent.name.partition("-")[0]))
    return adjusted(sampler_of(run), json.loads(latest.read_text())["setting"])
