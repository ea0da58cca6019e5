"""From the product of queries, keys and values to where attention reads them, as one Triton kernel.

The one idea to hold: a token's numbers are read once, normalised in registers, and keys and values
are written straight to their place in the cache; torch would write them, and then copy them there.

Imported only for tokens on a GPU: triton takes its time, and is not there on every platform.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

import sandbox

from .blocks import MAX_LOG_SCALE

TILE = 512
"""About how many numbers of each kind a program holds: of a few heads of one token."""
_MAX_LOG_SCALE = tl.constexpr(MAX_LOG_SCALE)
_EPS = tl.constexpr(1e-12)


def place(
    qkv: Float[Tensor, "b n three_d"],
    log_scale: Float[Tensor, "1 heads 1 1"] | None,
    past: Float[Tensor, "2 b heads l e"],
    start: int,
) -> Float[Tensor, "b heads n e"]:
    """The queries; keys and values are written to `past`, from token `start` on.

    With `log_scale` queries and keys are normalised as `SelfAttention.project` does it.
    """
    (b, n, _), (_, _, heads, seq_len, e) = qkv.shape, past.shape
    fits = past.shape[:2] == (2, b) and qkv.shape[2] == 3 * heads * e and start + n <= seq_len
    if not fits or start < 0 or qkv.dtype != past.dtype or not past.is_contiguous():
        raise ValueError(
            f"{n} tokens from {start} on, {qkv.dtype} {tuple(qkv.shape)}, have no place in a cache "
            f"of {past.dtype} {tuple(past.shape)}"
        )
    q = qkv.new_empty(b, n, heads, e)
    held = min(max(TILE // e, 1), triton.next_power_of_2(heads))
    with torch.cuda.device_of(qkv):
        _place[(b * n, triton.cdiv(heads, held))](
            qkv.contiguous(),
            None if log_scale is None else log_scale.contiguous(),
            q,
            past,
            b,
            n,
            start,
            seq_len,
            heads,
            e,
            held,
            **sandbox.overlapping(qkv.device),
            num_warps=1,
        )
    return q.transpose(1, 2)


@triton.jit(do_not_specialize=["batch", "n", "start", "seq_len"])  # one build for all steps
def _place(
    qkv,
    log_scale,
    queries,
    past,
    batch,
    n,
    start,
    seq_len,
    HEADS: tl.constexpr,  # noqa: N803
    E: tl.constexpr,  # noqa: N803
    HELD: tl.constexpr,  # noqa: N803
    OVERLAPS: tl.constexpr,  # noqa: N803
):
    """A few heads of one token."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0)
    image, turn = (token // n).to(tl.int64), start + token % n
    token = token.to(tl.int64)
    heads = tl.program_id(1) * HELD + tl.arange(0, HELD)
    head, channel = heads[:, None], tl.arange(0, E)[None, :]
    there = head < HEADS
    own = head * E + channel
    read = qkv + token * (3 * HEADS * E) + own
    q = tl.load(read, there, 0.0)
    k = tl.load(read + HEADS * E, there, 0.0)
    v = tl.load(read + 2 * HEADS * E, there, 0.0)
    if log_scale is not None:
        scale = tl.load(log_scale + heads, heads < HEADS, 0.0).to(tl.float32)
        sharpness = tl.exp(tl.where(scale > _MAX_LOG_SCALE, _MAX_LOG_SCALE, scale))
        q = (_normalised(q) * sharpness[:, None]).to(v.dtype)
        k = _normalised(k).to(v.dtype)
    tl.store(queries + token * (HEADS * E) + own, q, there)
    write = past + ((image * HEADS + head) * seq_len + turn) * E + channel
    tl.store(write, k, there)
    tl.store(write + batch.to(tl.int64) * HEADS * seq_len * E, v, there)


@triton.jit
def _normalised(x):
    """Each row as a unit vector, as `F.normalize` has it: NaN stays, zeros stay."""
    x = x.to(tl.float32)
    norm = tl.sqrt(tl.sum(x * x, 1, keep_dims=True))
    return x / tl.where(norm < _EPS, _EPS, norm)
