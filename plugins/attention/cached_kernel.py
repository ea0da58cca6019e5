"""Attention over a cache of keys and values, as one Triton kernel: a few queries, all keys.

The one idea to hold: a program keeps a tile of one head's queries in registers, reads keys and
values once, from where they lie, and brings what it has summed to a new greatest score as it meets
one. Nothing is copied before, and what comes out lies as the next product reads it.

Imported only for tensors on a GPU: triton takes its time, and is not there on every platform.
"""

import math

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

import sandbox

FILL = 128
"""Programs that keep a GPU busy, about one a multiprocessor: below it, tiles get smaller."""
FEWEST, MOST = 16, 64
"""Queries of a tile: what a tensor core takes at least, and what registers hold."""

APPENDED = {torch.float16: 64, torch.bfloat16: 64, torch.float32: 32}
"""New tokens that a program holds: with more, it is quicker to write them to the cache before."""


def attend(
    q: Float[Tensor, "b heads n e"],
    k: Float[Tensor, "b heads p e"],
    v: Float[Tensor, "b heads p e"],
    scale: float,
) -> Float[Tensor, "b heads n e"]:
    """`softmax(scale q k^T) v` for e of 16, 32, 64 or 128; in memory it is `b n heads e`."""
    (b, heads, n, e), p = q.shape, k.shape[2]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = q.new_empty(b, n, heads, e)
    queries, keys = tiles(b * heads, n, p, e, q.dtype)
    across = triton.cdiv(n, queries)
    with torch.cuda.device_of(q):
        _attend[(b * heads * across,)](
            q,
            k,
            v,
            out,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            scale * math.log2(math.e),
            heads,
            n,
            p,
            across,
            e,
            queries,
            keys,
            p <= keys,
            **sandbox.overlapping(q.device),
            num_warps=4,
            num_stages=3,
        )
    return out.transpose(1, 2)


def append(
    qkv: Float[Tensor, "b n three_d"],
    past: Float[Tensor, "2 b heads l e"],
    start: int,
    scale: float,
    cosine: tuple[Float[Tensor, "1 heads 1 1"], float] | None,
) -> Float[Tensor, "b heads n e"]:
    """`attend` with new queries to all keys before them and their own, which go to the cache.

    As `CachedAttention.attend_appending` says it, for `APPENDED` tokens at most: each program reads
    all of them at once. Raises ValueError where they have no place in the cache.
    """
    (b, n, d), (_, _, heads, seq_len, e) = qkv.shape, past.shape
    fits = past.shape[:2] == (2, b) and d == 3 * heads * e and 0 <= start <= seq_len - n
    fits = fits and n <= APPENDED[qkv.dtype]
    if not fits or qkv.dtype != past.dtype or not past.is_contiguous():
        raise ValueError(
            f"{n} tokens from {start} on, {qkv.dtype} {tuple(qkv.shape)}, have no place in a cache "
            f"of {past.dtype} {tuple(past.shape)}"
        )
    log_scale, cap = cosine or (None, 0.0)
    out = qkv.new_empty(b, n, heads, e)
    queries, keys = tiles(b * heads, n, start + n, e, qkv.dtype)
    across, new = triton.cdiv(n, queries), max(triton.next_power_of_2(n), 16)
    keys = min(keys, max(triton.next_power_of_2(start), 32))
    with torch.cuda.device_of(qkv):
        _append[(b * heads * across,)](
            qkv.contiguous(),
            None if log_scale is None else log_scale.contiguous(),
            cap,
            past,
            past.stride(0),
            out,
            scale * math.log2(math.e),
            heads,
            n,
            start,
            seq_len,
            across,
            e,
            queries,
            new,
            keys,
            start <= keys,
            **sandbox.overlapping(qkv.device),
            num_warps=4,
            num_stages=3,
        )
    return out.transpose(1, 2)


def tiles(rows: int, n: int, p: int, e: int, dtype: torch.dtype) -> tuple[int, int]:
    """Queries and keys of a tile, for `rows` images times heads.

    Numbers of keys between the same two powers of two have the same: `auto` measures one of them.
    """
    full = dtype == torch.float32  # no tensor cores, and all factors of a product in registers
    queries = 32 if full else MOST
    while queries > FEWEST and -n % queries >= queries // 2:  # half of the last would be empty
        queries //= 2
    while queries > FEWEST and rows * triton.cdiv(n, queries) < FILL:
        queries //= 2
    most_keys = 128
    if full:
        most_keys = 32
    elif e > 64 or (p > 128 and queries > 32):
        most_keys = 64
    return queries, min(max(triton.next_power_of_2(p), 32), most_keys)


