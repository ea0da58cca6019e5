"""Draws among the likeliest ids.

The one idea to hold: a sampler first narrows the distribution, then draws from what is left with
the generator it is handed and nothing else, so the same random state gives the same ids. On a GPU
nothing here sorts or waits for the device, and all shapes are static: a CUDA graph can hold it.
"""

import math
from functools import cache
from types import ModuleType
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

import sandbox

GuidanceShape = Literal["linear", "constant", "cosine"]


class Greedy:
    """The likeliest id of every token."""

    class Params(sandbox.Params):
        guidance: float = Field(1.5, ge=0)
        """Guidance weight at the last step; 0 is off and halves the work."""
        guidance_shape: GuidanceShape = "linear"
        """How guidance grows: `linear` from 0 (published), half a `cosine` wave, or `constant`."""

    def __init__(self, params: Params) -> None:
        self.params = params
        self.fused = False

    def guidance(self, progress: float) -> float:
        """The weight at `progress`, 0 at the first step and 1 at the last."""
        ramp = {
            "linear": progress,
            "constant": 1.0,
            "cosine": (1 - math.cos(math.pi * progress)) / 2,
        }
        return self.params.guidance * ramp[self.params.guidance_shape]

    def draw(
        self, logits: Float[Tensor, "b n v"], progress: float, rng: torch.Generator
    ) -> Int[Tensor, "b n"]:
        return logits.argmax(dim=-1)


class TopKTopP(Greedy):
    """Draws among the likeliest ids, as published: top-k first, then top-p of what it leaves."""

    class Params(Greedy.Params):
        top_k: int = Field(900, ge=0)
        """Keep the k likeliest ids; 0, or more than there are, keeps all."""
        top_p: float = Field(0.96, gt=0, le=1)
        """Keep the likeliest ids that together reach this probability; 1 keeps all, next to nothing
        the likeliest. 0, which is off in published code, is refused."""
        temperature: float = Field(1.0, gt=0)
        """Logits are divided by it; small is close to greedy."""
        smoothing: bool = False
        """Paint mixtures of codes (Gumbel-softmax): nicer to look at, never for metrics."""

    params: Params

    def draw(
        self, logits: Float[Tensor, "b n v"], progress: float, rng: torch.Generator
    ) -> Int[Tensor, "b n"]:
        """The id that wins an exponential race: the greatest p / Exp(1) is i as often as p_i says.

        `torch.multinomial` draws one id so, and these are its ids, but where rounding decides; it
        waits for the device to refuse NaN, though, which is not noticed here.
        """
        logits, top = self._tempered(logits), (self.params.top_k, self.params.top_p)
        if self.fused and logits.device.type == "cpu" and logits.numel():
            from . import race

            return race.draw(logits, *top, rng)
        noise = torch.empty_like(logits, memory_format=torch.contiguous_format)
        noise.exponential_(generator=rng)
        if kernel := _kernel_for(logits):
            return kernel.draw(logits, noise, *top)
        return (search(logits, *top).softmax(dim=-1) / noise).argmax(dim=-1)

    def soften(
        self, logits: Float[Tensor, "b n v"], progress: float, rng: torch.Generator
    ) -> Float[Tensor, "b n v"] | None:
        """Gumbel-softmax weights that harden towards the last step; None without smoothing."""
        if not self.params.smoothing:
            return None
        noise = -torch.empty_like(logits).exponential_(generator=rng).log()
        temperature = max(0.27 * (1 - 0.95 * progress), 0.005)
        return ((self._narrowed(logits) * (1 + progress) + noise) / temperature).softmax(dim=-1)

    def _narrowed(self, logits: Float[Tensor, "b n v"]) -> Float[Tensor, "b n v"]:
        """Logits with -inf at every id that may not be drawn."""
        logits = self._tempered(logits)
        if kernel := _kernel_for(logits):
            return kernel.narrow(logits, self.params.top_k, self.params.top_p)
        return search(logits, self.params.top_k, self.params.top_p)

    def _tempered(self, logits: Float[Tensor, "b n v"]) -> Float[Tensor, "b n v"]:
        temperature = self.params.temperature
        return (logits if temperature == 1 else logits / temperature).float()


def _kernel_for(logits: Float[Tensor, "b n v"]) -> ModuleType | None:
    """The module `kernel`, where it can do these logits."""
    if not logits.is_cuda or logits.requires_grad or not logits.numel():
        return None
    kernel = _kernel(logits.device)
    return kernel if kernel and logits.shape[-1] <= kernel.LONGEST else None


