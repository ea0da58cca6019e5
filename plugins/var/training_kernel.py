"""Parting the product of queries, keys and values in training, and back, as two Triton kernels.

The one idea to hold: each number is read once and written once, in both directions. On the way back
a program goes down a share of the tokens, so that what is summed over them (the gradients of bias
and log scales) stays in registers; the shares' sums are added by torch: always in the same order.

Imported only for tokens on a GPU: triton takes its time, and is not there on every platform.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from .kernel import _EPS, _MAX_LOG_SCALE

TILE = 1024
"""About how many numbers of each kind a program holds at once: of a few heads of one token."""
STAGES = 4
"""Of the way back: all but one are of tokens that are still being read."""
PROGRAMS = 528
"""That share tokens and heads on the way back, at most: four for each of 132 processors."""

Heads = Float[Tensor, "b heads n e"]


def part(
    product: Float[Tensor, "b n three_d"],
    bias: Float[Tensor, " three_d"],
    log_scale: Float[Tensor, "1 heads 1 1"],
) -> tuple[Heads, Heads, Heads, Float[Tensor, "2 b n heads"]]:
    """Queries, keys, values, of a sum made in float32, and the norms that the first two had there.

    Norms are float32. Raises ValueError where heads are not of a power of two of channels.
    """
    (b, n, three_d), heads = product.shape, log_scale.shape[1]
    e = three_d // (3 * heads)
    if not e or e & (e - 1) or three_d != 3 * heads * e:
        raise ValueError(f"{three_d} numbers a token are not {heads} heads of a power of two each")
    q, k, v = (product.new_empty(b, n, heads, e) for _ in range(3))
    norms, held = product.new_empty(2, b, n, heads, dtype=torch.float32), _held(heads, e)
    with torch.cuda.device_of(product):
        _part[(b * n, triton.cdiv(heads, held))](
            product.contiguous(),
            bias.contiguous(),
            log_scale.contiguous(),
            q,
            k,
            v,
            norms,
            heads,
            e,
            held,
            num_warps=_warps(held * e),
        )
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), norms


def gather(
    dq: Heads,
    dk: Heads,
    dv: Heads,
    q: Heads,
    k: Heads,
    norms: Float[Tensor, "2 b n heads"],
    log_scale: Float[Tensor, "1 heads 1 1"],
) -> tuple[Float[Tensor, "b n three_d"], Float[Tensor, " three_d"], Float[Tensor, "1 heads 1 1"]]:
    """The gradients of `part`'s arguments, from those of what it returned, and from that itself.

    That of the bias is float32. The directions come from the rounded `q` and `k`. What does not lie
    in memory as `part` lays it is copied first; the gradients of most kernels lie as what they are
    the gradients of.
    """
    b, heads, n, e = q.shape
    held = _held(heads, e)
    across = triton.cdiv(heads, held)
    share = max(triton.cdiv(b * n, max(PROGRAMS // across, 1)), 1)
    shares = triton.cdiv(b * n, share)
    dproduct = q.new_empty(b, n, 3 * heads * e)
    biases, slopes = norms.new_empty(shares, 3 * heads * e), norms.new_empty(shares, heads)
    with torch.cuda.device_of(q):
        _gather[(shares, across)](
            *(x.transpose(1, 2).contiguous() for x in (dq, dk, dv, q, k)),
            norms.contiguous(),
            log_scale.contiguous(),
            dproduct,
            biases,
            slopes,
            b * n,
            share,
            heads,
            e,
            held,
            STAGES,
            num_warps=_warps(held * e),
        )
    return dproduct, biases.sum(0), slopes.sum(0).view(1, heads, 1, 1).to(log_scale.dtype)


def _held(heads: int, e: int) -> int:
    """Heads a program."""
    return min(max(TILE // e, 1), triton.next_power_of_2(heads))


def _warps(numbers: int) -> int:
    """So many that a thread has eight numbers of each kind."""
    return max(numbers // 256, 1)


@triton.jit
def _part(
    product,
    bias,
    log_scale,
    queries,
    keys,
    values,
    norms,
    HEADS: tl.constexpr,  # noqa: N803
    E: tl.constexpr,  # noqa: N803
    HELD: tl.constexpr,  # noqa: N803
):
    """A few heads of one token."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HELD + tl.arange(0, HELD)
    head, channel = heads[:, None], tl.arange(0, E)[None, :]
    there = head < HEADS
    own = head * E + channel
    read, write = product + token * (3 * HEADS * E) + own, token * (HEADS * E) + own
    measure = norms + token * HEADS + head
    q = tl.load(read, there, 0.0).to(tl.float32)
    k = tl.load(read + HEADS * E, there, 0.0).to(tl.float32)
    v = tl.load(read + 2 * HEADS * E, there, 0.0).to(tl.float32)
    q += tl.load(bias + own, there, 0.0).to(tl.float32)
    k += tl.load(bias + HEADS * E + own, there, 0.0).to(tl.float32)
    v += tl.load(bias + 2 * HEADS * E + own, there, 0.0).to(tl.float32)
    tl.store(values + write, v.to(values.dtype.element_ty), there)
    scale = tl.load(log_scale + head, there, 0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(q * q, 1, keep_dims=True))
    q *= _inverse(norm) * _sharpness(scale)
    tl.store(queries + write, q.to(queries.dtype.element_ty), there)
    tl.store(measure, norm, there)
    norm = tl.sqrt(tl.sum(k * k, 1, keep_dims=True))
    k *= _inverse(norm)
    tl.store(keys + write, k.to(keys.dtype.element_ty), there)
    tl.store(measure + tl.num_programs(0).to(tl.int64) * HEADS, norm, there)


