"""Samplers: logits to ids.

The one idea to hold: a sampler first narrows the distribution, then draws from what is left with
the generator it is handed and nothing else, so the same random state gives the same ids.
"""

import math
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

import sandbox

GuidanceShape = Literal["linear", "constant", "cosine"]


@sandbox.hookimpl
def sandbox_register(register: Any) -> None:
    register(sandbox.Sampler, "top-k-top-p", TopKTopP)
    register(sandbox.Sampler, "greedy", Greedy)


class Greedy:
    """The likeliest id of every token."""

    class Params(sandbox.Params):
        guidance: float = Field(1.5, ge=0)
        """Guidance weight at the last step; 0 is off and halves the work."""
        guidance_shape: GuidanceShape = "linear"
        """How guidance grows: `linear` from 0 (published), half a `cosine` wave, or `constant`."""

    def __init__(self, params: Params) -> None:
        self.params = params

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
        """Keep the likeliest ids that together reach this probability; 1 keeps all."""
        temperature: float = Field(1.0, gt=0)
        """Logits are divided by it; small is close to greedy."""
        smoothing: bool = False
        """Paint mixtures of codes (Gumbel-softmax): nicer to look at, never for metrics."""

    params: Params

    def draw(
        self, logits: Float[Tensor, "b n v"], progress: float, rng: torch.Generator
    ) -> Int[Tensor, "b n"]:
        probabilities = rearrange(self._narrowed(logits).softmax(dim=-1), "b n v -> (b n) v")
        ids = torch.multinomial(probabilities, 1, replacement=True, generator=rng)
        return rearrange(ids, "(b n) 1 -> b n", b=len(logits))

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
        logits = logits / self.params.temperature
        if 0 < self.params.top_k < logits.shape[-1]:
            least = logits.topk(self.params.top_k, dim=-1).values.amin(dim=-1, keepdim=True)
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.params.top_p < 1:
            ascending, order = logits.sort(dim=-1)
            cut = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - self.params.top_p
            cut[..., -1] = False  # the likeliest id always stays
            logits = logits.masked_fill(cut.scatter(-1, order, cut), -torch.inf)
        return logits
