"""What stands between two convolutions, as Triton kernels: the sum, the group norm, SiLU.

The one idea to hold: a map is read as seldom as can be. What convolutions and shortcuts still have
to add is added where a norm's moments are taken, and what is normalised is written as the next
convolution reads it. A group of a small map is held by one program, which does all of it at once.

Imported only for maps on a GPU: triton takes its time, and is not there on every platform.
"""

from typing import NamedTuple

import torch
import triton
from jaxtyping import Float
from torch import Tensor, nn

import sandbox

from . import norm_kernels as kernels

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


class Sum(NamedTuple):
    """Maps, channels together, that are still to be added up, and the channels' biases."""

    first: Float[Tensor, "b d h w"]
    first_bias: Float[Tensor, " d"] | None = None
    second: Float[Tensor, "b d h w"] | None = None
    second_bias: Float[Tensor, " d"] | None = None


def added(terms: Sum, *, pad: bool = False) -> Float[Tensor, "b d hh ww"]:
    """The sum as one map; with `pad`, one row below and one column to the right of 0 belong to it.

    Raises ValueError for a map that does not lie channels together.
    """
    b, d, h, w = terms.first.shape
    out = terms.first.new_empty(b, h + pad, w + pad, d)
    if pad:
        out[:, -1].zero_()
        out[:, :, -1].zero_()
    _sum_up(terms, out, None, _share(terms.first, h * w), pad)
    return out.permute(0, 3, 1, 2)


def normed(terms: Sum, norm: nn.GroupNorm, *, silu: bool) -> tuple[Sum, Float[Tensor, "b d h w"]]:
    """The sum, as one map and its bias, and the map's group norm, with `silu` SiLU of it.

    Moments are taken in float32; the maps are of the type of those that are given. Raises
    ValueError for a map that does not lie channels together.
    """
    b, d, h, w = terms.first.shape
    total = terms if terms.second is None else Sum(_like(terms.first))
    summed, out = None if total is terms else total.first, _like(terms.first)
    channels = d // norm.num_groups
    block, width = triton.next_power_of_2(h * w), triton.next_power_of_2(channels)
    learned = norm.weight, norm.bias, norm.eps
    if block * width > (HELD if b > 8 else 2 * HELD):
        share = _share(terms.first, SHARES)
        shares = triton.cdiv(h * w, share)
        moments = out.new_empty(b, shares, 2, d, dtype=torch.float32)
        _sum_up(terms, summed, moments, share)
        _apply_to(total, _scales(moments, *learned, h * w, share, channels), out, silu)
        return total, out
    with torch.cuda.device_of(out):
        kernels.held[(norm.num_groups, b)](
            *_checked(terms),
            summed,
            out,
            *learned,
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


def _sum_up(
    terms: Sum, summed: Tensor | None, moments: Tensor | None, share: int, pad: bool = False
) -> None:
    """Write the sum and the moments of each share of an image."""
    b, d, h, w = terms.first.shape
    rows, width = _tile(terms.first, TILE)
    with torch.cuda.device_of(terms.first):
        kernels.sum_up[(d // width * triton.cdiv(h * w, share), b)](
            *_checked(terms),
            summed,
            moments,
            h * w,
            share,
            w,
            d,
            width,
            rows,
            pad,
            **sandbox.overlapping(terms.first.device),
            num_warps=WARPS,
        )


def _scales(
    moments: Float[Tensor, "b shares 2 d"],
    weight: Float[Tensor, " d"],
    bias: Float[Tensor, " d"],
    eps: float,
    pixels: int,
    share: int,
    channels: int,
) -> Float[Tensor, "b 2 d"]:
    """What every channel of an image is multiplied by, and what is added then."""
    b, shares, _, d = moments.shape
    scales = moments.new_empty(b, 2, d)
    with torch.cuda.device_of(moments):
        kernels.finish[(d // channels, b)](
            moments,
            scales,
            weight,
            bias,
            eps,
            pixels,
            share,
            d,
            channels,
            shares,
            triton.next_power_of_2(shares),
            triton.next_power_of_2(channels),
            **sandbox.overlapping(moments.device),
            num_warps=1,
        )
    return scales


def _apply_to(total: Sum, scales: Float[Tensor, "b 2 d"], out: Tensor, silu: bool) -> None:
    b, d, h, w = out.shape
    rows, width = _tile(out, TILE_APPLIED)
    with torch.cuda.device_of(out):
        kernels.apply[(d // width * triton.cdiv(h * w, rows), b)](
            total.first,
            total.first_bias,
            scales,
            out,
            h * w,
            d,
            width,
            rows,
            silu,
            **sandbox.overlapping(out.device),
            num_warps=WARPS_APPLIED,
        )


def _share(maps: Tensor, most: int) -> int:
    """Pixels of a program's share, where at most `most` share: whole tiles."""
    pixels, rows = maps.shape[2] * maps.shape[3], _tile(maps, TILE)[0]
    return triton.cdiv(triton.cdiv(pixels, most), rows) * rows


def _tile(maps: Tensor, size: int) -> tuple[int, int]:
    """Pixels and channels of a tile of so many bytes."""
    channels = maps.shape[1]
    width = min(channels & -channels, WIDEST)
    return max(1, size // maps.element_size() // width), width


def _like(maps: Tensor) -> Tensor:
    return torch.empty_like(maps, memory_format=torch.channels_last)


def _checked(terms: Sum) -> Sum:
    for maps in (terms.first, terms.second):
        if maps is not None and not maps.is_contiguous(memory_format=torch.channels_last):
            raise ValueError("a map has to lie with its channels together")
    return terms
