"""Top-k and top-p as one Triton kernel: a row of logits is read once and stays in registers.

The one idea to hold: float32 is ordered as its bits are, as soon as those of negative numbers and
the sign are flipped. So the least logit to keep is found bit by bit from the highest that is open,
with one sum over the row for each, until it is clear which ids stay: about 13 sums for top-k and as
many for top-p, of 32. They are of whole numbers, so it keeps what the search in torch keeps.

Imported only for logits on a GPU: triton takes its time, and is not there on every platform.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from triton.language.extra import libdevice

from .likeliest import MASS

MANY = 1024
"""Rows that keep a GPU busy, whatever each takes."""
LONGEST = 2**14
"""Ids of a row: more would not fit in registers."""
_MASS = tl.constexpr(float(MASS))


def narrow(
    logits: Float[Tensor, "*b v"],
    top_k: int,
    top_p: float,
    masses: Int[Tensor, "*b v"] | None = None,
) -> Float[Tensor, "*b v"]:
    """Float32 logits with -inf at every id that may not be drawn; 0 and 1 are off.

    `masses` are what the ids count for top-p, before top-k; the kernel finds them by itself.
    """
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    return _launch(logits, masses, None, out, top_k, top_p)


def draw(
    logits: Float[Tensor, "*b v"],
    noise: Float[Tensor, "*b v"],
    top_k: int,
    top_p: float,
    masses: Int[Tensor, "*b v"] | None = None,
) -> Int[Tensor, "*b"]:
    """Of the ids that `narrow` keeps, the one with the greatest probability / noise."""
    out = torch.empty(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return _launch(logits, masses, noise, out, top_k, top_p)


def _launch(
    logits: Tensor,
    masses: Tensor | None,
    noise: Tensor | None,
    out: Tensor,
    top_k: int,
    top_p: float,
) -> Tensor:
    logits, v = logits.contiguous(), logits.shape[-1]
    block, rows = max(32, triton.next_power_of_2(v)), logits.numel() // v
    held = 1024 if rows < MANY else 2048  # numbers of a warp: fewer warps wait less for each other
    with torch.cuda.device_of(logits):
        _rows[(rows,)](
            logits,
            masses if masses is None else masses.contiguous(),
            noise if noise is None else noise.contiguous(),
            out,
            v,
            min(top_k, v) or v,
            top_p,
            block,
            num_warps=min(max(block // held, 1), 16),
        )
    return out


@triton.jit
def _rows(
    logits,
    masses,
    noise,
    out,
    V: tl.constexpr,  # noqa: N803
    TOP_K: tl.constexpr,  # noqa: N803
    TOP_P: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    """One row: its narrowed logits or, with noise, the id that wins the race."""
    row = tl.program_id(0).to(tl.int64)
    ids = tl.arange(0, BLOCK)
    kept = ids < V
    here = row * V + ids
    x = tl.load(logits + here, kept, -float("inf"))
    greatest = tl.max(x, 0)
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(bits == -2147483648, 0, bits)  # -0.0 counts as 0.0
    bits = (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)
    bits = tl.where(kept, bits, 0)  # less than what any logit has
    last = tl.max(bits, 0)
    least = tl.full([], 0, tl.uint32)
    number = tl.full([], V, tl.int32)
    if TOP_K < V:
        least, number = _least(bits, None, TOP_K, least, number, last, TOP_K)
    if TOP_P < 1:
        kept &= bits >= least  # all that reaches a trial is kept by top-k, since that is greater
        if masses is None:  # bit by bit what `_masses` finds, hence not the faster `tl.exp`
            counts = (libdevice.exp(x - greatest) * _MASS).to(tl.int64)
        else:
            counts = tl.load(masses + here, ids < V, 0)
        counts = tl.where(kept, counts, 0)
        enough = tl.sum(counts, 0).to(tl.float64) * tl.full([], TOP_P, tl.float64)
        least, number = _least(bits, counts, enough, least, number, last, 1)
    kept &= bits >= least
    if noise is None:
        tl.store(out + here, tl.where(kept, x, -float("inf")), ids < V)
    else:
        race = tl.where(kept, tl.exp(x - greatest), 0.0) / tl.load(noise + here, ids < V, 1.0)
        tl.store(out + row, tl.minimum(tl.argmax(race, 0), V - 1))  # NaN, too, gives an id


@triton.jit
def _least(bits, counts, enough, first, number, last, FEWEST: tl.constexpr):  # noqa: N803
    """Bits that just those ids reach that are kept, and how many they are.

    Kept is what reaches the greatest bits from `first`, which `number` ids reach, to `last` such
    that ids that reach them count `enough` together, each 1 without `counts`; never fewer than
    `FEWEST`.
    """
    beyond = tl.full([], 0, tl.int32)
    # Of ids that reach `first`, `beyond` are greater than `last`, which is not enough: where one
    # more is left, that one is kept; where `FEWEST` are, all are.
    while (first < last) & (number > FEWEST) & (number - beyond > 1):
        below = first ^ last
        below |= below >> 1
        below |= below >> 2
        below |= below >> 4
        below |= below >> 8
        below |= below >> 16
        below = below >> 1  # all bits below the highest in which the two differ
        trial = (last | below) ^ below
        reached = (bits >= trial).to(tl.int32)
        if counts is None:
            reaching = tl.sum(reached, 0)
            suffices = reaching >= enough
        else:
            mass, reaching = tl.reduce((tl.where(reached > 0, counts, 0), reached), 0, _add)
            suffices = mass.to(tl.float64) >= enough
        first = tl.where(suffices, trial, first)
        number = tl.where(suffices, reaching, number)
        last = tl.where(suffices, last, trial - 1)
        beyond = tl.where(suffices, beyond, reaching)
    return first, number


@triton.jit
def _add(mass, number, more_mass, more):
    return mass + more_mass, number + more
