"""The settings that every task which trains has, and what they mean: rate, decay, precision."""

from contextlib import AbstractContextManager
from math import cos, pi
from typing import Annotated, Literal

import torch
from pydantic import Field

import sandbox

Precision = Literal["auto", "float32", "bfloat16"]


def precision_on(device: torch.device, precision: Precision) -> Precision:
    """What `auto` means: bfloat16 on a GPU, float32 on a CPU."""
    if precision == "auto":
        return "bfloat16" if device.type == "cuda" else "float32"
    return precision


def autocast(
    device: torch.device, precision: Precision | Literal["float16"]
) -> AbstractContextManager[None]:
    """Matrix work in the given precision; what must be exact protects itself."""
    named = precision if precision == "float16" else precision_on(device, precision)
    if named == "float32":
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype=getattr(torch, named))


class Training(sandbox.Params):
    """How a network is trained. The clock is images seen."""

    num_images: int = Field(..., gt=0)
    """Images seen in all; rounded up to whole batches."""
    batch_size: int = Field(64, gt=0)
    """Images a step, over all processes."""
    accumulate: int = Field(1, ge=1)
    """Parts a process's share of a batch is cut into, to fit in memory; the gradient is that of the
    whole batch."""
    learning_rate: float = Field(1e-3, gt=0)
    """At its peak, for the batch size as stated."""
    warmup: float = Field(0.02, ge=0, lt=1)
    """Share of the training over which the rate rises linearly, from 0.005 of its peak."""
    flat: float = Field(0.05, ge=0, le=1)
    """Share of the time after the warm-up that stays at the peak (with `linear`)."""
    decay: Literal["linear", "cosine", "constant"] = "linear"
    """How the rate falls after the warm-up."""
    final_factor: float = Field(0.1, ge=0, le=1)
    """The rate at the end, as a factor of its peak."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or gradient descent with Nesterov's momentum (of `betas` the first)."""
    weight_decay: float = Field(0.05, ge=0)
    """AdamW's decoupled decay, `sgd`'s L2 penalty; not on biases, norms, and what the network
    excludes."""
    final_weight_decay: float | None = Field(None, ge=0)
    """The decay at the end, reached along a cosine; the same throughout when absent."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's running-average factors."""
    clip: float = Field(2.0, gt=0)
    """Largest gradient norm."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of an exponential average of the weights, which is then what is kept; off if absent."""
    precision: Precision = "auto"
    """Of the matrix work. `auto`: bfloat16 on a GPU, float32 on a CPU."""
    compile: sandbox.Switch = "auto"
    """Whether the network's kernels are built for it by torch.compile. `auto`: on a GPU, for at
    least 500 steps."""
    report_every: int = Field(640, gt=0)
    """Images between two points of the curves."""
    validate_every: int | None = Field(None, gt=0)
    """Images between two validations; one at the end when absent."""
    checkpoint_every: int | None = Field(None, gt=0)
    """Images between two checkpoints; a tenth of the training when absent."""
    keep: Literal["last", "best"] = "last"
    """Which weights are kept at the end: the last, or those of the best validation."""
    num_workers: Annotated[int, sandbox.INCIDENTAL] = Field(0, ge=0)
    """Processes that load data; results do not depend on it. What a GPU waits for data is in the
    reports (`waiting_per_second`, in [0, 1]), and is said where it is more than a tenth."""

    def rate(self, progress: float) -> float:
        """The learning rate at `progress` in [0, 1]."""
        if progress < self.warmup:
            return self.learning_rate * (0.005 + 0.995 * progress / self.warmup)
        rest = (progress - self.warmup) / max(1e-9, 1 - self.warmup)
        if self.decay == "constant":
            factor = 1.0
        elif self.decay == "cosine":
            factor = self.final_factor + (1 - self.final_factor) * (0.5 + 0.5 * cos(pi * rest))
        else:
            left = min(1.0, (1 - rest) / max(1e-9, 1 - self.flat))
            factor = self.final_factor + (1 - self.final_factor) * left
        return self.learning_rate * factor

    def decay_at(self, progress: float) -> float:
        """The weight decay at `progress` in [0, 1]."""
        if self.final_weight_decay is None:
            return self.weight_decay
        span = self.weight_decay - self.final_weight_decay
        return self.final_weight_decay + span * (0.5 + 0.5 * cos(pi * progress))

    def compiles(self, device: torch.device) -> bool:
        """Whether the network is compiled on `device`."""
        if self.compile == "auto":
            return device.type == "cuda" and self.num_images >= 500 * self.batch_size
        return self.compile == "on"
