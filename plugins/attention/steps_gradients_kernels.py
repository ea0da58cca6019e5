"""The Triton kernels of `steps_gradients`: one for queries, and one for keys and values.

Imported only for tensors on a GPU: triton takes its time, and is not there on every platform.
"""

import triton
import triton.language as tl

from .steps_kernel import LOG2E, rows


@triton.jit(do_not_specialize=["heads", "n", "across"])
def pull_queries(
    q,
    k,
    v,
    dout,
    out,
    sums,
    ends,
    dq,
    deltas,
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
    across,
    E: tl.constexpr,  # noqa: N803
    QUERIES: tl.constexpr,  # noqa: N803
    KEYS: tl.constexpr,  # noqa: N803
):
    """The gradients of a tile of one head's queries, from the keys that `_look` met."""
    program = tl.program_id(0)
    row, first = program // across, n - (program % across + 1) * QUERIES
    image, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    queries, keys, channels = tl.arange(0, QUERIES), tl.arange(0, KEYS), tl.arange(0, E)[None, :]
    there = queries >= -first
    end = tl.load(ends + first + queries, there, 1)
    whole = tl.load(ends + tl.maximum(first, 0)) // KEYS * KEYS
    stop = tl.load(ends + first + QUERIES - 1)
    q += image * q_image + head * q_head + first.to(tl.int64) * q_turn
    k += image * k_image + head * k_head
    v += image * v_image + head * v_head
    k_own, v_own = keys[:, None] * k_turn + channels, keys[:, None] * v_turn + channels
    own, place = queries[:, None] * (heads * E) + channels, ((image * n + first) * heads + head) * E
    asked = rows(q + queries[:, None] * q_turn + channels, there, True)
    pull = rows(dout + place + own, there, True)
    seen = rows(out + place + own, there, True)
    delta = tl.sum(seen.to(tl.float32) * pull.to(tl.float32), 1)
    measured = row.to(tl.int64) * n + first + queries
    tl.store(deltas + measured, delta, there)
    known = tl.load(sums + measured, there, 0.0)
    slope = tl.zeros([QUERIES, E], tl.float32)
    for at in range(0, whole, KEYS):
        slope = _pulled(
            asked,
            pull,
            k + k_own,
            v + v_own,
            at + keys,
            stop,
            end,
            known,
            delta,
            scale,
            slope,
            False,
        )
        k += KEYS * k_turn
        v += KEYS * v_turn
    for at in range(whole, stop, KEYS):
        slope = _pulled(
            asked,
            pull,
            k + k_own,
            v + v_own,
            at + keys,
            stop,
            end,
            known,
            delta,
            scale,
            slope,
            True,
        )
        k += KEYS * k_turn
        v += KEYS * v_turn
    tl.store(dq + place + own, slope * scale, there[:, None])


@triton.jit
def _pulled(
    asked,
    pull,
    k,
    v,
    keys,
    stop,
    end,
    known,
    delta,
    scale,
    slope,
    MASKED: tl.constexpr,  # noqa: N803
):
    """The queries' gradients, but for the scale, with one more tile of keys."""
    near = rows(k, keys < stop, MASKED)
    values = rows(v, keys < stop, MASKED)
    scores = tl.dot(asked, tl.trans(near), input_precision="ieee") * (scale * LOG2E)
    weights = tl.exp2(scores - known[:, None])
    if MASKED:
        weights = tl.where(keys[None, :] < end[:, None], weights, 0.0)
    grown = weights * (tl.dot(pull, tl.trans(values), input_precision="ieee") - delta[:, None])
    return tl.dot(grown.to(near.dtype), near, slope, input_precision="ieee")


