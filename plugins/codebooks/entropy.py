"""Entropy regularisation of soft assignments (MAGVIT-v2, arXiv 2310.05737, eq. 5; IBQ).

Every vector is to be sure of its code, and all codes are to be used: the mean entropy of the
assignments falls while the entropy of the mean assignment rises. Unlike a lookup this reaches every
code, at the price of holding (and differentiating) all distances.
"""

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sandbox

from .lookup import Lookup

MAX_LOGITS = 2**24
"""Above so many, they are made a piece at a time and once more on the way back."""


def entropy_penalty(
    vectors: Sequence[Float[Tensor, "n c"]],
    codes: Float[Tensor, "v c"],
    lookup: Lookup,
    temperature: float,
) -> Float[Tensor, ""]:
    """The mean over groups of `entropy_gap`."""
    with sandbox.exact_float32(codes.device):
        groups = [group.float() for group in vectors]
        if lookup == "cosine":
            groups = [F.normalize(group, dim=1) for group in groups]
            codes = F.normalize(codes, dim=1)
        return torch.stack([entropy_gap(group, codes, temperature) for group in groups]).mean()


def entropy_gap(
    vectors: Float[Tensor, "n c"], codes: Float[Tensor, "v c"], temperature: float
) -> Float[Tensor, ""]:
    """Mean entropy less entropy of the mean, in nats: between -log v and 0.

    The assignments are softmax(-d^2 / (temperature * mean d^2)). Measured in the mean squared
    distance, one temperature fits every scale, though residuals shrink from each to the next.
    """
    far = vectors.detach().square().sum(1).mean() + codes.detach().square().sum(1).mean()
    far = far - 2 * vectors.detach().mean(0).dot(codes.detach().mean(0))
    sharpness = 1 / (temperature * far.clamp(min=1e-12))
    pieces = vectors.split(max(1, MAX_LOGITS // len(codes)))
    run = partial(checkpoint, _assign, use_reentrant=False, preserve_rng_state=False)
    found = [(run if len(pieces) > 1 else _assign)(rows, codes, sharpness) for rows in pieces]
    entropies, assignments = (torch.stack(part).sum(0) for part in zip(*found, strict=True))
    mean = assignments / len(vectors)
    return entropies / len(vectors) + (mean * mean.clamp(min=1e-12).log()).sum()


def _assign(rows: Tensor, codes: Tensor, sharpness: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the rows' entropies, and the sum of their assignments."""
    logits = sharpness * torch.addmm(codes.square().sum(1), rows, codes.T, beta=-1, alpha=2)
    log_odds = logits.log_softmax(1)
    odds = log_odds.exp()
    return -(odds * log_odds).sum(), odds.sum(0)
