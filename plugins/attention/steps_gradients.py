"""The gradients of attention under a mask of steps, which two Triton kernels compute.

The one idea to hold: whoever owns a tile sums it alone, in registers: once for queries, over the
keys that they see, and once for keys and values, over the queries that see them. Weights are
computed twice for that; but there are no atomics, and the same digits every time.

Imported only for tensors on a GPU: triton takes its time, and is not there on every platform.
"""

from collections.abc import Sequence

import torch

from . import steps_gradients_kernels as kernels
from .steps_kernel import Heads, Rows, Tile, Tokens, beside, bounds, run, tiles


def gradients(
    dout: Heads,
    q: Heads,
    k: Heads,
    v: Heads,
    out: Heads,
    sums: Rows,
    step_lens: Sequence[int],
    scale: float,
) -> tuple[Heads, Heads, Heads]:
    """Of queries, keys and values, from that of `attend`'s output; in memory `b n heads e`."""
    (ends, starts), own = bounds(tuple(step_lens), q.device), tiles(q.shape[-1], q.dtype)
    dq, deltas = pull_queries(dout, q, k, v, out, sums, ends, scale, own.queries)
    return dq, *pull_keys(dout, q, k, v, sums, deltas, starts, scale, own.keys)


def pull_queries(
    dout: Heads,
    q: Heads,
    k: Heads,
    v: Heads,
    out: Heads,
    sums: Rows,
    ends: Tokens,
    scale: float,
    tile: Tile,
) -> tuple[Heads, Rows]:
    """The gradients of queries, and the products of outputs and their gradients, float32."""
    dq, deltas = beside(q), torch.empty_like(sums)
    dout, out = (x.transpose(1, 2).contiguous() for x in (dout, out))
    others = dout, out, sums, ends, dq, deltas
    run(kernels.pull_queries, (q, k, v), others, scale, tile.queries, tile)
    return dq.transpose(1, 2), deltas


def pull_keys(
    dout: Heads,
    q: Heads,
    k: Heads,
    v: Heads,
    sums: Rows,
    deltas: Rows,
    starts: Tokens,
    scale: float,
    tile: Tile,
) -> tuple[Heads, Heads]:
    """The gradients of keys and values."""
    dk, dv = beside(q), beside(q)
    others = dout.transpose(1, 2).contiguous(), sums, deltas, starts, dk, dv
    run(kernels.pull_keys, (q, k, v), others, scale, tile.keys, tile)
    return dk.transpose(1, 2), dv.transpose(1, 2)