@triton.jit(do_not_specialize=["heads", "n", "across"])
def pull_keys(
    q,
    k,
    v,
    dout,
    sums,
    deltas,
    starts,
    dk,
    dv,
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
    across,
    E: tl.constexpr,  # noqa: N803
    QUERIES: tl.constexpr,  # noqa: N803
    KEYS: tl.constexpr,  # noqa: N803
):
    """The gradients of a tile of one head's keys and values; the first, seen by most, comes first.

    Tiles of queries end with the last token; the first of them may begin before all that see these
    keys, or even before the first token.
    """
    program = tl.program_id(0)
    row, first = program // across, program % across * KEYS
    image, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    queries, keys, channels = tl.arange(0, QUERIES), tl.arange(0, KEYS), tl.arange(0, E)[None, :]
    there = keys < n - first
    start = tl.load(starts + first + keys, there, n)
    begin = n - tl.cdiv(n - tl.load(starts + first), QUERIES) * QUERIES
    last = tl.minimum(first + KEYS, n) - 1
    whole = n - (n - tl.load(starts + last)) // QUERIES * QUERIES  # from here on all see all keys
    k += image * k_image + head * k_head + first.to(tl.int64) * k_turn
    v += image * v_image + head * v_head + first.to(tl.int64) * v_turn
    near = rows(k + keys[:, None] * k_turn + channels, there, True)
    values = rows(v + keys[:, None] * v_turn + channels, there, True)
    q += image * q_image + head * q_head + begin.to(tl.int64) * q_turn
    dout += ((image * n + begin) * heads + head) * E
    q_own, own = queries[:, None] * q_turn + channels, queries[:, None] * (heads * E) + channels
    sums += row.to(tl.int64) * n
    deltas += row.to(tl.int64) * n
    key_slope = tl.zeros([KEYS, E], tl.float32)
    value_slope = tl.zeros([KEYS, E], tl.float32)
    for at in range(begin, whole, QUERIES):
        key_slope, value_slope = _pulling(
            near,
            values,
            q + q_own,
            dout + own,
            sums,
            deltas,
            at + queries,
            start,
            scale,
            key_slope,
            value_slope,
            True,
        )
        q += QUERIES * q_turn
        dout += QUERIES * heads * E
    for at in range(whole, n, QUERIES):
        key_slope, value_slope = _pulling(
            near,
            values,
            q + q_own,
            dout + own,
            sums,
            deltas,
            at + queries,
            start,
            scale,
            key_slope,
            value_slope,
            False,
        )
        q += QUERIES * q_turn
        dout += QUERIES * heads * E
    own, place = keys[:, None] * (heads * E) + channels, ((image * n + first) * heads + head) * E
    tl.store(dk + place + own, key_slope * scale, there[:, None])
    tl.store(dv + place + own, value_slope, there[:, None])


@triton.jit
def _pulling(
    near,
    values,
    q,
    dout,
    sums,
    deltas,
    queries,
    start,
    scale,
    key_slope,
    value_slope,
    MASKED: tl.constexpr,  # noqa: N803
):
    """The gradients of keys, but for the scale, and of values, with one more tile of queries."""
    asked = rows(q, queries >= 0, MASKED)
    pull = rows(dout, queries >= 0, MASKED)
    if MASKED:
        known = tl.load(sums + queries, queries >= 0, 0.0)
        delta = tl.load(deltas + queries, queries >= 0, 0.0)
    else:
        known = tl.load(sums + queries)
        delta = tl.load(deltas + queries)
    scores = tl.dot(near, tl.trans(asked), input_precision="ieee") * (scale * LOG2E)
    weights = tl.exp2(scores - known[None, :])
    if MASKED:
        weights = tl.where(queries[None, :] >= start[:, None], weights, 0.0)
    value_slope = tl.dot(weights.to(pull.dtype), pull, value_slope, input_precision="ieee")
    grown = weights * (tl.dot(values, tl.trans(pull), input_precision="ieee") - delta[None, :])
    key_slope = tl.dot(grown.to(asked.dtype), asked, key_slope, input_precision="ieee")
    return key_slope, value_slope
