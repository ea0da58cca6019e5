"""Top-k and top-p as one Triton kernel: a row of logits is read once and stays in registers.

The one idea to hold: float32 is ordered as its bits are, as soon as those of negative numbers and
the sign are flipped. So the least logit to keep is found bit by bit from the highest, with one sum
over the row for each; sums are of whole numbers, so it keeps what the search in torch keeps.

Imported only for logits on a GPU: triton takes its time, and is not there on every platform.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from triton.language.extra import libdevice

from .likeliest import MASS

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
    block = max(32, triton.next_power_of_2(v))
    with torch.cuda.device_of(logits):
        _rows[(logits.numel() // v,)](
            logits,
            masses if masses is None else masses.contiguous(),
            noise if noise is None else noise.contiguous(),
            out,
            v,
            min(top_k, v) or v,
            top_p,
            block,
            num_warps=min(max(block // 512, 1), 16),
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
    if TOP_K < V:
        kept &= bits >= _least(bits, 1, TOP_K)
    if TOP_P < 1:
        if masses is None:  # bit by bit what `_masses` finds, hence not the faster `tl.exp`
            counts = (libdevice.exp(x - greatest) * _MASS).to(tl.int64)
        else:
            counts = tl.load(masses + here, ids < V, 0)
        counts = tl.where(kept, counts, 0)
        enough = tl.sum(counts, 0).to(tl.float64) * tl.full([], TOP_P, tl.float64)
        kept &= bits >= _least(bits, counts, enough)
    if noise is None:
        tl.store(out + here, tl.where(kept, x, -float("inf")), ids < V)
    else:
        race = tl.where(kept, tl.exp(x - greatest), 0.0) / tl.load(noise + here, ids < V, 1.0)
        tl.store(out + row, tl.minimum(tl.argmax(race, 0), V - 1))  # NaN, too, gives an id


@triton.jit
def _least(bits, counts, enough):
    """The greatest bits such that the ids that reach them count enough together."""
    found = tl.full([], 0, tl.uint32)
    bit = tl.full([], 2147483648, tl.uint32)
    for _ in range(32):
        trial = found | bit
        count = tl.sum(tl.where(bits >= trial, counts, 0), 0)
        found = tl.where(count.to(tl.float64) >= enough, trial, found)
        bit = bit >> 1
    return found
