"""What every data set here does the same way: sizes, ranges, checked indices."""

from typing import Annotated, Any

import torch
from jaxtyping import Float, Int, UInt8
from pydantic import BeforeValidator, Field
from torch import Tensor

_Side = Annotated[int, Field(ge=4, le=8192)]


def _square(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else value


ImageSize = Annotated[tuple[_Side, _Side], BeforeValidator(_square)]
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
