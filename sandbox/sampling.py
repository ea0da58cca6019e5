"""The one sampling loop: the same for every layout, tokenizer, backbone and sampler.

VAR, arXiv 2404.02905, Algorithm 2, with classifier-free guidance as published: at progress r from 0
to 1, logits = (1 + t) with_label - t without, where t = guidance(r).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sandbox.interfaces import Backbone, Sampler, Tokenizer
from sandbox.values import Watch


@dataclass(frozen=True)
class Keep:
    """Ids that are not to be drawn anew: where `mask` is True the given id stands (in-painting)."""

    ids: Int[Tensor, "b l"]
    mask: Bool[Tensor, "b l"]


@dataclass(frozen=True)
class Sampled:
    """The ids drawn and the canvas they add up to (with smoothing, not quite the ids' own)."""

    ids: Int[Tensor, "b l"]
    canvas: Float[Tensor, "b c h w"]


def guided(rows: Float[Tensor, "two_b *rest"], weight: float) -> Float[Tensor, "b *rest"]:
    """Classifier-free guidance of logits, or of what they are linear in: those with a label first,
    then those without.
    """
    with_label, without = rows.chunk(2)
    return without.lerp(with_label, 1 + weight) if weight else with_label


@torch.inference_mode()
def sample(
    tokenizer: Tokenizer,
    backbone: Backbone,
    sampler: Sampler,
    labels: Int[Tensor, " b"],
    rng: torch.Generator,
    *,
    no_label: int,
    keep: Keep | None = None,
    watch: Watch | None = None,
) -> Sampled:
    """Sample the ids of one image a label, step by step.

    `no_label` is the label that means "no class". `rng` lives on the labels' device.
    """
    num_steps = len(tokenizer.layout.steps)
    progress = [index / max(1, num_steps - 1) for index in range(num_steps)]
    guides = any(sampler.guidance(r) != 0 for r in progress)
    rows = torch.cat([labels, torch.full_like(labels, no_label)]) if guides else labels
    canvas, state, drawn = tokenizer.canvas(len(labels)), backbone.begin(rows), []
    for index, span in enumerate(tokenizer.layout.spans):
        context = tokenizer.context(canvas, index)
        if guides:
            logits = _guided_step(backbone)(
                state, torch.cat([context] * 2), index, sampler.guidance(progress[index])
            )
        else:
            logits = backbone.step(state, context, index)
        ids = sampler.draw(logits.float(), progress[index], rng)
        codes = None
        if soften := getattr(sampler, "soften", None):
            weights = soften(logits.float(), progress[index], rng)
            if weights is not None:
                every = torch.arange(tokenizer.vocab_size, device=ids.device)
                codes = weights @ tokenizer.embed(every)
        if codes is None:
            codes = tokenizer.embed(ids)
        if keep is not None:
            kept = keep.mask[:, span]
            ids = torch.where(kept, keep.ids[:, span], ids)
            codes = torch.where(kept[..., None], tokenizer.embed(ids), codes)
        canvas = tokenizer.paint(canvas, codes, index)
        drawn.append(ids)
        if watch is not None:
            watch(index, tokenizer.render(canvas))
    return Sampled(torch.cat(drawn, dim=1), canvas)


def _guided_step(backbone: Backbone) -> Callable[..., Float[Tensor, "b n v"]]:
    """The backbone's own way to guided logits, or the one by all logits."""

    def by_all(
        state: Any, context: Float[Tensor, "two_b n c"], step: int, weight: float
    ) -> Float[Tensor, "b n v"]:
        return guided(backbone.step(state, context, step).float(), weight)

    if not hasattr(type(backbone), "guided_step"):  # not one of what it may be wrapped around
        return by_all
    found: Callable[..., Tensor] = getattr(backbone, "guided_step")  # noqa: B009
    return found
