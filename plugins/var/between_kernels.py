"""What stands between a block's products in training, and all its gradients, as Triton kernels.

The one idea to hold: one kernel goes each way, with or without a branch to add, with or without a
norm to make. On the way back a program goes down a share of an image's tokens, so that what is
summed over them stays in registers; the shares' sums are added always in the same order.

Imported only for tokens on a GPU: triton takes its time, and is not there on every platform.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from .blocks import LAYER_NORM_EPS

TOKENS, TOKENS_BACK = 4, 2
"""That a program holds at once, at most, there and back; half of them where they are wide."""
STAGES = 3
"""Of the way back: all but one are of tokens that are still being read."""
PROGRAMS = 396
"""That share the tokens on the way back, at most: three for each of 132 processors."""
COLUMNS = 256  # of an image's sums, for a program that adds them up
_EPS = tl.constexpr(LAYER_NORM_EPS)

Tokens, Rows = Float[Tensor, "b n d"], Float[Tensor, "b 1 d"]
Branch = tuple[Tokens, Float[Tensor, " d"], Rows]
"""A product, its bias and its gate."""
Norm = tuple[Rows, Rows, torch.dtype]
"""Scale and shift of a norm, and its type."""
Normed = tuple[Tokens, Tokens, Float[Tensor, "2 b n"], Rows]
"""The gradient of a norm; what it was of: `x` of `join`, moments, its scale."""


def join(
    x: Tokens, branch: Branch | None, norm: Norm | None
) -> tuple[Tokens | None, Tokens | None, Float[Tensor, "2 b n"] | None]:
    """`x + (product + bias) * gate`; that normalised, times 1 + scale, plus shift; its moments.

    The sum is of the type of `x`, and is what is normalised. The moments are means and inverse
    deviations, `2 b n`, float32. What is not asked for is None.
    """
    (b, n, d), tokens = x.shape, _held(TOKENS, x.shape[2])
    product, bias, gate = branch or (None, None, None)
    scale, shift, dtype = norm or (None, None, None)
    x, product = (None if each is None else each.contiguous() for each in (x, product))
    added = None if branch is None else torch.empty_like(x)
    normed = None if norm is None else torch.empty_like(x, dtype=dtype)
    moments = None if norm is None else x.new_empty(2, b, n, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _join[(triton.cdiv(n, tokens), b)](
            x,
            product,
            bias,
            *_rows(gate),
            *_rows(scale),
            *_rows(shift),
            added,
            normed,
            moments,
            n,
            d,
            triton.next_power_of_2(d),
            tokens,
            num_warps=_warps(d),
        )
    return added, normed, moments


def gradients(
    towards: Tokens, branch: Branch | None, normed: Normed | None
) -> tuple[Tensor | None, ...]:
    """Of `x`, product, bias, gate, scale and shift, as far as they are there.

    `towards` is that of the sum but for its norm; without one it is that of `x`, not returned.
    """
    (b, n, d), tokens = towards.shape, _held(TOKENS_BACK, towards.shape[2])
    product, bias, gate = branch or (None, None, None)
    of, x, moments, scale = normed or (None, None, None, None)
    maps = towards, product, of, x
    towards, product, of, x = (None if each is None else each.contiguous() for each in maps)
    dx, dproduct = (None if each is None else torch.empty_like(each) for each in (x, product))
    dgate, dscale, dshift = (
        None if row is None else row.new_empty(b, 1, d) for row in (gate, scale, scale)
    )
    shares = max(min(PROGRAMS // b, triton.cdiv(n, tokens)), 1)
    kinds = 2 * ((branch is not None) + (normed is not None))
    sums = towards.new_empty(b, shares, kinds, d, dtype=torch.float32)
    biases = None if bias is None else sums.new_empty(b, d)
    with torch.cuda.device_of(towards):
        _back[(shares, b)](
            towards,
            of,
            x,
            moments,
            *_rows(scale),
            product,
            bias,
            *_rows(gate),
            dx,
            dproduct,
            sums,
            n,
            triton.cdiv(n, shares),
            d,
            triton.next_power_of_2(d),
            tokens,
            STAGES,
            num_warps=_warps(d),
        )
        _add_up[(triton.cdiv(d, COLUMNS), b)](
            sums, shares, bias, *_rows(gate), dscale, dshift, dgate, biases, d, COLUMNS, num_warps=1
        )
    dbias = None if bias is None else biases.sum(0).to(bias.dtype)
    return dx, dproduct, dbias, dgate, dscale, dshift


def _rows(rows: Rows | None) -> tuple[Rows | None, int]:
    """Rows that are dense, and how far apart they are."""
    rows = rows if rows is None or rows.stride(2) == 1 else rows.contiguous()
    return rows, 0 if rows is None else rows.stride(0)


def _held(tokens: int, d: int) -> int:
    """Of tokens of `d` channels, for a program that may hold `tokens` of 1024."""
    return max(min(tokens, tokens * 1024 // triton.next_power_of_2(d)), 1)


def _warps(d: int) -> int:
    """So many that a thread has eight channels of a token."""
    return min(max(triton.next_power_of_2(d) // 256, 1), 16)


@triton.jit
def _join(
    x,
    product,
    bias,
    gate,
    gate_stride,
    scale,
    scale_stride,
    shift,
    shift_stride,
    added,
    normed,
    moments,
    n,
    D: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    TOKENS: tl.constexpr,  # noqa: N803
):
    """A few tokens of an image."""
    image = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    own = tl.arange(0, BLOCK)[None, :]
    inside = own < D
    there = (row < n) & inside
    here = image * n * D + row * D + own
    value = tl.load(x + here, there, 0.0).to(tl.float32)
    if product is not None:
        opened = tl.load(gate + image * gate_stride + own, inside, 0.0).to(tl.float32)
        y = tl.load(product + here, there, 0.0).to(tl.float32)
        value += (y + tl.load(bias + own, inside, 0.0).to(tl.float32)) * opened
        value = value.to(added.dtype.element_ty)  # what is normalised is what is handed on
        tl.store(added + here, value, there)
        value = value.to(tl.float32)
    if normed is not None:
        gain = 1 + tl.load(scale + image * scale_stride + own, inside, 0.0).to(tl.float32)
        moved = tl.load(shift + image * shift_stride + own, inside, 0.0).to(tl.float32)
        mean = tl.sum(value, 1, keep_dims=True) / D
        value = tl.where(inside, value - mean, 0.0)
        inverse = 1 / tl.sqrt(tl.sum(value * value, 1, keep_dims=True) / D + _EPS)
        value = value * inverse * gain + moved
        tl.store(normed + here, value.to(normed.dtype.element_ty), there)
        token = image * n + row
        tl.store(moments + token, mean, row < n)
        tl.store(moments + tl.num_programs(1).to(tl.int64) * n + token, inverse, row < n)


@triton.jit
def _back(
    towards,
    of,
    x,
    moments,
    scale,
    scale_stride,
    product,
    bias,
    gate,
    gate_stride,
    dx,
    dproduct,
    sums,
    n,
    share,
    D: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    TOKENS: tl.constexpr,  # noqa: N803
    STAGES: tl.constexpr,  # noqa: N803
):
    """A share of an image's tokens."""
    image = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    own, inside = column[None, :], (column < D)[None, :]
    if of is not None:
        gain = 1 + tl.load(scale + image * scale_stride + own, inside, 0.0).to(tl.float32)
        scaled, shifted = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    if product is not None:
        opened = tl.load(gate + image * gate_stride + own, inside, 0.0).to(tl.float32)
        weighed, plain = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        moved = tl.load(bias + own, inside, 0.0).to(tl.float32)
    begin = tl.program_id(0) * share
    end = tl.minimum(begin + share, n)
    for start in tl.range(begin, end, TOKENS, num_stages=STAGES):
        row = start + tl.arange(0, TOKENS)
        there = (row < end)[:, None] & inside
        here = image * n * D + row[:, None] * D + own
        g = tl.load(towards + here, there, 0.0).to(tl.float32)
        if product is not None:
            y = tl.load(product + here, there, 0.0).to(tl.float32)
        if of is not None:
            token = image * n + row
            mean = tl.load(moments + token, row < end, 0.0)[:, None]
            others = tl.num_programs(1).to(tl.int64) * n
            inverse = tl.load(moments + others + token, row < end, 0.0)[:, None]
            value = tl.load(x + here, there, 0.0).to(tl.float32)
            if product is not None:  # the sum is made again, rounded as it was
                value = (value + (y + moved) * opened).to(x.dtype.element_ty).to(tl.float32)
            unit = (value - mean) * inverse
            slope = tl.load(of + here, there, 0.0).to(tl.float32)
            shifted += tl.sum(slope, 0)
            scaled += tl.sum(slope * unit, 0)
            slope *= gain
            lost, along = tl.reduce((slope, slope * unit), 1, _both, keep_dims=True)
            g += (slope - (lost + unit * along) / D) * inverse
            tl.store(dx + here, g.to(dx.dtype.element_ty), there)
        if product is not None:
            tl.store(dproduct + here, (g * opened).to(dproduct.dtype.element_ty), there)
            plain += tl.sum(g, 0)
            weighed += tl.sum(g * y, 0)
    kinds: tl.constexpr = 2 * ((of is not None) + (product is not None))
    write = sums + (image * tl.num_programs(0) + tl.program_id(0)) * kinds * D + column
    if of is not None:
        tl.store(write, scaled, column < D)
        tl.store(write + D, shifted, column < D)
        write += 2 * D
    if product is not None:
        tl.store(write, weighed, column < D)
        tl.store(write + D, plain, column < D)


