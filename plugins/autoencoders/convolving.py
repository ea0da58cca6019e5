"""The 3 x 3 convolutions of large maps: Triton kernels that add and take moments as well.

The one idea to hold: along a strip the pixels of a row of taps lie one after the other, so a
convolution is three products, of windows that overlap in memory. What stands beside it is added,
and the moments that the next norm wants are taken, before the sum leaves the processor.

Imported only for maps on a GPU: triton takes its time, and is not there on every platform.
"""

import math
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

import sandbox

from . import convolving_kernels as kernels
from . import strips
from .norms import Moments, Sum

LEAST, MOST = 128 * 128, 256 * 256
"""Pixels of an image for which the kernels pay. Smaller maps the library convolves so much faster
that a pass for moments costs less; of larger ones the moments of all tiles would be too many for
the one program that makes them a group's."""
PARTS = {32: (32, 0), 64: (64, 0), 96: (64, 32), 128: (128, 0), 160: (128, 32), 192: (128, 64)}
"""Channels of a program, and how it has them: each a power of two."""
TILE, SMALL_TILE = 128, 64
"""Positions of a program; of a few programs, less than `MANY`, so that none of 132 processors is
without two."""
MANY = 264
HOW = {"num_warps": 4, "num_stages": 3}


def suits(maps: Float[Tensor, "b d h w"], times: int = 1) -> bool:
    """Whether such maps, with sides so many times as long, are to be strips for `convolved`.

    Not those of float32 whose products are to be exact.
    """
    pixels = maps.shape[2] * maps.shape[3] * times**2
    if not LEAST <= pixels <= MOST or not maps.is_cuda:
        return False
    rounds: Any = torch.backends.cudnn.conv  # torch leaves its switches untyped
    exact = maps.dtype == torch.float32 and rounds.fp32_precision != "tf32"
    return not exact and _runs(maps.device, maps.dtype)


def convolved(
    maps: strips.Strip,
    weight: Float[Tensor, "e d 3 3"],
    bias: Float[Tensor, " e"] | None,
    beside: Sum | None = None,
) -> Sum:
    """What a 3 x 3 convolution (padding 1) makes of a strip, `beside` added, as one strip.

    Of multiples of 16 channels it makes multiples of 32. What is no pixel has to be 0 in the strip;
    in the single map of `beside`, a strip as well, it may be anything. Products of float32 are
    those of TF32, of which `maps` is.
    """
    plan = _planned(maps, 3, len(weight))
    out, other = strips.like(maps, plan.e), None if beside is None else beside.first
    moments = maps.new_empty(len(maps), plan.tiles, 2, plan.e, dtype=torch.float32)
    with torch.cuda.device_of(maps):
        kernels.convolve[(plan.programs, len(maps))](
            *_read(plan, maps, weight),
            *(_tiles(_after(x), 1, plan.tile, size) for x in (out, other) for size in plan.sizes),
            bias,
            None if beside is None else beside.first_bias,
            moments,
            plan.positions,
            plan.row,
            *plan.constants,
            **sandbox.overlapping(maps.device),
            **HOW,
        )
    return Sum(out, moments=Moments(moments, plan.tile, plan.positions, plan.row))


