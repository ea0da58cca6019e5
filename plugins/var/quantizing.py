"""The residual lookup of the multi-scale tokenizer: from features to ids, canvases and a loss.

The one idea to hold: every scale looks up what the scales before it have left over, and never with
gradients; those flow to codes and phi from the canvases, and to features from the loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

import sandbox

from .dropout import disturbed, kept_scales
from .estimators import ESTIMATORS

if TYPE_CHECKING:
    from .tokenizer import VarTokenizer


class Quantized(NamedTuple):
    """What a lookup finds, step by step."""

    ids: list[Int[Tensor, "b n"]]
    canvases: list[Float[Tensor, "b c h w"]]
    """The sum of the codes' maps after each step."""
    vectors: list[Float[Tensor, "bn c"]]
    """What was looked up."""


class Judged(NamedTuple):
    """What training makes of features."""

    through: Float[Tensor, "b c h w"]
    """What the decoder reads: the last canvas, whose gradients the features get as well."""
    loss: Float[Tensor, ""]
    ids: list[Int[Tensor, "b n"]]
    vectors: list[Float[Tensor, "bn c"]]


def quantized(
    tokenizer: VarTokenizer,
    features: Float[Tensor, "b c h w"],
    seed: bool = False,
    kept: Float[Tensor, "k b"] | None = None,
    noise: Float[Tensor, " b"] | None = None,
) -> Quantized:
    """Look up scale after scale; with `seed` the codebook first places codes by what it sees.

    Gradients flow from the canvases to codes and phi, never through the residuals. Where `kept` is
    0 a scale of an image adds nothing. With `noise` the canvases are of the codes of a disturbed
    lookup; the ids stay those of the vectors.
    """
    codebook, num_steps = tokenizer.codebook, len(tokenizer.layout.steps)
    rest, canvas = features.detach(), tokenizer.canvas(len(features))
    ids, canvases, vectors = [], [], []
    with sandbox.exact_float32(features.device):
        for step in range(num_steps):
            shrunk = tokenizer.pyramid.shrink(rest, step)
            vectors.append(rearrange(shrunk, "b c h w -> (b h w) c"))
            if seed:
                codebook.seed(vectors[-1], step, num_steps)
            nearest = codebook.nearest(vectors[-1])
            ids.append(rearrange(nearest, "(b n) -> b n", b=len(features)))
            if noise is not None:
                others = rearrange(disturbed(shrunk, noise), "b c h w -> (b h w) c")
                nearest = codebook.nearest(others)
            codes = codebook.embed(rearrange(nearest, "(b n) -> b n", b=len(features)))
            grown = tokenizer.grow(codes, step)
            if kept is not None:
                grown = grown * kept[step, :, None, None, None]
            canvas, rest = canvas + grown, rest - grown.detach()
            canvases.append(canvas)
    return Quantized(ids, canvases, vectors)


def corrected(
    tokenizer: VarTokenizer, features: Float[Tensor, "b c h w"], noise: Float[Tensor, " b"]
) -> tuple[Int[Tensor, "b l"], Int[Tensor, "b l"]]:
    """See `VarTokenizer.quantize`."""
    rest, found, right = features.float(), [], []
    with sandbox.exact_float32(features.device):
        for step in range(len(tokenizer.layout.steps)):
            shrunk = tokenizer.pyramid.shrink(rest, step)
            for maps, ids in ((shrunk, right), (disturbed(shrunk, noise), found)):
                vectors = rearrange(maps, "b c h w -> (b h w) c")
                nearest = tokenizer.codebook.nearest(vectors)
                ids.append(rearrange(nearest, "(b n) -> b n", b=len(features)))
            rest = rest - tokenizer.grow(tokenizer.embed(found[-1]), step)
    return torch.cat(found, dim=1), torch.cat(right, dim=1)


def judged(tokenizer: VarTokenizer, features: Float[Tensor, "b c h w"]) -> Judged:
    """Quantize, as training wants it, and tell the loss; see `VarTokenizer.reconstruct`.

    For within `sandbox.exact_float32`, which compiled code cannot set.
    """
    p, kept, noise = tokenizer.params, None, None
    if tokenizer.training and (p.scale_dropout or p.prefix_dropout):
        rates = p.scale_dropout, p.prefix_dropout
        kept = kept_scales(features, len(tokenizer.layout.steps), *rates, p.prefix_min)
    if tokenizer.training and p.lookup_noise:
        noise = p.lookup_noise * torch.rand(len(features), device=features.device)
    ids, canvases, vectors = quantized(tokenizer, features, kept=kept, noise=noise)
    target = features.detach()
    loss = torch.stack(
        [
            F.mse_loss(canvas, target) + p.beta * F.mse_loss(canvas.detach(), features)
            for canvas in canvases
        ]
    ).mean()
    if penalty := getattr(tokenizer.codebook, "penalty", None):
        before = [torch.zeros_like(target), *(canvas.detach() for canvas in canvases[:-1])]
        loss = loss + penalty(
            [
                rearrange(tokenizer.pyramid.shrink(features - seen, k), "b c h w -> (b h w) c")
                for k, seen in enumerate(before)
            ]
        )
    return Judged(ESTIMATORS[p.estimator](features, canvases[-1]), loss, ids, vectors)
