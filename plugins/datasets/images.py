"""What every data set here does the same way: sizes, ranges, checked indices, augmentation."""

from typing import Annotated, Any

import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from pydantic import AfterValidator, BeforeValidator
from torch import Tensor
from torch.nn import functional

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


def from_bytes(images: UInt8[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """Grey levels 0 .. 255 to [-1, 1]."""
    return images.to(torch.float32).div_(127.5).sub_(1)


def randomly_flipped(
    images: UInt8[Tensor, "b c h w"], rng: torch.Generator
) -> UInt8[Tensor, "b c h w"]:
    """Each image mirrored left to right, or not, at even odds."""
    mirrored = torch.rand(len(images), generator=rng) < 0.5
    return torch.where(rearrange(mirrored, "b -> b 1 1 1"), images.flip(-1), images)


def randomly_shifted(
    images: UInt8[Tensor, "b c h w"], reach_px: int, rng: torch.Generator
) -> UInt8[Tensor, "b c h w"]:
    """Each image moved by up to `reach_px` both ways, black coming in: pad, then crop at random."""
    num, _, height, width = images.shape
    top, left = torch.randint(2 * reach_px + 1, (2, num, 1), generator=rng)
    rows = rearrange(top + torch.arange(height), "b h -> b h 1")
    columns = rearrange(left + torch.arange(width), "b w -> b 1 w")
    padded = rearrange(functional.pad(images, [reach_px] * 4), "b c h w -> b h w c")
    picked = padded[rearrange(torch.arange(num), "b -> b 1 1"), rows, columns]
    return rearrange(picked, "b h w c -> b c h w")
