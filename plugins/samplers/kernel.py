"""Top-k and top-p as one Triton kernel: a row of logits is searched where it is, in registers.

The one idea to hold: float32 is ordered as its bits are, as soon as those of negative numbers and
the sign are flipped. So the least logit to keep is found by trials between two whose bits are known
to be too few and too many, with one sum over the row for each, until it is clear which ids stay. A
trial is about where a line from what one keeps to what the other keeps meets what is to be kept (by
the Illinois rule, which lets neither end stay for long); after `STRAIGHT` of them, as ids that tie
with the last one can take, it is halfway, bit by bit, which ends after 32. Of 4,096 ids top-k 900
takes about 8 and top-p 0.96 then 7 to 10; a logit far below all others, a mask of -1e30 say, bends
the line, up to 31. Sums are of whole numbers, so it keeps what the search in torch keeps.

Imported only for logits on a GPU: triton takes its time, and is not there on every platform.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from triton.language.extra import libdevice

from .likeliest import MASS

MANY = 512
"""Rows from which on it is quicker to limit registers, so that more programs run at a time."""
LONGEST = 2**14
"""Ids of a row: more would not fit in registers."""
_MASS = tl.constexpr(float(MASS))
STRAIGHT = tl.constexpr(14)
"""Trials on a line, at most."""


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
    most = {"maxnreg": 128} if rows >= MANY and torch.version.hip is None else {}
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
            num_warps=min(max(block // 1024, 1), 16),
            **most,
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
    logits += row * V
    ids = tl.arange(0, BLOCK)
    x = tl.load(logits + ids, ids < V, -float("inf"))
    bits = tl.where(ids < V, _ordered(x), 0)  # less than what any logit has
    last = tl.max(bits, 0)
    greatest = tl.max(x, 0)
    least = tl.min(tl.where(ids < V, bits, last), 0)
    number = tl.full([], V, tl.int32)
    if TOP_K < V:
        enough = tl.full([], TOP_K, tl.float64)
        least, number = _least(bits, None, V, enough, least, number, last, TOP_K)
    if TOP_P < 1:
        if masses is None:  # bit by bit what `_masses` finds, hence not the faster `tl.exp`
            counts = (libdevice.exp(_value(bits) - greatest) * _MASS).to(tl.int64)
        else:
            counts = tl.load(masses + row * V + ids, ids < V, 0)
        # All that reaches a trial is kept by top-k, since that is greater.
        counts = tl.where((ids < V) & (bits >= least), counts, 0)
        mass = tl.sum(counts, 0)
        enough = mass.to(tl.float64) * tl.full([], TOP_P, tl.float64)
        least, number = _least(bits, counts, mass, enough, least, number, last, 1)
    # Read again: what a row holds meanwhile is its bits and what they count.
    x = tl.load(logits + ids, ids < V, -float("inf"))
    kept = (ids < V) & (bits >= least)
    if noise is None:
        tl.store(out + row * V + ids, tl.where(kept, x, -float("inf")), ids < V)
    else:
        ahead = tl.where(kept, tl.exp(x - greatest), 0.0)
        race = ahead / tl.load(noise + row * V + ids, ids < V, 1.0)
        tl.store(out + row, tl.minimum(tl.argmax(race, 0), V - 1))  # NaN, too, gives an id


@triton.jit
def _ordered(x):
    """Bits as whole numbers that are ordered as the float32 are; -0.0 counts as 0.0."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(bits == -2147483648, 0, bits)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def _value(bits):
    """What `_ordered` had."""
    bits = bits.to(tl.int32, bitcast=True)
    return (bits ^ (~(bits >> 31) | -2147483648)).to(tl.float32, bitcast=True)


@triton.jit
def _least(
    bits,
    counts,
    reached_by_first,
    enough,
    first,
    number,
    last,
    FEWEST: tl.constexpr,  # noqa: N803
):
    """Bits that just those ids reach that are kept, and how many they are.

    Kept is what reaches the greatest bits from `first`, which `number` ids reach, to `last` such
    that ids that reach them count `enough` together, each 1 without `counts`; never fewer than
    `FEWEST`. Those that reach `first` count `reached_by_first`.
    """
    beyond = tl.full([], 0, tl.int32)
    # How far what reaches `first` and what is beyond `last` are from enough, as the line has it.
    over, under = _apart(reached_by_first, enough), _apart(enough, 0)
    side, turn = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    # Of ids that reach `first`, `beyond` are greater than `last`, which is not enough: where one
    # more is left, that one is kept; where `FEWEST` are, all are.
    while (first < last) & (number > FEWEST) & (number - beyond > 1):
        trial = _halfway(first, last)
        if turn < STRAIGHT:
            low, high = _value(first), _value(last)
            along = over / (over + under)
            guess = low + (high - low) * tl.minimum(tl.maximum(along, 0.02), 0.98)
            # NaN, of infinite ends, is no guess.
            met = tl.minimum(tl.maximum(_ordered(guess), first + 1), last)
            trial = tl.where(guess == guess, met, trial)
        turn += 1
        reached = (bits >= trial).to(tl.int32)
        if counts is None:
            reaching = tl.sum(reached, 0)
            mass = reaching
        else:
            mass, reaching = tl.reduce((tl.where(reached > 0, counts, 0), reached), 0, _add)
        suffices = mass.to(tl.float64) >= enough
        over = tl.where(suffices, _apart(mass, enough), tl.where(side < 0, over * 0.5, over))
        under = tl.where(suffices, tl.where(side > 0, under * 0.5, under), _apart(enough, mass))
        side = tl.where(suffices, 1, -1)
        first = tl.where(suffices, trial, first)
        number = tl.where(suffices, reaching, number)
        last = tl.where(suffices, last, trial - 1)
        beyond = tl.where(suffices, beyond, reaching)
    return first, number


@triton.jit
def _apart(more, less):
    return (more - less).to(tl.float32)


@triton.jit
def _halfway(first, last):
    """Bits that agree with those of `last` down to the highest in which `first` differs."""
    below = first ^ last
    below |= below >> 1
    below |= below >> 2
    below |= below >> 4
    below |= below >> 8
    below |= below >> 16
    below = below >> 1  # all bits below the highest in which the two differ
    return (last | below) ^ below


@triton.jit
def _add(mass, number, more_mass, more):
    return mass + more_mass, number + more
