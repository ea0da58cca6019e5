"""A recipe's parts, built on first use and given their weights.

One rule says which weights a part has: those this run has trained, else those the recipe names,
else the part's own initial ones.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sandbox.checkpoint import write_tensors
from sandbox.errors import SandboxError
from sandbox.interfaces import Dataset, FeatureExtractor, Generator, Tokenizer
from sandbox.parts import Part
from sandbox.recipe import Recipe
from sandbox.seeds import derive_seed, generator
from sandbox.values import Role, Subject
from sandbox.weights import load_weights

T = TypeVar("T")


class Assembly:
    """The parts of `recipe`; trained weights live in `folder/weights`."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.folder, self.seed = recipe, folder, recipe.seed
        self.device = _device(recipe.device)
        self.label = ""

    @cached_property
    def dataset(self) -> Dataset:
        return self._build("dataset", self.recipe.dataset)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        tokenizer = self._build("tokenizer", self.recipe.tokenizer)
        return self._equip("tokenizer", tokenizer, tokenizer)

    @cached_property
    def generator(self) -> Generator:
        tokenizer = self.tokenizer if self.recipe.tokenizer else None
        size = tokenizer.image_size if tokenizer else self.dataset.image_size
        self._check_size(size)
        subject = Subject(size, self.num_classes, tokenizer)
        made = self._build("generator", self.recipe.generator, subject)
        return self._equip("generator", made, made.network)

    @cached_property
    def features(self) -> FeatureExtractor:
        size = self.dataset.image_size if self.recipe.dataset else self.tokenizer.image_size
        made = self._build("features", self.recipe.features, size, self.num_classes)
        return self._equip("features", made, made.network)

    @property
    def num_classes(self) -> int:
        known = self.recipe.num_classes
        if not self.recipe.dataset:
            if known is None:
                raise SandboxError("the recipe names no dataset: set num_classes (1000: ImageNet)")
            return known
        there = self.dataset.num_classes
        if known is not None and known < there:
            raise SandboxError(f"num_classes: {known} is less than the data set's {there}")
        return there if known is None else known

    def settings(self, slot: str, *, deciding: bool = False) -> Mapping[str, Any]:
        part = getattr(self.recipe, slot)
        return part.to_dict(deciding=deciding) if part else {}

    def has_weights(self, role: Role) -> bool:
        return self._trained(role).exists() or getattr(self.recipe.weights, role) is not None

    def rng(self, *salt: str | int) -> torch.Generator:
        return generator(self.device, self.seed, self.label, *salt)

    def save_weights(
        self, role: Role, state: Mapping[str, Tensor], **facts: str | int | float
    ) -> Path:
        write_tensors(self._trained(role), state, facts)
        return self._trained(role)

    def _trained(self, role: Role) -> Path:
        return self.folder / "weights" / f"{role}.safetensors"

    def _build(self, role: str, part: Part[T] | None, *handed: Any) -> T:
        if part is None:
            raise SandboxError(
                f"the task {self.label or '?'!r} needs a {role}: add `{role}:` to the recipe"
            )
        torch.manual_seed(derive_seed(self.seed, role) % 2**63)  # initial weights per role
        try:
            return part.build(*handed)
        except ValueError as error:
            raise SandboxError(f"{role} {part.name!r}: {error}") from error

    def _equip(self, role: Role, made: T, module: Any) -> T:
        if not isinstance(module, nn.Module):
            return made
        source = str(self._trained(role)) if self._trained(role).exists() else None
        source = source or getattr(self.recipe.weights, role)
        if source:
            load_weights(module, source, role)
        module.to(self.device).eval()
        return made

    def _check_size(self, size: tuple[int, int]) -> None:
        if self.recipe.dataset and self.dataset.image_size != size:
            raise SandboxError(
                f"the data set gives images of {_by(self.dataset.image_size)} pixels, the "
                f"tokenizer makes {_by(size)} (its schedule's last map times its downsampling): "
                "change dataset.image_size or tokenizer.schedule"
            )


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SandboxError(f"device: {name!r} is no device; use auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SandboxError(f"device: {name!r} asked for, but torch sees no GPU here")
    return device
