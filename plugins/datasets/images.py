"""What every data set here does the same way: sizes, ranges, checked indices, augmentation."""

from copy import copy
from typing import Annotated, Any, TypeVar

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, UInt8
from pydantic import AfterValidator, BeforeValidator
from torch import Tensor
from torch.nn import functional

import sandbox

D = TypeVar("D")

_SMALLEST_PX, _LARGEST_PX = 4, 8192


def _square(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value


def _in_range(size: tuple[int, int]) -> tuple[int, int]:
    if not all(_SMALLEST_PX <= side <= _LARGEST_PX for side in size):
        raise ValueError(f"give {_SMALLEST_PX} to {_LARGEST_PX} px, got {list(size)}")
    return size


ImageSize = Annotated[tuple[int, int], BeforeValidator(_square), AfterValidator(_in_range)]
"""Height and width in pixels; one number means a square."""


def check_indices(indices: Int[Tensor, " b"], size: int) -> None:
    """Raise IndexError, in one line, where an index lies outside `0 .. size - 1`."""
    if len(indices) == 0:
        return
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= size:
        raise IndexError(f"indices {low} to {high} were asked of a split of {size} images")


def moved(dataset: D, device: torch.device) -> D:
    """A copy of a data set whose `_images` and `_labels`, tensors by split, lie on `device`."""
    there = copy(dataset)
    for name in ("_images", "_labels"):
        setattr(there, name, {key: t.to(device) for key, t in getattr(dataset, name).items()})
    return there


def from_bytes(images: UInt8[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """Grey levels 0 .. 255 to [-1, 1]."""
    # By a tensor: dividing by a number, a GPU multiplies by its inverse, which rounds otherwise.
    half = torch.full((), 127.5, device=images.device)
    return images.to(torch.float32).div_(half).sub_(1)


def write_floats(pixels: UInt8[np.ndarray, "h w 3"], out: Float[np.ndarray, "3 h w"]) -> None:
    """What `from_bytes` makes of one image, in a thread's own time and no other's."""
    out[:] = rearrange(pixels, "h w c -> c h w")
    out /= np.float32(127.5)
    out -= 1


def drawn_to_flip(num: int, rng: torch.Generator) -> Bool[Tensor, " num"]:
    """Which images to mirror left to right, at even odds; `rng` is on the CPU."""
    return torch.rand(num, generator=rng) < 0.5


def randomly_flipped(
    images: UInt8[Tensor, "b c h w"], rng: torch.Generator
) -> UInt8[Tensor, "b c h w"]:
    """Each image mirrored left to right, or not, at even odds; `rng` is on the CPU."""
    mirrored = sandbox.to_device(drawn_to_flip(len(images), rng), images.device)
    return torch.where(rearrange(mirrored, "b -> b 1 1 1"), images.flip(-1), images)


def randomly_shifted(
    images: UInt8[Tensor, "b c h w"], reach_px: int, rng: torch.Generator
) -> UInt8[Tensor, "b c h w"]:
    """Each image moved by up to `reach_px` both ways, black coming in: pad, then crop at random."""
    (num, _, height, width), device = images.shape, images.device
    moves = torch.randint(2 * reach_px + 1, (2, num, 1), generator=rng)
    top, left = sandbox.to_device(moves, device)
    rows = rearrange(top + torch.arange(height, device=device), "b h -> b h 1")
    columns = rearrange(left + torch.arange(width, device=device), "b w -> b 1 w")
    padded = rearrange(functional.pad(images, [reach_px] * 4), "b c h w -> b h w c")
    picked = padded[rearrange(torch.arange(num, device=device), "b -> b 1 1"), rows, columns]
    return rearrange(picked, "b h w c -> b c h w")
