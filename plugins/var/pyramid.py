"""Resampling between the maps of a pyramid: area down, bicubic up, as published.

Both are linear, so while gradients are taken each is a pair of small matrices, one for rows and one
for columns: products have a deterministic backward pass on every device, and compile into a larger
graph. Without gradients the published kernels run, whose last bits the matrices do not share; but
growing on a GPU, where PyTorch's kernel took 7 % of a training step, always is a product, and what
is painted there, or shrunk to be read, is so by kernels of our own.
"""

from collections.abc import Callable
from functools import cache
from types import ModuleType

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

import sandbox
from sandbox import Layout


class Pyramid(nn.Module):
    """Shrinks whole maps to a step's cells and grows codes back; has no weights."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        for index, step in enumerate(layout.steps):
            sizes = zip(("rows", "columns"), (step.height, step.width), layout.size, strict=True)
            for axis, cells, whole in sizes:
                for name, matrix in {
                    "area": _area(whole, cells),
                    "bicubic": _bicubic(cells, whole),
                }.items():
                    self.register_buffer(f"{name}_{axis}_{index}", matrix, persistent=False)

    def shrink(self, maps: Float[Tensor, "b c h w"], step: int) -> Float[Tensor, "b c i j"]:
        """The mean over the area of each of the step's cells."""
        return self._resampled(maps, "area", step, self._size(step))

    def grow(self, codes: Float[Tensor, "b n c"], step: int) -> Float[Tensor, "b c h w"]:
        """The step's codes as a map of full size."""
        width = self.layout.steps[step].width
        maps = rearrange(codes, "b (i j) c -> b c i j", j=width)
        return self._resampled(maps, "bicubic", step, self.layout.size)

    def matrices(self, name: str, step: int) -> tuple[Tensor, Tensor]:
        """Of `area` or `bicubic` at a step, for rows and for columns: `after before`."""
        rows, columns = (getattr(self, f"{name}_{axis}_{step}") for axis in ("rows", "columns"))
        return rows, columns

    def _size(self, step: int) -> tuple[int, int]:
        return self.layout.steps[step].height, self.layout.steps[step].width

    def _resampled(self, maps: Tensor, name: str, step: int, size: tuple[int, int]) -> Tensor:
        if self._size(step) == self.layout.size:
            return maps
        if not torch.is_grad_enabled() and not (name == "bicubic" and maps.is_cuda):
            return F.interpolate(maps, size, mode=name)
        rows, columns = self.matrices(name, step)
        return torch.matmul(rows, torch.matmul(maps, columns.mT))


def painter_for(canvas: Float[Tensor, "b c h w"]) -> ModuleType | None:
    """The module `painting`, where its kernels can be used: for float32, without gradients."""
    if not canvas.is_cuda or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    _, c, *sides = canvas.shape
    if canvas.dtype != torch.float32 or c > 64 or max(sides) > 32:
        return None
    return _painter(canvas.device, c, *sides)


@cache
def _painter(device: torch.device, c: int, h: int, w: int) -> ModuleType | None:
    """The module `painting`, after a trial: triton may be missing, or the compiler it needs."""

    def trial() -> ModuleType:
        from . import painting

        zeros = torch.zeros(max(c * c * 9, h * w * c), device=device)
        canvas = zeros[: h * w * c].view(1, h, w, c).permute(0, 3, 1, 2)
        phi = zeros[: c * c * 9].view(c, c, 3, 3), zeros[:c], 0.5
        painting.paint(canvas, zeros[:c].view(1, 1, c), zeros[:h, None], zeros[:w, None], phi)
        painting.shrink(canvas, zeros[None, :h], zeros[None, :w])
        return painting

    return sandbox.tried(trial, "canvases without their Triton kernels")


def _area(before: int, after: int) -> Float[Tensor, "after before"]:
    return _matrix(before, lambda line: F.interpolate(line, (after, 1), mode="area"))


def _bicubic(before: int, after: int) -> Float[Tensor, "after before"]:
    return _matrix(before, lambda line: F.interpolate(line, (after, 1), mode="bicubic"))


def _matrix(before: int, resample: Callable[[Tensor], Tensor]) -> Float[Tensor, "after before"]:
    """What a resampling along one axis does to each unit vector, column by column."""
    with torch.device("cpu"):  # known also where the weights are only planned (meta device)
        units = rearrange(torch.eye(before), "unit cells -> 1 unit cells 1")
        return rearrange(resample(units), "1 unit cells 1 -> cells unit").contiguous()


def phi_of_step(num_phi: int, num_steps: int) -> tuple[int, ...]:
    """Which of `num_phi` convolutions each step uses: the one whose tick is nearest.

    In float64 and with the first winning a tie, as published: with 10 steps and 4 convolutions two
    choices hang on the last bit. The published ticks stand further out where there are four.
    """
    edge = 1 / 3 / num_phi if num_phi == 4 else 1 / 2 / num_phi
    ticks = np.linspace(edge, 1 - edge, num_phi)
    places = [step / max(1, num_steps - 1) for step in range(num_steps)]
    return tuple(int(np.argmin(np.abs(ticks - place))) for place in places)
