"""What a run offers to a task, and what a task is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from sandbox.interfaces import Dataset, FeatureExtractor, Generator, Tokenizer
from sandbox.values import Role


@runtime_checkable
class Run(Protocol):
    """What a task is handed: the recipe's parts, built on first use, and the run's folder."""

    folder: Path
    """The run folder. A task keeps what it makes in `task_folder`, below it."""
    label: str
    """The running task, as in `2-train-generator`."""
    device: torch.device
    seed: int

    @property
    def task_folder(self) -> Path: ...

    @property
    def dataset(self) -> Dataset: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def generator(self) -> Generator: ...

    @property
    def features(self) -> FeatureExtractor: ...

    @property
    def num_classes(self) -> int:
        """Classes the models know: the recipe's, or else the data set's."""

    def settings(self, slot: str, *, deciding: bool = False) -> Mapping[str, Any]:
        """The part in a slot of the recipe (`dataset`, ...) as a mapping, defaults included; or
        only what results depend on (see `sandbox.INCIDENTAL`)."""

    def has_weights(self, role: Role) -> bool:
        """Whether the part has weights from a file: the recipe's, or trained by this run."""

    def rng(self, *salt: str | int) -> torch.Generator:
        """A fresh generator on `device`, seeded from the run's seed, the task and `salt`."""

    def save_weights(
        self, role: Role, state: Mapping[str, Tensor], **facts: str | int | float
    ) -> Path:
        """Keep trained weights as `weights/<role>.safetensors`, for the tasks and runs to come."""

    def rewind(self, done: int) -> None:
        """Forget what the log says of this task beyond `done`: it goes on from a checkpoint."""

    def report(self, done: int, total: int, **scalars: float) -> None:
        """Tell the observers how far the task is; scalars are also kept in `log.jsonl`."""

    def picture(self, name: str, images: Float[Tensor, "b 3 h w"], columns: int) -> Path:
        """Save images in [-1, 1] as one PNG grid in the task's folder."""

    def say(self, text: str) -> None:
        """Tell the person who watches something in plain words; also kept in `log.jsonl`."""


@runtime_checkable
class Task(Protocol):
    """One stage of a run: train, sample, evaluate. Built as `Class(params)`.

    The result (JSON values) is kept in the task's folder; a task whose result is there is skipped.
    Of several processes only the first runs a task, unless the class says `parallel = True`: then
    all call `run`, as tasks that train do; `sandbox.rank()` tells which one it is, and what the
    task makes of the run's folder by other means than `Run` the first one alone may write.
    A task that was stopped half-way is called again and goes on from what it kept; what it kept in
    `checkpoints` there is deleted once it has a result.
    """

    def plan(self, run: Run) -> Mapping[str, str]:
        """What the task will do and cost, label to text, before it does it."""

    def run(self, run: Run) -> Mapping[str, Any]: ...
