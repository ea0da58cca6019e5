"""Attention under a mask of steps as a Triton kernel, and what its gradients' kernels share.

The one idea to hold: a tile of queries visits the keys up to the end that its last query sees, and
compares positions only from where its first query sees no more. So tiles of queries are laid from
the last token backwards: of the steps that see most, none is then cut into more than it must.

Imported only for tensors on a GPU: triton takes its time, and is not there on every platform.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from .plain import kept

Heads = Float[Tensor, "b heads n e"]
Rows = Float[Tensor, "b heads n"]
Tokens = Int[Tensor, " n"]

LOG2E = tl.constexpr(1.4426950408889634)
"""Scores are made those of powers of two, which GPUs have an instruction for."""


class Tile(NamedTuple):
    """What a program computes at a time, by how many warps, with how many loads under way."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None
    """The most of a thread, where one more program then fits beside it on a multiprocessor."""


class Tiles(NamedTuple):
    """Of the forward pass, of the queries' gradients, and of those of keys and values."""

    forward: Tile
    queries: Tile
    keys: Tile


NARROW = Tiles(Tile(64, 64, 4, 3), Tile(64, 64, 4, 2, 128), Tile(32, 64, 4, 3, 128))
WIDE = Tiles(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2))
FULL = Tiles(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2))


def tiles(e: int, dtype: torch.dtype) -> Tiles:
    """For heads of `e` channels."""
    if dtype == torch.float32:  # no tensor cores, and all factors of a product in registers
        return FULL
    return NARROW if e <= 64 else WIDE


def attend(
    q: Heads, k: Heads, v: Heads, step_lens: Sequence[int], scale: float
) -> tuple[Heads, Rows]:
    """`softmax(scale q k^T) v` under the mask, for e of 16, 32, 64 or 128; in memory `b n heads e`.

    And of each query log2(sum(exp(score))), float32, which the gradients are made with.
    """
    ends, _ = bounds(tuple(step_lens), q.device)
    return look(q, k, v, ends, scale, tiles(q.shape[-1], q.dtype).forward)


@kept
def bounds(step_lens: tuple[int, ...], device: torch.device) -> Any:
    """Where each token's step ends, which is the number of keys it sees, and where it starts."""
    lens = torch.tensor(step_lens)
    ends = torch.tensor(list(accumulate(step_lens)), dtype=torch.int32)
    return tuple(each.repeat_interleave(lens).to(device) for each in (ends, ends - lens.int()))


def look(
    q: Heads, k: Heads, v: Heads, ends: Tokens, scale: float, tile: Tile
) -> tuple[Heads, Rows]:
    """What `attend` gives."""
    b, heads, n, _ = q.shape
    out, sums = beside(q), q.new_empty(b, heads, n, dtype=torch.float32)
    run(_look, (q, k, v), (out, sums, ends), scale, tile.queries, tile)
    return out.transpose(1, 2), sums


def beside(q: Heads) -> Float[Tensor, "b n heads e"]:
    """Heads beside channels, as the products before and after have them."""
    b, heads, n, e = q.shape
    return q.new_empty(b, n, heads, e)


def run(
    kernel: Any, qkv: Sequence[Heads], others: Sequence[Tensor], scale: float, own: int, tile: Tile
) -> None:
    """A program for each `own` tokens of each head."""
    b, heads, n, e = qkv[0].shape
    qkv = [x if x.stride(-1) == 1 else x.contiguous() for x in qkv]
    strides = [stride for x in qkv for stride in x.stride()[:3]]
    across = triton.cdiv(n, own)
    with torch.cuda.device_of(qkv[0]):
        kernel[(b * heads * across,)](
            *qkv,
            *others,
            *strides,
            scale,
            heads,
            n,
            across,
            e,
            tile.queries,
            tile.keys,
            num_warps=tile.warps,
            num_stages=tile.stages,
            maxnreg=tile.registers,
        )


@triton.jit(do_not_specialize=["heads", "n", "across"])
def _look(
    q,
    k,
    v,
    out,
    sums,
    ends,
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
    """What a tile of one head's queries sees; the last tile, which sees most, comes first."""
    program = tl.program_id(0)  # tiles of one head are neighbours, and share its keys in the cache
    row, first = program // across, n - (program % across + 1) * QUERIES
    image, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    queries, keys, channels = tl.arange(0, QUERIES), tl.arange(0, KEYS), tl.arange(0, E)[None, :]
    there = queries >= -first  # the tile of the first tokens may begin before them
    end = tl.load(ends + first + queries, there, 1)
    whole = tl.load(ends + tl.maximum(first, 0)) // KEYS * KEYS  # all queries see all keys so far
    stop = tl.load(ends + first + QUERIES - 1)
    q += image * q_image + head * q_head + first.to(tl.int64) * q_turn
    k += image * k_image + head * k_head
    v += image * v_image + head * v_head
    k_own, v_own = keys[:, None] * k_turn + channels, keys[:, None] * v_turn + channels
    asked = rows(q + queries[:, None] * q_turn + channels, there, True)
    greatest = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    seen = tl.zeros([QUERIES, E], tl.float32)
    scale *= LOG2E
    for at in range(0, whole, KEYS):
        greatest, total, seen = _weigh(
            asked, k + k_own, v + v_own, at + keys, stop, end, scale, greatest, total, seen, False
        )
        k += KEYS * k_turn
        v += KEYS * v_turn
    for at in range(whole, stop, KEYS):
        greatest, total, seen = _weigh(
            asked, k + k_own, v + v_own, at + keys, stop, end, scale, greatest, total, seen, True
        )
        k += KEYS * k_turn
        v += KEYS * v_turn
    own = ((image * n + first) * heads + head) * E + queries[:, None] * (heads * E) + channels
    tl.store(out + own, seen / total[:, None], there[:, None])
    measured = row.to(tl.int64) * n + first + queries
    tl.store(sums + measured, greatest + tl.log2(total), there)


@triton.jit
def _weigh(
    asked,
    k,
    v,
    keys,
    stop,
    end,
    scale,
    greatest,
    total,
    seen,
    MASKED: tl.constexpr,  # noqa: N803
):
    """The greatest score, the sum of weights and of weighted values, with one more tile of keys."""
    near = rows(k, keys < stop, MASKED)
    values = rows(v, keys < stop, MASKED)
    scores = tl.dot(asked, tl.trans(near), input_precision="ieee") * scale
    if MASKED:
        scores = tl.where(keys[None, :] < end[:, None], scores, -float("inf"))
    now = tl.maximum(greatest, tl.max(scores, 1))  # finite: all queries see the first key
    fade = tl.exp2(greatest - now)
    weights = tl.exp2(scores - now[:, None])
    total = total * fade + tl.sum(weights, 1)
    seen = seen * fade[:, None]
    seen = tl.dot(weights.to(values.dtype), values, seen, input_precision="ieee")
    return now, total, seen


@triton.jit
def rows(x, there, MASKED: tl.constexpr):  # noqa: N803
    """Rows of a tile, zeros for those that are not there."""
    return tl.load(x, there[:, None], 0.0) if MASKED else tl.load(x)
