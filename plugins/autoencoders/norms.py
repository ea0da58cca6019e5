"""What stands between two convolutions, as Triton kernels: the sum, the group norm, SiLU.

The one idea to hold: a map is read as seldom as can be. What convolutions and shortcuts still have
to add is added where a norm's moments are taken, and what is normalised is written as the next
convolution reads it. A group of a small map is held by one program, which does all of it at once.

Imported only for maps on a GPU: triton takes its time, and is not there on every platform.
"""

from functools import partial
from typing import NamedTuple

import torch
import triton
from jaxtyping import Float
from torch import Tensor, nn

import sandbox

from . import norm_kernels as kernels
from . import strips

HELD = 8192
"""Numbers of a group, its sides rounded up to powers of two, that one program holds; of a few
images twice as many, for which a GPU has programs to spare."""
SHARES = 32
"""Programs that take the moments of some channels of one image, at most."""
WIDEST = 128
"""Channels of a program, at most: a power of two that divides them, so that no thread idles."""
TILE, WARPS = 8192, 4
"""Bytes of a map that a program takes the moments of at once, and the warps that do so."""
TILE_APPLIED, WARPS_APPLIED = 8192, 4
"""The same where moments are applied."""


class Moments(NamedTuple):
    """Each channel's mean, and squares around it, in every part of an image."""

    values: Float[Tensor, "b parts 2 d"]
    share: int
    """Positions of a part, the last one's but for what is missing."""
    positions: int
    """Of an image."""
    row: int
    """Every so manyeth position is no pixel."""
    repeats: int = 1
    """Parts are those of so many images, one after the other, that are one."""


class Sum(NamedTuple):
    """Maps, channels together, that are still to be added up, and the channels' biases.

    A single map may have its moments, with its bias, with it.
    """

    first: Float[Tensor, "b d h w"]
    first_bias: Float[Tensor, " d"] | None = None
    second: Float[Tensor, "b d h w"] | None = None
    second_bias: Float[Tensor, " d"] | None = None
    moments: Moments | None = None


def added(terms: Sum, *, pad: bool = False, strip: bool = False) -> Float[Tensor, "b d hh ww"]:
    """The sum as one map; with `pad`, one row below and one column to the right of 0 belong to it.

    With `strip` it is one, with its zeros. Raises ValueError for a map that does not lie channels
    together.
    """
    b, d, h, w = terms.first.shape
    if strip:
        single = terms[1:4] == (None, None, None) and strips.is_strip(terms.first)
        out = terms.first if single else strips.like(terms.first)
        if not single:
            _sum_up(terms, out, h * w, moments=False)
        return strips.bordered(out)
    whole = terms.first.new_empty(b, h + pad, w + pad, d)
    if pad:
        whole[:, -1].zero_()
        whole[:, :, -1].zero_()
    out = whole.permute(0, 3, 1, 2)
    _sum_up(terms, out[:, :, :h, :w], h * w, moments=False)
    return out