@triton.jit(do_not_specialize=["heads", "n", "p", "across"])  # one build for all that tiles alike
def _attend(
    q,
    k,
    v,
    out,
    q_image,
    q_head,
    q_turn,
    k_image,
    k_head,
    k_turn,
    v_image,
    v_head,
    v_turn,
    scale,
    heads,
    n,
    p,
    across,
    E: tl.constexpr,  # noqa: N803
    QUERIES: tl.constexpr,  # noqa: N803
    KEYS: tl.constexpr,  # noqa: N803
    ONCE: tl.constexpr,  # noqa: N803
    OVERLAPS: tl.constexpr,  # noqa: N803
):
    """A tile of one head's queries; `scale` is that of a power of two."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)  # tiles of one head are neighbours, and share its keys in the cache
    row, first = program // across, program % across * QUERIES
    image, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    queries, keys = tl.arange(0, QUERIES)[:, None], tl.arange(0, KEYS)[:, None]
    channels = tl.arange(0, E)[None, :]
    there, first = queries < n - first, first.to(tl.int64)
    q += image * q_image + head * q_head + first * q_turn
    k += image * k_image + head * k_head
    v += image * v_image + head * v_head
    k_own, v_own = keys * k_turn + channels, keys * v_turn + channels
    asked = tl.load(q + queries * q_turn + channels, there, 0.0)
    greatest = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    seen = tl.zeros([QUERIES, E], tl.float32)
    if ONCE:  # without a loop, queries, keys and values are on their way at the same time
        held, values = tl.load(k + k_own, keys < p, 0.0), tl.load(v + v_own, keys < p, 0.0)
        greatest, total, seen = _look(asked, held, values, p, scale, greatest, total, seen, KEYS)
    else:
        for start in range(0, p, KEYS):
            left = p - start
            held = tl.load(k + k_own, keys < left, 0.0)
            values = tl.load(v + v_own, keys < left, 0.0)
            greatest, total, seen = _look(
                asked, held, values, left, scale, greatest, total, seen, KEYS
            )
            k += KEYS * k_turn
            v += KEYS * v_turn
    write = out + ((image * n + first) * heads + head) * E + queries * (heads * E) + channels
    tl.store(write, seen / total[:, None], there)


@triton.jit
def _look(q, keys, values, left, scale, greatest, total, seen, KEYS: tl.constexpr):  # noqa: N803
    """The greatest score, the sum of weights and of weighted values, with one more tile of keys."""
    scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
    scores = tl.where(tl.arange(0, KEYS)[None, :] < left, scores, -float("inf"))
    now = tl.maximum(greatest, tl.max(scores, 1))
    fade = tl.exp2(greatest - now)
    weights = tl.exp2(scores - now[:, None])
    total = total * fade + tl.sum(weights, 1)
    seen = seen * fade[:, None]
    seen = tl.dot(weights.to(values.dtype), values, seen, input_precision="ieee")
    return now, total, seen


@triton.jit(do_not_specialize=["heads", "n", "start", "seq_len", "across"])
def _append(
    qkv,
    log_scale,
    cap,
    past,
    values_from,
    out,
    scale,
    heads,
    n,
    start,
    seq_len,
    across,
    E: tl.constexpr,  # noqa: N803
    QUERIES: tl.constexpr,  # noqa: N803
    NEW: tl.constexpr,  # noqa: N803
    KEYS: tl.constexpr,  # noqa: N803
    ONCE: tl.constexpr,  # noqa: N803
    OVERLAPS: tl.constexpr,  # noqa: N803
):
    """A tile of one head's new queries; the first tile also writes the head's keys and values."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    row, tile = program // across, program % across
    image, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    queries, keys = tl.arange(0, QUERIES)[:, None], tl.arange(0, KEYS)[:, None]
    new, channels = tl.arange(0, NEW)[:, None], tl.arange(0, E)[None, :]
    first, width = tile * QUERIES, heads * E
    qkv += (image * n * 3 * heads + head) * E + channels
    read = qkv + new * (3 * width)
    past += row.to(tl.int64) * seq_len * E
    earlier = past + keys * E + channels
    # All that the first tiles need is on its way at the same time.
    asked = tl.load(qkv + (first + queries) * (3 * width), queries < n - first, 0.0)
    held = tl.load(read + width, new < n, 0.0)
    values = tl.load(read + 2 * width, new < n, 0.0)
    if ONCE:
        old_held = tl.load(earlier, keys < start, 0.0)
        old_values = tl.load(earlier + values_from, keys < start, 0.0)
    if log_scale is not None:
        sharpness = tl.load(log_scale + head).to(tl.float32)
        sharpness = tl.exp(tl.where(sharpness > cap, cap, sharpness))
        asked = (_normalised(asked) * sharpness).to(values.dtype)
        held = _normalised(held).to(values.dtype)
    greatest = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    seen = tl.zeros([QUERIES, E], tl.float32)
    greatest, total, seen = _look(asked, held, values, n, scale, greatest, total, seen, NEW)
    if ONCE:
        greatest, total, seen = _look(
            asked, old_held, old_values, start, scale, greatest, total, seen, KEYS
        )
    else:
        for turn in range(0, start, KEYS):
            left = start - turn
            old_held = tl.load(earlier, keys < left, 0.0)
            old_values = tl.load(earlier + values_from, keys < left, 0.0)
            greatest, total, seen = _look(
                asked, old_held, old_values, left, scale, greatest, total, seen, KEYS
            )
            earlier += KEYS * E
    if tile == 0:
        write = past + (start + new) * E + channels
        tl.store(write, held, new < n)
        tl.store(write + values_from, values, new < n)
    write = out + ((image * n + first) * heads + head) * E + queries * width + channels
    tl.store(write, seen / total[:, None], queries < n - first)


@triton.jit
def _normalised(x):
    """Each row as a unit vector, as `F.normalize` has it: NaN stays, zeros stay."""
    x = x.to(tl.float32)
    norm = tl.sqrt(tl.sum(x * x, 1, keep_dims=True))
    return x / tl.where(norm < 1e-12, 1e-12, norm)
