"""Products with few tokens, and what stands before and after them, as two Triton kernels.

The one idea to hold: with few tokens a product takes as long as its weights take to come from
memory. So a program owns a few output channels, streams their weights once, and computes all that
is small beside them again by itself: the norm, the modulation, the gate.

The weights are the left operand: their channels fill a matrix unit, which the tokens would not.

Imported only for tokens on a GPU: triton takes its time, and is not there on every platform.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from .blocks import LAYER_NORM_EPS
from .few import CHUNK, LIMIT, padded

TILES = 2**12
"""The most output tiles of a product that is split."""
_EPS = tl.constexpr(LAYER_NORM_EPS)
_CHUNK = tl.constexpr(CHUNK)
_TWICE_ROOT = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)


class Plan(NamedTuple):
    """How a product is cut, and how much of it is under way at a time."""

    rows: int
    """Tokens, rounded up to what a matrix unit takes."""
    channels: int
    """Output channels of a program."""
    step: int
    """Input channels that a program reads at a time; divides `CHUNK`."""
    splits: int
    """Programs that share an output tile, each with its part of the input channels."""
    stages: int
    """Steps that are under way at a time, the one that is computed with among them."""
    warps: int


def plan(num_tokens: int, num_in: int, num_out: int, *, normed: bool) -> Plan:
    """The rule, a pure function of sizes: nothing is measured where a recording may be under way.

    Wanted: a program or two for each of some 130 processors, each with 16 KB of weights under way,
    in at most half of a processor's memory. More tokens are read again by every program, hence
    fewer programs then. A scale and a shift for each token take their room beside the tokens.
    """
    rows = padded(num_tokens)
    channels, stages = 16 if rows == 16 else 32, 4 if rows == 64 else 5
    if normed:
        step = CHUNK if rows == 16 else CHUNK // 2
        return Plan(rows, channels, step, 1, stages, 8 if rows == 64 else 4)
    steps, tiles = num_in // CHUNK, num_out // channels
    able = (s for s in (4, 3, 2) if steps % s == 0 and steps // s >= 4 and tiles * s <= 256)
    return Plan(rows, channels, CHUNK, next(able, 1), stages, 4)


def normed_linear(
    x: Float[Tensor, "b n d"],
    shift: Float[Tensor, "b 1 d"],
    scale: Float[Tensor, "b 1 d"],
    weight: Float[Tensor, "out d"],
    bias: Float[Tensor, " out"],
    gelu: bool = False,
) -> Float[Tensor, "b n out"]:
    """The linear layer of the layer norm of `x`, scaled by 1 + `scale` and shifted.

    With `gelu` its GELU, in the tanh form. All are of one type, `d` and `out` multiples of 128,
    and `x` no more than `few.LIMIT` tokens; raises ValueError else.
    """
    (b, n, d), num_out = x.shape, len(weight)
    _require(x, weight, [(shift, (b, 1, d)), (scale, (b, 1, d)), (bias, (num_out,))], b * n, d)
    cut = plan(b * n, d, num_out, normed=True)
    out = x.new_empty(b, n, num_out)
    with torch.cuda.device_of(x):
        _normed_linear[(num_out // cut.channels,)](
            x.contiguous(),
            shift,
            scale,
            weight,
            bias,
            out,
            b * n,
            n,
            shift.stride(0),
            scale.stride(0),
            d,
            num_out,
            gelu,
            cut.rows,
            cut.channels,
            cut.step,
            num_stages=cut.stages,
            num_warps=cut.warps,
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
    tokens; raises ValueError else. Launches on one device have to follow one another: where the
    input channels are split, they count in the same place which programs are done.
    """
    (b, heads, n, e), num_out = y.shape, len(weight)
    beside = [(bias, (num_out,)), (gate, (b, 1, num_out)), (residual, (b, n, num_out))]
    _require(y, weight, beside, b * n, heads * e)
    cut = plan(b * n, heads * e, num_out, normed=False)
    y = y if y.stride(3) == 1 else y.contiguous()
    out = y.new_empty(b, n, num_out)
    tiles, split = num_out // cut.channels, cut.splits > 1
    held = tiles * cut.splits * cut.channels * cut.rows
    with torch.cuda.device_of(y):
        _gated_linear[(tiles * cut.splits,)](
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
            cut.step,
            num_stages=cut.stages,
            num_warps=cut.warps,
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


@cache
def _arrived(device: torch.device) -> Tensor:
    """How many programs of each output tile are done: zeros, from one launch to the next."""
    return torch.zeros(TILES, dtype=torch.int32, device=device)


@triton.jit(do_not_specialize=["num_tokens", "n"])  # one build for all steps of a plan
def _normed_linear(
    x,
    shift,
    scale,
    weight,
    bias,
    out,
    num_tokens,
    n,
    shift_stride,
    scale_stride,
    D: tl.constexpr,  # noqa: N803
    OUT: tl.constexpr,  # noqa: N803
    GELU: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    CHANNELS: tl.constexpr,  # noqa: N803
    STEP: tl.constexpr,  # noqa: N803
):
    """A few output channels of all tokens."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    row = tl.arange(0, ROWS)[None, :]
    there = row < num_tokens
    image = row // n
    product = tl.zeros([CHANNELS, ROWS], tl.float32)
    product += tl.load(bias + channel).to(tl.float32)[:, None]
    read = x + row * D
    # One pass over sums and squares: numbers of 16 bits with a mean so much greater than their
    # spread that float32 would lose it have lost that spread before.
    total = tl.zeros([_CHUNK, ROWS], tl.float32)
    squares = tl.zeros([_CHUNK, ROWS], tl.float32)
    for start in tl.static_range(0, D, _CHUNK):  # unrolled: all is read at once
        part = tl.load(read + start + tl.arange(0, _CHUNK)[:, None], there, 0.0).to(tl.float32)
        total += part
        squares += part * part
    mean = tl.sum(total, 0)[None, :] / D
    variance = tl.sum(squares, 0)[None, :] / D - mean * mean
    inverse = 1 / tl.sqrt(tl.where(variance < 0, 0.0, variance) + _EPS)
    for start in range(0, D, STEP):
        own = start + tl.arange(0, STEP)
        w = tl.load(weight + channel[:, None] * D + own[None, :])
        own = own[:, None]
        a = tl.load(read + own, there, 0.0).to(tl.float32)
        gain = 1 + tl.load(scale + image * scale_stride + own, there, 0.0).to(tl.float32)
        moved = tl.load(shift + image * shift_stride + own, there, 0.0).to(tl.float32)
        a = (a - mean) * inverse * gain + moved
        product = tl.dot(w, a.to(w.dtype), product)
    if GELU:
        steep = _TWICE_ROOT * (product + 0.044715 * product * product * product)
        product = product / (1 + tl.exp(-steep))
    tl.store(out + row * OUT + channel[:, None], product.to(out.dtype.element_ty), there)


@triton.jit(do_not_specialize=["num_tokens", "n"])  # one build for all steps of a plan
def _gated_linear(
    y,
    weight,
    bias,
    gate,
    residual,
    out,
    partial,
    arrived,
    num_tokens,
    n,
    image_stride,
    head_stride,
    token_stride,
    gate_stride,
    HEADS: tl.constexpr,  # noqa: N803
    E: tl.constexpr,  # noqa: N803
    OUT: tl.constexpr,  # noqa: N803
    SPLITS: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    CHANNELS: tl.constexpr,  # noqa: N803
    STEP: tl.constexpr,  # noqa: N803
):
    """A few output channels of all tokens, or a part of their sums.

    Whoever is the last to have its part adds them all, always in the same order.
    """
    tile = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    channel = tile * CHANNELS + tl.arange(0, CHANNELS)
    row = tl.arange(0, ROWS)
    there = row[None, :] < num_tokens
    read = y + (row // n * image_stride + row % n * token_stride)[None, :]
    product = tl.zeros([CHANNELS, ROWS], tl.float32)
    for start in range(0, HEADS * E // SPLITS, STEP):
        own = split * (HEADS * E // SPLITS) + start + tl.arange(0, STEP)
        w = tl.load(weight + channel[:, None] * (HEADS * E) + own[None, :])
        if HEADS > 1:
            own = own // E * head_stride + own % E
        product = tl.dot(w, tl.load(read + own[:, None], there, 0.0), product)
    if SPLITS == 1:
        _add(product, bias, gate, residual, out, channel, row, num_tokens, n, gate_stride, OUT)
    else:
        held = tl.arange(0, CHANNELS)[:, None] * ROWS + row[None, :]
        parts = partial + tile * (SPLITS * CHANNELS * ROWS) + held
        tl.store(parts + split * (CHANNELS * ROWS), product)
        tl.debug_barrier()  # all of it is stored before it is counted
        if tl.atomic_add(arrived + tile, 1) == SPLITS - 1:
            product = tl.zeros([CHANNELS, ROWS], tl.float32)
            for each in tl.static_range(SPLITS):
                product += tl.load(parts + each * (CHANNELS * ROWS), cache_modifier=".cg")
            tl.store(arrived + tile, 0)
            _add(product, bias, gate, residual, out, channel, row, num_tokens, n, gate_stride, OUT)


@triton.jit
def _add(
    product,
    bias,
    gate,
    residual,
    out,
    channel,
    row,
    num_tokens,
    n,
    gate_stride,
    OUT: tl.constexpr,  # noqa: N803
):
    """Store the residual and the gated product with its bias."""
    channel, row = channel[:, None], row[None, :]
    there = row < num_tokens
    own = row * OUT + channel
    product += tl.load(bias + channel).to(tl.float32)
    product *= tl.load(gate + row // n * gate_stride + channel, there, 0.0).to(tl.float32)
    product += tl.load(residual + own, there, 0.0).to(tl.float32)
    tl.store(out + own, product.to(out.dtype.element_ty), there)
