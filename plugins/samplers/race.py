"""The exponential race run by all ids, before any is ruled out, for a CPU.

The one idea to hold: whoever wins among all wins among those that may be drawn, if it is one of
them. So nothing is sorted: it is seen whether the winner may be drawn, and only where that is not
sure (a row in ten, with a top-p of 0.9) are the likeliest ids searched for. What comes before that
is compiled: few passes over memory, in which a logit is read but not written.
"""

from collections.abc import Callable
from functools import cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .likeliest import search

DOUBT = 1e-3
"""The share of all mass by which a winner has to be within top-p to be sure of it: sums of float32
over a vocabulary are closer than that."""

NO_MASS = 40.0
"""Ids whose logits are this much below the greatest have no mass in float32."""

BITS = 2**53 - 1
"""Those of a random 64-bit number that a uniform float64 is made of."""

HALVINGS = 8
"""Steps towards the top-k-th logit, which is not needed closely: little mass is around it."""


def draw(
    logits: Float[Tensor, "*b v"], top_k: int, top_p: float, rng: torch.Generator
) -> Int[Tensor, "*b"]:
    """What `TopKTopP.draw` says, with the same random numbers, from float32 logits on a CPU."""
    rows = logits.reshape(-1, logits.shape[-1])
    # What `exponential_` reads, before it makes a number in [0, 1) of the lower 53 bits of each and
    # takes its logarithm, one after the other.
    bits = torch.empty(rows.shape, dtype=torch.int64).random_(generator=rng)
    ids, sure = compiled()(rows, bits, top_k, top_p)
    if not sure.all():
        unsure = ~sure
        uniform = (bits[unsure] & BITS).double() / (BITS + 1)
        race = search(rows[unsure], top_k, top_p).softmax(dim=-1) / -torch.log1p(-uniform)
        ids[unsure] = race.argmax(dim=-1)
    return ids.view(logits.shape[:-1])


def winners(
    logits: Float[Tensor, "n v"], bits: Int[Tensor, "n v"], top_k: int, top_p: float
) -> tuple[Int[Tensor, " n"], Bool[Tensor, " n"]]:
    """Who wins among all ids, and whether it is sure to be among those that may be drawn."""
    masses = (logits - logits.amax(dim=-1, keepdim=True)).exp()
    uniform = (bits & BITS).float() / (BITS + 1)
    ids = (masses / -torch.log1p(-uniform)).argmax(dim=-1, keepdim=True)
    likelier = logits > logits.gather(-1, ids)
    all_mass = mass = masses.sum(dim=-1)
    sure = mass.isfinite()  # else a logit is NaN, or without bounds
    if 0 < top_k < logits.shape[-1]:
        sure = sure & (likelier.sum(dim=-1) < top_k)
        # Of no more ids than top-k leaves, so no more than their mass.
        few = logits > _exceeded_by(top_k, logits)
        mass = masses.masked_fill(~few, 0).sum(dim=-1)
    if top_p < 1:
        ahead = masses.masked_fill(~likelier, 0).sum(dim=-1)
        sure = sure & ((ahead == 0) | (ahead < top_p * mass - DOUBT * all_mass))
    return ids.squeeze(-1), sure


def _exceeded_by(most: int, logits: Float[Tensor, "n v"]) -> Float[Tensor, "n 1"]:
    """A logit that at most so many ids exceed, and hardly fewer of those that have any mass."""
    high = logits.amax(dim=-1, keepdim=True)
    low = torch.maximum(logits.amin(dim=-1, keepdim=True), high - NO_MASS)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        more = (logits > middle).sum(dim=-1, keepdim=True) > most
        low, high = torch.where(more, middle, low), torch.where(more, high, middle)
    return high


@cache
def compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    """`winners`, built once for one row and once for more, with and without top-k and top-p."""
    return torch.compile(winners, dynamic=True)