def normed(
    terms: Sum, norm: nn.GroupNorm, *, silu: bool, strip: bool = False
) -> tuple[Sum, Float[Tensor, "b d h w"]]:
    """The sum, as one map and its bias, and the map's group norm, with `silu` SiLU of it.

    With `strip` both are strips, the second with its zeros, and in float32 rounded to TF32. Moments
    are taken in float32; the maps are of the type of those that are given. Raises ValueError for a
    map that does not lie channels together.
    """
    b, d, h, w = terms.first.shape
    single = terms.second is None and (strips.is_strip(terms.first) or not strip)
    new = partial(strips.like if strip else _like, terms.first)
    total, out = terms if single else Sum(new()), new()
    summed = None if single else total.first
    channels = d // norm.num_groups
    block, width = triton.next_power_of_2(h * w), triton.next_power_of_2(channels)
    apart = strip or strips.is_strip(terms.first)
    if apart or block * width > (HELD if b > 8 else 2 * HELD):
        moments = total.moments or _sum_up(terms, summed, SHARES)
        _apply_to(total, _scales(moments, norm, h * w), out, silu)
        return total, out
    with torch.cuda.device_of(out):
        kernels.held[(norm.num_groups, b)](
            *_checked(terms)[:4],
            summed,
            out,
            norm.weight,
            norm.bias,
            norm.eps,
            h * w,
            d,
            channels,
            block,
            width,
            silu,
            **sandbox.overlapping(out.device),
            num_warps=max(1, min(8, block * width // 1024)),
        )
    return total, out


def scales_of(terms: Sum, norm: nn.GroupNorm) -> Float[Tensor, "b 2 d"]:
    """What the norm multiplies each channel of a single map by, and what it adds then."""
    pixels = terms.first.shape[2] * terms.first.shape[3]
    return _scales(terms.moments or _sum_up(terms, None, SHARES), norm, pixels)


def _sum_up(
    terms: Sum, summed: Tensor | None, most: int, *, moments: bool = True
) -> Moments | None:
    """Write the sum; the moments of each share of an image, which at most `most` programs have."""
    first, *_ = maps = _checked(terms)[:4]
    b, d, h, w = first.shape
    rows, width = _tile(first, TILE)
    share = triton.cdiv(triton.cdiv(h * w, most), rows) * rows
    parts = triton.cdiv(h * w, share)
    values = first.new_empty(b, parts, 2, d, dtype=torch.float32) if moments else None
    to = first if summed is None else summed
    with torch.cuda.device_of(first):
        kernels.sum_up[(d // width * parts, b)](
            *maps,
            summed,
            values,
            h * w,
            share,
            w,
            *_lines(first),
            *_lines(to),
            d,
            width,
            rows,
            not _dense(first),
            not _dense(to),
            **sandbox.overlapping(first.device),
            num_warps=WARPS,
        )
    return None if values is None else Moments(values, share, h * w, h * w + 1)


def _scales(moments: Moments, norm: nn.GroupNorm, pixels: int) -> Float[Tensor, "b 2 d"]:
    b, parts, _, d = moments.values.shape
    scales, channels = moments.values.new_empty(b, 2, d), d // norm.num_groups
    block, width = triton.next_power_of_2(parts), triton.next_power_of_2(channels)
    with torch.cuda.device_of(scales):
        kernels.finish[(norm.num_groups, b)](
            moments.values,
            scales,
            norm.weight,
            norm.bias,
            norm.eps,
            pixels,
            moments.share,
            moments.positions,
            moments.row,
            d,
            channels,
            parts,
            block,
            width,
            moments.repeats,
            **sandbox.overlapping(scales.device),
            num_warps=max(1, min(8, block * width // 1024)),
        )
    return scales


def _apply_to(total: Sum, scales: Float[Tensor, "b 2 d"], out: Tensor, silu: bool) -> None:
    b, d, h, w = out.shape
    rows, width = _tile(out, TILE_APPLIED)
    strip = strips.is_strip(out)
    with torch.cuda.device_of(out):
        kernels.apply[(d // width * triton.cdiv(h * w, rows), b)](
            total.first,
            total.first_bias,
            scales,
            out,
            h * w,
            w,
            *_lines(total.first),
            *_lines(out),
            d,
            width,
            rows,
            not _dense(total.first),
            strip,
            strip and out.dtype == torch.float32,
            silu,
            **sandbox.overlapping(out.device),
            num_warps=WARPS_APPLIED,
        )


def _tile(maps: Tensor, size: int) -> tuple[int, int]:
    """Pixels and channels of a tile of so many bytes."""
    channels = maps.shape[1]
    width = min(channels & -channels, WIDEST)
    return max(1, size // maps.element_size() // width), width


def _lines(maps: Tensor) -> tuple[int, int]:
    """From one row to the next, in pixels; from one image to the next, in numbers."""
    return maps.stride(2) // maps.shape[1], maps.stride(0)


def _dense(maps: Tensor) -> bool:
    """Whether the rows of an image follow one another with nothing between them."""
    return maps.stride(2) == maps.shape[1] * maps.shape[3]


def _like(maps: Tensor) -> Tensor:
    return torch.empty_like(maps, memory_format=torch.channels_last)


def _checked(terms: Sum) -> Sum:
    for maps in (terms.first, terms.second):
        dense = maps is None or maps.is_contiguous(memory_format=torch.channels_last)
        if not dense and (terms.second is not None or not strips.is_strip(maps)):
            raise ValueError("a map has to lie with its channels together")
    return terms
