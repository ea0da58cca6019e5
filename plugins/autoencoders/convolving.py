"""The 3 x 3 convolutions of large maps: one Triton kernel, which adds and takes moments as well.

The one idea to hold: along a strip the pixels of a row of taps lie one after the other, so a
convolution is three products, of windows that overlap in memory. What stands beside it is added,
and the moments that the next norm wants are taken, before the sum leaves the processor.

Imported only for maps on a GPU: triton takes its time, and is not there on every platform.
"""

from functools import cache
from types import ModuleType
from typing import Any

import torch
import triton
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

import sandbox

from . import convolving_kernels as kernels
from . import strips
from .norms import Moments, Sum

LEAST = 128 * 128
"""Pixels of an image from which on the kernel pays: smaller maps the library convolves so much
faster that a pass for moments costs less."""
PARTS = {32: (32, 0), 64: (64, 0), 96: (64, 32), 128: (128, 0), 160: (128, 32), 192: (128, 64)}
"""Channels of a program, and how it has them: each a power of two."""
TILE, SMALL_TILE = 128, 64
"""Positions of a program; of a few programs, less than `MANY`, so that none of 132 processors is
without two."""
MANY = 264


def suits(maps: Float[Tensor, "b d h w"], times: int = 1) -> bool:
    """Whether such maps, with sides so many times as long, are to be strips for `convolved`.

    Not those of float32 whose products are to be exact.
    """
    if maps.shape[2] * maps.shape[3] * times**2 < LEAST or not maps.is_cuda:
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

    Of multiples of 16 channels it makes multiples of 32. What is no pixel has to be 0 in the strip,
    and is in what comes out; in the single map of `beside`, a strip as well, it may be anything.
    Products of float32 are those of TF32, of which `maps` is.
    """
    (b, d, h, w), e = maps.shape, len(weight)
    pixels, n = strips.whole(maps), h * (w + 1) + 1
    windows = pixels.as_strided((b, n - 2, 3 * d), (n * d, d, 1), pixels.storage_offset())
    weight = rounded(weight.permute(0, 2, 3, 1).reshape(e, 9 * d))
    first, rest = PARTS[max(size for size in PARTS if e % size == 0)]
    across, block = e // (first + rest), 128 // maps.element_size()
    block = block if 3 * d % block in (0, 16, 32) else block // 2
    tile = TILE if b * across * triton.cdiv(n - 1, TILE) >= MANY else SMALL_TILE
    parts = triton.cdiv(n - 1, tile)
    moments = maps.new_empty(b, parts, 2, e, dtype=torch.float32)
    out, other = strips.like(maps, e), None if beside is None else beside.first
    sizes, blocks = (first, rest or first), (block, 3 * d % block or block)
    with torch.cuda.device_of(maps):
        kernels.convolve[(parts * across, b)](
            *(_tiles(windows, 1, tile, size) for size in blocks),
            *(_tiles(weight, rows, size) for size in blocks for rows in sizes),
            *(_tiles(_after(each), 1, tile, size) for each in (out, other) for size in sizes),
            bias,
            None if beside is None else beside.first_bias,
            moments,
            n - 1,
            w + 1,
            3 * d,
            e,
            tile,
            block,
            first,
            rest,
            num_warps=4,
            num_stages=3,
        )
    return Sum(out, moments=Moments(moments, tile, n - 1, w + 1))


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
    return ((x.view(torch.int32) + 2**12) & -(2**13)).view(torch.float32)


def _after(maps: strips.Strip | None) -> Float[Tensor, "b n d"] | None:
    """All positions but the first, which is before all pixels."""
    return None if maps is None else strips.whole(maps)[:, 1:]


def _tiles(x: Tensor | None, *sizes: int) -> TensorDescriptor | None:
    return None if x is None else TensorDescriptor(x, [*x.shape], [*x.stride()], [*sizes])


@cache
def _runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the GPU copies tiles by itself, and the kernel can be built, after a trial."""
    if torch.cuda.get_device_capability(device) < (9, 0):
        return False

    def trial() -> ModuleType:
        zeros = torch.zeros(1, 5, 32, dtype=dtype, device=device)
        convolved(strips.view(zeros, 2, 1), zeros.new_zeros(32, 32, 3, 3), None)
        return kernels

    return sandbox.tried(trial, "an autoencoder without its own convolutions") is not None