@cache
def _kernel(device: torch.device) -> ModuleType | None:
    """The module `kernel`, after a trial: triton may be missing, or the compiler that it needs."""

    def trial() -> ModuleType:
        from . import kernel

        kernel.narrow(torch.zeros(1, 2, device=device), 1, 0.5)
        return kernel

    return sandbox.tried(trial, "top-k and top-p without their Triton kernel")


def search(logits: Float[Tensor, "*b v"], top_k: int, top_p: float) -> Float[Tensor, "*b v"]:
    """Float32 logits with -inf at every id that may not be drawn, by torch alone.

    Top-k keeps the ids that have fewer than k likelier ones; top-p keeps those whose likelier ones
    have less than `top_p` of the mass that top-k left. Equal logits stay or go together.
    """
    likeliest, ids = logits, None
    if 0 < top_k < logits.shape[-1]:
        likeliest, ids = logits.topk(top_k, dim=-1, sorted=False)
        least = likeliest.amin(dim=-1, keepdim=True)
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        masses = _masses(logits)
        enough = masses.sum(dim=-1, keepdim=True).double() * top_p
        masses = masses if ids is None else masses.gather(-1, ids)
        least = _least_of_few if logits.device.type == "cpu" else _least
        logits = logits.masked_fill(logits < least(likeliest, masses, enough), -torch.inf)
    return logits


MASS = 2**40
"""What the likeliest id counts."""


def _masses(logits: Float[Tensor, "*b v"]) -> Int[Tensor, "*b v"]:
    """Probabilities in units of 2^-40 of the greatest: whole, so every order of summing agrees."""
    return (logits - logits.amax(dim=-1, keepdim=True)).exp_().mul_(MASS).long()


FEW = 64
"""So many of the likeliest ids mostly have the mass that is looked for."""


def _least_of_few(
    logits: Float[Tensor, "*b v"], masses: Int[Tensor, "*b v"], enough: Float[Tensor, "*b 1"]
) -> Float[Tensor, "*b 1"]:
    """What `_least` finds, sooner where shapes may depend on numbers: sorting a few of each row.

    Only rows in which those few do not suffice are searched.
    """
    few, ids = logits.topk(min(FEW, logits.shape[-1]), dim=-1)
    reached = masses.gather(-1, ids).cumsum(dim=-1)
    before = F.pad(reached[..., :-1], (1, 0))
    last = (before < enough).sum(dim=-1, keepdim=True).clamp_min(1) - 1  # none is: of NaN
    found = few.gather(-1, last)
    open_rows = (reached[..., -1:] < enough).squeeze(-1)
    if open_rows.any():
        found[open_rows] = _least(logits[open_rows], masses[open_rows], enough[open_rows])
    return found


def _least(
    logits: Float[Tensor, "*b v"], masses: Int[Tensor, "*b v"], enough: Float[Tensor, "*b 1"]
) -> Float[Tensor, "*b 1"]:
    """The least logit such that those greater have less mass than `enough`, which is positive.

    A radix search: float32 is ordered as its bits are, once the lower ones of negative numbers and
    the sign are flipped. Byte by byte from the highest, this finds that of the logit looked for in
    a histogram of the logits that agree with it so far.
    """
    bits = _flipped((logits + 0.0).view(torch.int32)) ^ -(2**31)  # -0.0 counts as 0.0
    above = torch.zeros_like(masses[..., :1])  # the mass of logits that are greater for sure
    found = torch.zeros_like(above)
    for shift in (24, 16, 8, 0):
        digits = (bits >> shift).bitwise_and_(255)
        histogram = above.new_zeros(*above.shape[:-1], 256)
        histogram.scatter_add_(-1, digits.long(), masses)
        greater = above + histogram.sum(dim=-1, keepdim=True) - histogram.cumsum(dim=-1)
        digit = (greater < enough).int().argmax(dim=-1, keepdim=True)  # the first such
        above, found = greater.gather(-1, digit), (found << 8) + digit
        if shift:
            masses = masses.masked_fill(digits != digit, 0)
    return _flipped((found - 2**31).int()).view(torch.float32)


def _flipped(bits: Int[Tensor, "*axes"]) -> Int[Tensor, "*axes"]:
    """Bits of float32, the lower 31 flipped where the sign is set; twice is as they were."""
    return bits ^ ((bits >> 31) & (2**31 - 1))
