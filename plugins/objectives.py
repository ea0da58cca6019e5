"""Objectives: how wrong predicted logits are.

The one idea to hold: a loss for every token, weighted so that their mean is what is minimised.
"""

from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

import sandbox


@sandbox.hookimpl
def sandbox_register(register: Any) -> None:
    register(sandbox.Objective, "cross-entropy", CrossEntropy)


class CrossEntropy:
    """Cross-entropy of every token, in nats."""

    class Params(sandbox.Params):
        label_smoothing: float = Field(0.0, ge=0, lt=1)
        """Share of the target that is spread over the whole vocabulary."""
        level_weights: Literal["tokens", "sqrt"] = "tokens"
        """A scale weighs as much as it has tokens (published), or as the square root of that."""

    def __init__(self, params: Params) -> None:
        self.params = params

    def losses(
        self, logits: Float[Tensor, "b l v"], ids: Int[Tensor, "b l"], layout: sandbox.Layout
    ) -> Float[Tensor, "b l"]:
        losses = F.cross_entropy(
            rearrange(logits, "b l v -> (b l) v"),
            rearrange(ids, "b l -> (b l)").long(),
            reduction="none",
            label_smoothing=self.params.label_smoothing,
        )
        losses = rearrange(losses, "(b l) -> b l", b=len(ids))
        if self.params.level_weights == "sqrt":
            losses = losses * _sqrt_weights(layout).to(losses.device)
        return losses


def _sqrt_weights(layout: sandbox.Layout) -> Float[Tensor, " l"]:
    """Weights of mean 1 under which each level's sum grows as the root of its token count."""
    level = layout.level_of()
    weights = torch.bincount(level)[level].rsqrt()
    return weights / weights.mean()
