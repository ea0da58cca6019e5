"""Maps as strips: the rows of an image follow one another, a pixel of 0 before and after each.

The one idea to hold: in a strip, three pixels in a row are one window of memory, also at the edges.
A strip is a tensor `b d h w` like any other map; only its strides tell, and what they leave out.
"""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Strip = Float[Tensor, "b d h w"]


def like(maps: Float[Tensor, "b d h w"], width: int | None = None) -> Strip:
    """An empty strip, with `width` channels; nothing is 0 in it yet."""
    _, d, h, w = maps.shape
    return empty(maps, width or d, h, w)


def empty(maps: Float[Tensor, "b d0 h0 w0"], d: int, h: int, w: int) -> Strip:
    """An empty strip of that size, otherwise like maps."""
    return view(maps.new_empty(len(maps), h * (w + 1) + 1, d), h, w)


def filled(maps: Float[Tensor, "b d h w"], width: int) -> Strip:
    """The maps as a strip with its zeros, and channels of 0 that make them `width`."""
    b, d, h, w = maps.shape
    strip = view(maps.new_zeros(b, h * (w + 1) + 1, width), h, w)
    strip[:, :d] = maps
    return strip


def view(whole: Float[Tensor, "b n d"], height: int, width: int) -> Strip:
    """The pixels of strips, `n = height * (width + 1) + 1` positions each, as they lie densely."""
    b, n, d = whole.shape
    strides = n * d, 1, (width + 1) * d, d
    return whole.as_strided((b, d, height, width), strides, whole.storage_offset() + d)


def whole(strip: Strip) -> Float[Tensor, "b n d"]:
    """All positions of strips, those included that are no pixels."""
    b, d, h, w = strip.shape
    n = h * (w + 1) + 1
    return strip.as_strided((b, n, d), (n * d, d, 1), strip.storage_offset() - d)


def bordered(strip: Strip) -> Strip:
    """The strip itself, with 0 in all that is no pixel."""
    positions = whole(strip)
    positions[:, :: strip.shape[3] + 1] = 0
    return strip


def is_strip(maps: Float[Tensor, "b d h w"]) -> bool:
    _, d, h, w = maps.shape
    return maps.stride() == ((h * (w + 1) + 1) * d, 1, (w + 1) * d, d)


def pointwise(strip: Strip, weight: Float[Tensor, "e d 1 1"]) -> Strip:
    """A convolution of 1 x 1; what it makes of what is no pixel, nobody may read."""
    return view(F.linear(whole(strip), weight.flatten(1)), *strip.shape[2:])
