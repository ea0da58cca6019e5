"""Four maps, one for each parity of row and column, as the map of twice the size: a Triton kernel.

The one idea to hold: it only moves numbers, a row at a time, and all channels of a pixel together.

Imported only for maps on a GPU: triton takes its time, and is not there on every platform.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

BLOCK = 2048
"""Numbers of a row that a program moves."""


def interleave(parts: Float[Tensor, "b four_e h w"]) -> Float[Tensor, "b e hh ww"]:
    """The doubled map of its four parities `(p q e)`, odd rows (p) and columns (q) first.

    Together these make the map and one pixel more around it, which is left out. Channels lie
    together in both.
    """
    parts = parts.permute(0, 2, 3, 1).contiguous()
    b, h, w, four_e = parts.shape
    e, height, width = four_e // 4, 2 * h - 2, 2 * w - 2
    out = parts.new_empty(b, height, width, e)
    with torch.cuda.device_of(parts):
        _interleave[(b * height, triton.cdiv(width * e, BLOCK))](
            parts, out, h, w, e, BLOCK, num_warps=4
        )
    return out.permute(0, 3, 1, 2)


@triton.jit
def _interleave(
    parts,
    out,
    H: tl.constexpr,  # noqa: N803
    W: tl.constexpr,  # noqa: N803
    E: tl.constexpr,  # noqa: N803
    SIZE: tl.constexpr,  # noqa: N803
):
    """A part of a row; that and each pixel count one more in what is interleaved."""
    row, own = tl.program_id(0), tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    image, y = row // (2 * H - 2), row % (2 * H - 2) + 1
    x, there = own // E + 1, own < (2 * W - 2) * E
    parts += ((image * H + y // 2) * W).to(tl.int64) * (4 * E) + y % 2 * (2 * E)
    numbers = tl.load(parts + x // 2 * (4 * E) + x % 2 * E + own % E, there)
    tl.store(out + row.to(tl.int64) * ((2 * W - 2) * E) + own, numbers, there)
