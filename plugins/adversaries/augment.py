"""DiffAugment (Zhao et al. 2020, arXiv 2006.10738): what a discriminator sees, always augmented.

A policy is drawn once, on the device and from torch's global generator, and is then applied to
reconstructions and images alike: what differs between the two is no work of the augmentation.
Nothing here reads a number back from the device.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Augmentation = Literal["color", "translation", "cutout"]
Policy = Callable[[Float[Tensor, "b 3 h w"]], Float[Tensor, "b 3 h w"]]

TRANSLATION, CUTOUT = 0.125, 0.5
"""Largest shift, and side of the square cut out, as shares of the image's side (the paper's)."""


def draw_policy(images: Float[Tensor, "b 3 h w"], wanted: Sequence[Augmentation]) -> Policy:
    """One augmentation an image of this shape, device and data type."""
    kinds = {"color": _color, "translation": _translation, "cutout": _cutout}
    steps = [draw(images) for name, draw in kinds.items() if name in wanted]

    def policy(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        for step in steps:
            images = step(images)
        return images

    return policy


def _uniform(images: Tensor) -> Float[Tensor, "b 1 1 1"]:
    return torch.rand(len(images), 1, 1, 1, device=images.device)


def _color(images: Tensor) -> Policy:
    """Brightness by -0.5 to 0.5, saturation by 0 to 2, contrast by 0.5 to 1.5."""
    brightness = _uniform(images) - 0.5
    saturation, contrast = _uniform(images) * 2, _uniform(images) + 0.5

    def policy(images: Tensor) -> Tensor:
        images = images + brightness
        grey = images.mean(dim=1, keepdim=True)
        images = grey + (images - grey) * saturation
        level = images.mean(dim=(1, 2, 3), keepdim=True)
        return level + (images - level) * contrast

    return policy


def _translation(images: Tensor) -> Policy:
    """Shift by up to an eighth of the side; what comes in is grey (zero)."""
    moves = []
    for dim in (2, 3):
        side = images.shape[dim]
        reach = int(side * TRANSLATION + 0.5)
        shift = (_uniform(images) * (2 * reach + 1)).floor().long() - reach
        source = _along(dim, side, images.device) - shift
        inside = (source >= 0) & (source < side)
        moves.append((dim, source % side, inside))

    def policy(images: Tensor) -> Tensor:
        for dim, source, inside in moves:  # every pixel once, so that the gradient has one order
            images = images.gather(dim, source.expand_as(images)) * inside
        return images

    return policy


def _cutout(images: Tensor) -> Policy:
    """A square of half the side becomes grey (zero); it may reach beyond the edge."""
    cut = torch.ones((), dtype=torch.bool, device=images.device)
    for dim in (2, 3):
        side = images.shape[dim]
        size = int(side * CUTOUT + 0.5)
        first = (_uniform(images) * (side + 1 - size % 2)).floor() - size // 2
        place = _along(dim, side, images.device)
        cut = cut & (place >= first) & (place < first + size)
    return lambda images: images * ~cut


def _along(dim: int, side: int, device: torch.device) -> Tensor:
    """0 to side - 1 along one axis of `b 3 h w`."""
    shape = [1, 1, 1, 1]
    shape[dim] = side
    return torch.arange(side, device=device).view(shape)
