"""A convolution of a map with every pixel four times, made of the map as it is.

The one idea to hold: rows 2i - 1, 2i, 2i + 1 of the doubled map are rows i - 1, i, i of the map,
and those around 2i + 1 are i, i, i + 1. So each parity of row and column sees 2 x 2 pixels, through
sums of the weights: one convolution gives all four, for 4/9 of the products.
"""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor


def double(weight: Float[Tensor, "e d 3 3"]) -> Float[Tensor, "four_e d 2 2"]:
    """The weights of a 3 x 3 convolution (padding 1) of the doubled map, for the map (padding 1).

    The four parities come out one after the other, odd rows and columns first; `interleave` puts
    them in their places. The sums are taken in float32 at least and rounded once, to the weights'
    type. Channels lie together.
    """
    sums = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for axis in (2, 4):  # what was 3 wide becomes two parities by two pixels
        first, middle, last = sums.unbind(axis)
        odd, even = (first + middle, last), (first, middle + last)
        sums = torch.stack([torch.stack(each, axis) for each in (odd, even)], axis)
    sums = rearrange(sums, "e d p y q x -> (p q e) d y x").to(weight.dtype)
    return sums.contiguous(memory_format=torch.channels_last)
