"""A strip's norm, SiLU and last convolution, into a few channels, as two Triton kernels.

The one idea to hold: a few channels are not worth a pass for each of nine taps. Each pixel is read
once, and gives what every tap makes of it; what belongs to one pixel is then gathered around it.

Imported only for maps on a GPU: triton takes its time, and is not there on every platform.
"""

import torch
import triton
import triton.language as tl
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

import sandbox

from . import norm_kernels
from .convolving import rounded
from .norms import Sum, scales_of

MOST = 32
"""Products a pixel has, nine for each channel, at most."""
TILE, WARPS = 128, 4
"""Positions of a program."""
GATHERED = 512
"""Positions for which a program gathers."""


def left(maps: Sum, norm: nn.GroupNorm, conv: nn.Conv2d) -> Float[Tensor, "b e h w"]:
    """What the convolution (3 x 3, padding 1, of float32 by TF32) makes of SiLU of the norm.

    Of a single strip, in its type; images lie one channel after the other. Raises ValueError for
    more than three channels.
    """
    (b, d, h, w), e = maps.first.shape, conv.out_channels
    if 9 * e > MOST:
        raise ValueError(f"{e} channels are too many to be gathered")
    scales = scales_of(maps, norm)
    weight = rounded(rearrange(conv.weight, "e d y x -> d (e y x)"))
    weight = F.pad(weight, (0, MOST - 9 * e)).contiguous()
    positions = h * (w + 1)
    taps = scales.new_empty(b, 9 * e, positions)
    out = maps.first.new_empty(b, e, h, w)
    with torch.cuda.device_of(out):
        _tap[(triton.cdiv(positions, TILE), b)](
            maps.first,
            maps.first_bias,
            scales,
            weight,
            taps,
            positions,
            w + 1,
            maps.first.stride(0),
            d,
            min(d & -d, 64),
            9 * e,
            MOST,
            TILE,
            **sandbox.overlapping(out.device),
            num_warps=WARPS,
        )
        _gather[(triton.cdiv(positions, GATHERED), b * e)](
            taps,
            conv.bias,
            out,
            positions,
            w + 1,
            e,
            GATHERED,
            **sandbox.overlapping(out.device),
            num_warps=WARPS,
        )
    return out


@triton.jit
def _tap(
    maps,
    bias,
    scales,
    weight,
    taps,
    positions,
    row,
    image_size,
    D: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    COUNT: tl.constexpr,  # noqa: N803
    MOST: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    OVERLAPS: tl.constexpr,  # noqa: N803
):
    """Some positions of an image: what each tap makes of a pixel, 0 where none is."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    image = tl.program_id(1).to(tl.int64)
    position = tl.program_id(0) * TILE + tl.arange(0, TILE)[:, None]
    there = (position < positions) & (position % row < row - 1)
    tap = tl.arange(0, MOST)[None, :]
    made = tl.zeros([TILE, MOST], tl.float32)
    for start in range(0, D, BLOCK):
        own = start + tl.arange(0, BLOCK)[None, :]
        value = tl.load(maps + image * image_size + position * D + own, there, 0.0).to(tl.float32)
        if bias is not None:
            value += tl.load(bias + own).to(tl.float32)
        value *= tl.load(scales + image * 2 * D + own)
        value += tl.load(scales + image * 2 * D + D + own)
        value = tl.where(there, value / (1 + tl.exp(-value)), 0.0)
        if maps.dtype.element_ty == tl.float32:
            value = norm_kernels.rounded(value)
        rows = start + tl.arange(0, BLOCK)[:, None]
        made = tl.dot(value.to(maps.dtype.element_ty), tl.load(weight + rows * MOST + tap), made)
    taps += image * COUNT * positions
    tl.store(taps + tap * positions + position, made, (position < positions) & (tap < COUNT))


@triton.jit
def _gather(
    taps,
    bias,
    out,
    positions,
    row,
    E: tl.constexpr,  # noqa: N803
    SIZE: tl.constexpr,  # noqa: N803
    OVERLAPS: tl.constexpr,  # noqa: N803
):
    """One channel of some pixels: the sum of nine taps around each."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    channel = tl.program_id(1) % E
    position = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    taps += tl.program_id(1).to(tl.int64) * 9 * positions
    total = tl.zeros([SIZE], tl.float32)
    if bias is not None:
        total += tl.load(bias + channel).to(tl.float32)
    for tap in tl.static_range(9):
        at = position + (tap // 3 - 1) * row + tap % 3 - 1
        total += tl.load(taps + tap * positions + at, (at >= 0) & (at < positions), 0.0)
    out += tl.program_id(1).to(tl.int64) * (positions // row * (row - 1))
    column = position % row
    place = position // row * (row - 1) + column
    there = (position < positions) & (column < row - 1)
    tl.store(out + place, total.to(out.dtype.element_ty), there)
