"""Parting the product of queries, keys and values in training, and back, as two Triton kernels.

The one idea to hold: each number is read once and written once, in both directions. What is left to
sum over tokens (the gradient of the log scales) is written out, and summed by torch: always in the
same order.

Imported only for tokens on a GPU: triton takes its time, and is not there on every platform.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from .kernel import _EPS, _MAX_LOG_SCALE, TILE

Heads = Float[Tensor, "b heads n e"]


def part(
    qkv: Float[Tensor, "b n three_d"], log_scale: Float[Tensor, "1 heads 1 1"]
) -> tuple[Heads, Heads, Heads, Float[Tensor, "2 b n heads"]]:
    """Queries, keys, values, and the norms that queries and keys had, float32.

    Raises ValueError where heads are not of a power of two of channels.
    """
    (b, n, three_d), heads = qkv.shape, log_scale.shape[1]
    e = three_d // (3 * heads)
    if not e or e & (e - 1) or three_d != 3 * heads * e:
        raise ValueError(f"{three_d} numbers a token are not {heads} heads of a power of two each")
    q, k, v = (qkv.new_empty(b, n, heads, e) for _ in range(3))
    norms = qkv.new_empty(2, b, n, heads, dtype=torch.float32)
    with torch.cuda.device_of(qkv):
        _part[_grid(b * n, heads, e)](
            qkv.contiguous(),
            log_scale.contiguous(),
            q,
            k,
            v,
            norms,
            heads,
            e,
            _held(heads, e),
            num_warps=1,
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
) -> tuple[Float[Tensor, "b n three_d"], Float[Tensor, "1 heads 1 1"]]:
    """The gradients of `part`'s arguments, from those of what it returned, and from that itself.

    The directions come from the rounded `q` and `k`. What does not lie in memory as `part` lays it
    is copied first; the gradients of most kernels lie as what they are the gradients of.
    """
    b, heads, n, e = q.shape
    dqkv = q.new_empty(b, n, 3 * heads * e)
    slopes = norms.new_empty(b * n, heads)
    with torch.cuda.device_of(q):
        _gather[_grid(b * n, heads, e)](
            *(x.transpose(1, 2).contiguous() for x in (dq, dk, dv, q, k)),
            norms.contiguous(),
            log_scale.contiguous(),
            dqkv,
            slopes,
            heads,
            e,
            _held(heads, e),
            num_warps=1,
        )
    return dqkv, slopes.sum(0).view(1, heads, 1, 1).to(log_scale.dtype)


def _held(heads: int, e: int) -> int:
    """Heads a program."""
    return min(max(TILE // e, 1), triton.next_power_of_2(heads))


def _grid(tokens: int, heads: int, e: int) -> tuple[int, int]:
    return tokens, triton.cdiv(heads, _held(heads, e))


@triton.jit
def _part(
    qkv,
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
    read, write = qkv + token * (3 * HEADS * E) + own, token * (HEADS * E) + own
    measure = norms + token * HEADS + head
    q = tl.load(read, there, 0.0)
    k = tl.load(read + HEADS * E, there, 0.0)
    v = tl.load(read + 2 * HEADS * E, there, 0.0)
    tl.store(values + write, v, there)
    scale = tl.load(log_scale + head, there, 0.0).to(tl.float32)
    x, norm = _normalised(q)
    tl.store(queries + write, (x * _sharpness(scale)).to(v.dtype), there)
    tl.store(measure, norm, there)
    x, norm = _normalised(k)
    tl.store(keys + write, x.to(v.dtype), there)
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
    dqkv,
    slopes,
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
    read, write = token * (HEADS * E) + own, dqkv + token * (3 * HEADS * E) + own
    measure = norms + token * HEADS + head
    v = tl.load(dv + read, there, 0.0)
    tl.store(write + 2 * HEADS * E, v, there)
    scale = tl.load(log_scale + head, there, 0.0).to(tl.float32)
    sharpness = _sharpness(scale)
    g = tl.load(dq + read, there, 0.0).to(tl.float32)
    x = tl.load(queries + read, there, 0.0).to(tl.float32)
    slope = tl.sum(g * x, 1, keep_dims=True)  # of the scale: sharpness is its own derivative
    tl.store(slopes + token * HEADS + head, tl.where(scale > _MAX_LOG_SCALE, 0.0, slope), there)
    norm = tl.load(measure, there, 1.0)
    tl.store(write, _back(g * sharpness, x / sharpness, norm).to(v.dtype), there)
    g = tl.load(dk + read, there, 0.0).to(tl.float32)
    x = tl.load(keys + read, there, 0.0).to(tl.float32)
    norm = tl.load(measure + tl.num_programs(0).to(tl.int64) * HEADS, there, 1.0)
    tl.store(write + HEADS * E, _back(g, x, norm).to(v.dtype), there)


@triton.jit
def _sharpness(scale):
    return tl.exp(tl.where(scale > _MAX_LOG_SCALE, _MAX_LOG_SCALE, scale))


@triton.jit
def _normalised(x):
    """Each row as a unit vector, as `F.normalize` has it (NaN stays, zeros stay), and its norm."""
    x = x.to(tl.float32)
    norm = tl.sqrt(tl.sum(x * x, 1, keep_dims=True))
    return x / tl.where(norm < _EPS, _EPS, norm), norm


@triton.jit
def _back(g, x, norm):
    """What a gradient `g` of unit vectors `x` is one of before they were normalised.

    What grows along `x` is lost in the norm, but for norms so small that another took their place.
    """
    along = x * tl.sum(g * x, 1, keep_dims=True)
    return tl.where(norm < _EPS, g / _EPS, (g - along) / norm)
