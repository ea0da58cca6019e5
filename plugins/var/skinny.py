"""Products with few tokens, and what stands after them, as two Triton kernels.

The one idea to hold: with few tokens a product takes as long as its weights take to come from
memory. So a program owns a few output channels, and streams their weights once.

The weights are the left operand: their channels fill a matrix unit, which the tokens would not.

Imported only for tokens on a GPU: triton takes its time, and is not there on every platform.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

import sandbox

from . import skinny_kernels as kernels
from .few import CHUNK, LIMIT, padded

TILES = 2**12
"""The most output tiles of a product that is split."""
STAGES, WARPS = 5, 4
"""Chunks of weights that are under way at a time, the one that is computed with among them; and
warps of a program."""


class Plan(NamedTuple):
    """How a product is cut."""

    rows: int
    """Tokens, rounded up to what a matrix unit takes."""
    channels: int
    """Output channels of a program."""
    splits: int
    """Programs that share an output tile, each with its part of the input channels."""


def plan(num_tokens: int, num_in: int, num_out: int, *, whole: bool) -> Plan:
    """The rule, a pure function of sizes: nothing is measured where a recording may be under way.

    Wanted: a program or two for each of some 130 processors, each with 16 KB of weights under way,
    or 32 with more than 16 tokens, in at most half of a processor's memory. `whole` products are
    not split.
    """
    rows = padded(num_tokens)
    channels = 16 if rows == 16 else 32
    steps, tiles = num_in // CHUNK, num_out // channels
    able = (s for s in (4, 3, 2) if steps % s == 0 and steps // s >= 4 and tiles * s <= 256)
    return Plan(rows, channels, 1 if whole else next(able, 1))


def linear(
    x: Float[Tensor, "b n d"],
    weight: Float[Tensor, "out d"],
    bias: Float[Tensor, " out"],
    gelu: bool = False,
) -> Float[Tensor, "b n out"]:
    """The linear layer of `x`; with `gelu` its GELU, in the tanh form.

    All are of one type, `d` and `out` multiples of 128, and `x` no more than `few.LIMIT` tokens;
    raises ValueError else.
    """
    (b, n, d), num_out = x.shape, len(weight)
    _require(x, weight, [(bias, (num_out,))], b * n, d)
    cut = plan(b * n, d, num_out, whole=True)
    out = x.new_empty(b, n, num_out)
    with torch.cuda.device_of(x):
        kernels.linear[(num_out // cut.channels,)](
            x.contiguous(),
            weight,
            bias,
            out,
            b * n,
            d,
            num_out,
            gelu,
            cut.rows,
            cut.channels,
            CHUNK,
            **sandbox.overlapping(x.device),
            num_stages=STAGES,
            num_warps=WARPS,
        )
    return out


def gated_linear(
    y: Float[Tensor, "b heads n e"],
    weight: Float[Tensor, "d heads_e"],
    bias: Float[Tensor, " d"],
    gate: Float[Tensor, "b 1 d"],
    residual: Float[Tensor, "b n d"],
) -> Float[Tensor, "b n d"]:
    """`residual` + `gate` times the linear layer of what all heads of a token are side by side.

    All are of one type, `d` and heads * e multiples of 128, and `y` no more than `few.LIMIT`
    tokens; raises ValueError else. Where the input channels are split, launches of one stream, and
    replays of what was recorded on one, count in the same place which programs are done: these have
    to follow one another.
    """
    (b, heads, n, e), num_out = y.shape, len(weight)
    beside = [(bias, (num_out,)), (gate, (b, 1, num_out)), (residual, (b, n, num_out))]
    _require(y, weight, beside, b * n, heads * e)
    cut = plan(b * n, heads * e, num_out, whole=False)
    y = y if y.stride(3) == 1 else y.contiguous()
    out = y.new_empty(b, n, num_out)
    tiles, split = num_out // cut.channels, cut.splits > 1
    held = tiles * cut.splits * cut.channels * cut.rows
    with torch.cuda.device_of(y):
        kernels.gated_linear[(tiles * cut.splits,)](
            y,
            weight,
            bias,
            gate,
            residual.contiguous(),
            out,
            y.new_empty(held, dtype=torch.float32) if split else None,
            _arrived(y.device) if split else None,
            b * n,
            n,
            *y.stride()[:3],
            gate.stride(0),
            heads,
            e,
            num_out,
            cut.splits,
            cut.rows,
            cut.channels,
            CHUNK,
            **sandbox.overlapping(y.device),
            num_stages=STAGES,
            num_warps=WARPS,
        )
    return out


def _require(
    x: Tensor,
    weight: Tensor,
    beside: list[tuple[Tensor, tuple[int, ...]]],
    num_tokens: int,
    num_in: int,
) -> None:
    num_out = len(weight)
    fits = weight.shape == (num_out, num_in) and 0 < num_tokens <= LIMIT and weight.is_contiguous()
    fits = fits and num_in % CHUNK == num_out % CHUNK == 0 and num_out // 16 <= TILES
    for each, shape in [(weight, weight.shape), *beside]:
        fits = fits and each.shape == shape and each.dtype == x.dtype and each.stride(-1) == 1
    if not fits:
        raise ValueError(
            f"no product of {num_tokens} tokens, {x.dtype} {tuple(x.shape)}, with "
            f"{weight.dtype} {tuple(weight.shape)} and what is beside it"
        )


_counts: dict[tuple[torch.device, int], Tensor] = {}


def _arrived(device: torch.device) -> Tensor:
    """How many programs of each output tile are done: zeros, from one launch to the next.

    One for each stream. What is recorded has that of the stream it is recorded on; where nothing
    ran there before, zeros of its own, which are made anew in every replay and nowhere else.
    """
    stream, recorded = _stream(device)
    if (device, stream) in _counts:
        return _counts[device, stream]
    made = torch.zeros(TILES, dtype=torch.int32, device=device)
    if not recorded:
        _counts[device, stream] = made
    return made


def _stream(device: torch.device) -> tuple[int, bool]:
    """The current one, and whether it is being recorded."""
    if device.type != "cuda":
        return 0, False
    stream = torch.cuda.current_stream(device).cuda_stream
    return stream, torch.cuda.is_current_stream_capturing()
