"""Which scales of which images count in a training step, and how exactly they are looked up.

Leaving scales out makes the coarse ones carry more: each with the same probability (BitVAE,
Infinity, arXiv 2412.04431), or all after the first few (ImageFolder, arXiv 2410.01756).

A scale that is left out is looked up all the same, and the codebook takes note of its vectors and
of those of later scales, in which what it would have taken away is still there.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def kept_scales(
    features: Float[Tensor, "b c h w"],
    num_scales: int,
    scale_dropout: float,
    prefix_dropout: float,
    prefix_min: int,
) -> Float[Tensor, "k b"]:
    """1 where a scale of an image counts, else 0; drawn on the features' device."""
    num, device = len(features), features.device
    scales = torch.arange(num_scales, device=device)[:, None]
    kept = torch.rand(num_scales, num, device=device) >= scale_dropout
    kept |= scales == num_scales - 1
    least = min(prefix_min, num_scales)
    lengths = torch.randint(least, num_scales + 1, (num,), device=device)
    whole = torch.rand(num, device=device) >= prefix_dropout
    return (kept & (whole | (scales < lengths))).float()


def disturbed(
    maps: Float[Tensor, "b c h w"], noise: Float[Tensor, " b"]
) -> Float[Tensor, "b c h w"]:
    """The maps and Gaussian noise: an image's `noise` times the root mean square of all of them."""
    strength = noise[:, None, None, None] * maps.square().mean().sqrt()
    return maps + strength * torch.randn_like(maps)