@triton.jit
def _gather(
    dq,
    dk,
    dv,
    queries,
    keys,
    norms,
    log_scale,
    dproduct,
    biases,
    slopes,
    tokens,
    share,
    HEADS: tl.constexpr,  # noqa: N803
    E: tl.constexpr,  # noqa: N803
    HELD: tl.constexpr,  # noqa: N803
    STAGES: tl.constexpr,  # noqa: N803
):
    """A few heads of a share of the tokens."""
    heads = tl.program_id(1) * HELD + tl.arange(0, HELD)
    head, channel = heads[:, None], tl.arange(0, E)[None, :]
    there = head < HEADS
    own = head * E + channel
    scale = tl.load(log_scale + head, there, 0.0).to(tl.float32)
    sharpness = _sharpness(scale)
    bluntness = 1 / sharpness
    of_q = tl.zeros([HELD, E], tl.float32)
    of_k = tl.zeros([HELD, E], tl.float32)
    of_v = tl.zeros([HELD, E], tl.float32)
    slope = tl.zeros([HELD, 1], tl.float32)
    begin = tl.program_id(0).to(tl.int64) * share
    end = tl.minimum(begin + share, tokens)
    for token in tl.range(begin, end, num_stages=STAGES):
        read, write = token * (HEADS * E) + own, dproduct + token * (3 * HEADS * E) + own
        measure = norms + token * HEADS + head
        v = tl.load(dv + read, there, 0.0)
        tl.store(write + 2 * HEADS * E, v, there)
        of_v += v.to(tl.float32)
        g = tl.load(dq + read, there, 0.0).to(tl.float32)
        x = tl.load(queries + read, there, 0.0).to(tl.float32)
        along = tl.sum(g * x, 1, keep_dims=True)
        slope += along  # of the scale: sharpness is its own derivative
        g = _back(g * sharpness, x * bluntness, along, tl.load(measure, there, 1.0))
        tl.store(write, g.to(v.dtype), there)
        of_q += g
        g = tl.load(dk + read, there, 0.0).to(tl.float32)
        x = tl.load(keys + read, there, 0.0).to(tl.float32)
        along = tl.sum(g * x, 1, keep_dims=True)
        g = _back(g, x, along, tl.load(measure + tokens * HEADS, there, 1.0))
        tl.store(write + HEADS * E, g.to(v.dtype), there)
        of_k += g
    slope = tl.where(scale > _MAX_LOG_SCALE, 0.0, slope)
    tl.store(slopes + tl.program_id(0) * HEADS + head, slope, there)
    write = biases + tl.program_id(0) * (3 * HEADS * E) + own
    tl.store(write, of_q, there)
    tl.store(write + HEADS * E, of_k, there)
    tl.store(write + 2 * HEADS * E, of_v, there)


@triton.jit
def _sharpness(scale):
    return tl.exp(tl.where(scale > _MAX_LOG_SCALE, _MAX_LOG_SCALE, scale))


@triton.jit
def _inverse(norm):
    """What makes unit vectors of those with a `norm`, as `F.normalize` has it: NaN, zeros stay."""
    return 1 / tl.where(norm < _EPS, _EPS, norm)


@triton.jit
def _back(g, x, along, norm):
    """What a gradient `g` of unit vectors `x` is one of before they were normalised.

    What grows along `x`, its product with `g`, is lost in the norm, but for norms so small that
    another took their place.
    """
    return (g - x * tl.where(norm < _EPS, 0.0, along)) * _inverse(norm)