def convolved_doubled(
    maps: strips.Strip, weight: Float[Tensor, "four_e d 2 2"], bias: Float[Tensor, " e"] | None
) -> Sum:
    """What a 3 x 3 convolution makes of a strip with every pixel four times, as one strip.

    The weights are those of `double`. What is no pixel has to be 0 in the strip.
    """
    b, _, h, w = maps.shape
    plan = _planned(maps, 2, len(weight) // 4)
    out = strips.empty(maps, plan.e, 2 * h, 2 * w)
    moments = maps.new_empty(b, 4 * plan.tiles, 2, plan.e, dtype=torch.float32)
    with torch.cuda.device_of(maps):
        kernels.convolve_doubled[(4 * plan.programs, b)](
            *_read(plan, maps, weight),
            out,
            bias,
            moments,
            plan.positions,
            plan.row,
            out.stride(0),
            *plan.constants,
            **sandbox.overlapping(maps.device),
            **HOW,
        )
    return Sum(out, moments=Moments(moments, plan.tile, plan.positions, plan.row, repeats=4))


def entered(
    images: Float[Tensor, "b 3 h w"], weight: Float[Tensor, "e 3 3 3"], bias: Float[Tensor, " e"]
) -> Sum:
    """What a first convolution makes of images in any order of memory."""
    missing = -images.shape[1] % 16  # channels of 0, as windows are read in multiples
    maps = strips.filled(rounded(images), images.shape[1] + missing)
    return convolved(maps, F.pad(weight, (0, 0, 0, 0, 0, missing)), bias)


def rounded(x: Tensor) -> Tensor:
    """Numbers of float32 as TF32 has them, ties away from 0: a product cuts off what is beyond."""
    if x.dtype != torch.float32:
        return x
    near = ((x.view(torch.int32) + 2**12) & -(2**13)).view(torch.float32)
    return torch.where(x.isnan(), x, near)


class _Plan(NamedTuple):
    """How a convolution is shared among programs."""

    window: int
    """Numbers of a row of taps."""
    e: int
    tile: int
    """Positions of a program."""
    block: int
    """Of a window, that are read at once."""
    first: int
    rest: int
    """Channels of a program."""
    positions: int
    row: int
    """Positions of a row."""

    @property
    def constants(self) -> tuple[int, ...]:
        return self[:6]

    @property
    def tiles(self) -> int:
        return triton.cdiv(self.positions, self.tile)

    @property
    def programs(self) -> int:
        """Of an image."""
        return self.tiles * self.e // (self.first + self.rest)

    @property
    def sizes(self) -> tuple[int, int]:
        return self.first, self.rest or self.first


def _planned(maps: strips.Strip, side: int, e: int) -> _Plan:
    """For `side` x `side` taps and `e` channels."""
    b, d, h, w = maps.shape
    block = 128 // maps.element_size()
    block = block if side * d % block in (0, 16, 32) else block // 2
    parts = PARTS[max(size for size in PARTS if e % size == 0)]
    plan = _Plan(side * d, e, TILE, block, *parts, h * (w + 1), w + 1)
    return plan if b * plan.programs >= MANY else plan._replace(tile=SMALL_TILE)


def _read(plan: _Plan, maps: strips.Strip, weight: Tensor) -> Iterator[TensorDescriptor | None]:
    """The tiles that both kernels read."""
    whole = strips.whole(maps)
    b, n, d = whole.shape
    rows = n + 1 - plan.window // d
    windows = whole.as_strided((b, rows, plan.window), whole.stride(), whole.storage_offset())
    weight = rounded(weight.permute(0, 2, 3, 1).flatten(1))
    blocks = plan.block, plan.window % plan.block or plan.block
    yield from (_tiles(windows, 1, plan.tile, size) for size in blocks)
    yield from (_tiles(weight, rows, size) for size in blocks for rows in plan.sizes)


def _after(maps: strips.Strip | None) -> Float[Tensor, "b n d"] | None:
    """All positions but the first, which is before all pixels."""
    return None if maps is None else strips.whole(maps)[:, 1:]


def _tiles(x: Tensor | None, *sizes: int) -> TensorDescriptor | None:
    return None if x is None else TensorDescriptor(x, [*x.shape], [*x.stride()], [*sizes])


@cache
def _runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the GPU copies tiles by itself, and the kernels can be built, after a trial."""
    if torch.cuda.get_device_capability(device) < (9, 0):
        return False

    def trial() -> ModuleType:
        from .leaving import left

        side = math.isqrt(MANY * TILE) + 1  # with programs as large as there are
        maps = torch.zeros(1, 32, side, side, dtype=dtype, device=device)
        strip = strips.filled(maps, 32)
        widest = max(PARTS)
        total = convolved(strip, maps.new_zeros(widest, 32, 3, 3), None)
        convolved_doubled(strip, maps.new_zeros(4 * widest, 32, 2, 2), None)
        like = {"dtype": dtype, "device": device}
        left(total, nn.GroupNorm(32, widest, device=device), nn.Conv2d(widest, 3, 3, **like))
        return kernels

    return sandbox.tried(trial, "an autoencoder without its own convolutions") is not None