@triton.jit
def _both(x, y, more_x, more_y):
    return x + more_x, y + more_y


@triton.jit
def _add_up(
    sums,
    shares,
    bias,
    gate,
    gate_stride,
    dscale,
    dshift,
    dgate,
    biases,
    D: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
):
    """Some columns of an image's sums; what the bias has of them is still to be summed."""
    image = tl.program_id(1).to(tl.int64)
    own = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside, here = own < D, image * D + own
    kinds: tl.constexpr = 2 * ((dscale is not None) + (dgate is not None))
    read = sums + image * shares * kinds * D + own
    if dscale is not None:
        made = _total(read, shares, kinds * D, inside, COLUMNS)
        tl.store(dscale + here, made.to(dscale.dtype.element_ty), inside)
        made = _total(read + D, shares, kinds * D, inside, COLUMNS)
        tl.store(dshift + here, made.to(dshift.dtype.element_ty), inside)
        read += 2 * D
    if dgate is not None:
        made = _total(read, shares, kinds * D, inside, COLUMNS)
        plain = _total(read + D, shares, kinds * D, inside, COLUMNS)
        made += plain * tl.load(bias + own, inside, 0.0).to(tl.float32)
        tl.store(dgate + here, made.to(dgate.dtype.element_ty), inside)
        opened = tl.load(gate + image * gate_stride + own, inside, 0.0).to(tl.float32)
        tl.store(biases + here, plain * opened, inside)


@triton.jit
def _total(read, shares, stride, inside, COLUMNS: tl.constexpr):  # noqa: N803
    total = tl.zeros([COLUMNS], tl.float32)
    for share in range(shares):
        total += tl.load(read + share * stride, inside, 0.0)
    return total
