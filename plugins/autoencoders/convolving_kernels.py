"""The Triton kernel of `convolving`: a convolution that also adds, and takes moments.

The one idea to hold: the GPU copies tiles by itself, and gives 0 for what is beyond a tensor; so
rows above and below an image need no care.
"""

import triton
import triton.language as tl


@triton.jit
def convolve(
    windows,
    last_windows,
    weight,
    rest_weight,
    last_weight,
    last_rest_weight,
    out,
    rest_out,
    beside,
    rest_beside,
    bias,
    beside_bias,
    moments,
    positions,
    row,
    WINDOW: tl.constexpr,  # noqa: N803
    E: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    FIRST: tl.constexpr,  # noqa: N803
    REST: tl.constexpr,  # noqa: N803
):
    """A tile of positions of one image, and as many channels as a program takes.

    These are FIRST and REST, since a block has a power of two of them; likewise a window is read
    BLOCK numbers at a time, and then what is left of it.
    """
    across: tl.constexpr = E // (FIRST + REST)
    tile, image = tl.program_id(0) // across, tl.program_id(1)
    begin, channel = tile * TILE, tl.program_id(0) % across * (FIRST + REST)
    total = tl.zeros([TILE, FIRST], tl.float32)
    rest = tl.zeros([TILE, REST or 16], tl.float32)
    blocks: tl.constexpr = WINDOW // BLOCK
    left: tl.constexpr = WINDOW % BLOCK
    for step in range(3 * blocks):
        tap, start = step // blocks, step % blocks * BLOCK
        at = begin + (tap - 1) * row
        read = windows.load([image, at, start]).reshape(TILE, BLOCK)
        total = tl.dot(read, weight.load([channel, tap * WINDOW + start]).T, total)
        if REST:
            more = rest_weight.load([channel + FIRST, tap * WINDOW + start])
            rest = tl.dot(read, more.T, rest)
    if left:
        for tap in range(3):
            at = begin + (tap - 1) * row
            start = tap * WINDOW + WINDOW - left
            read = last_windows.load([image, at, WINDOW - left]).reshape(TILE, left)
            total = tl.dot(read, last_weight.load([channel, start]).T, total)
            if REST:
                more = last_rest_weight.load([channel + FIRST, start])
                rest = tl.dot(read, more.T, rest)
    position = begin + tl.arange(0, TILE)
    there = ((position < positions) & (position % row < row - 1))[:, None]
    end = tl.minimum(begin + TILE, positions)
    pixels = end - end // row - begin + begin // row
    count = tl.maximum(pixels, 1).to(tl.float32)
    moments += (image.to(tl.int64) * (tl.num_programs(0) // across) + tile) * 2 * E
    sums = bias, beside_bias, moments, E
    _finish(total, there, count, out, beside, image, begin, channel, sums, TILE, FIRST)
    if REST:
        channel += FIRST
        _finish(rest, there, count, rest_out, rest_beside, image, begin, channel, sums, TILE, REST)


@triton.jit
def _finish(
    value,
    there,
    count,
    out,
    beside,
    image,
    begin,
    channel,
    sums,
    TILE: tl.constexpr,  # noqa: N803
    SOME: tl.constexpr,  # noqa: N803
):
    """Add what is to be added; write the sum, 0 where no pixel is, and each channel's moments."""
    bias, beside_bias, moments, E = sums  # noqa: N806
    own = channel + tl.arange(0, SOME)
    if bias is not None:
        value += tl.load(bias + own).to(tl.float32)[None, :]
    if beside_bias is not None:
        value += tl.load(beside_bias + own).to(tl.float32)[None, :]
    if beside is not None:
        value += beside.load([image, begin, channel]).reshape(TILE, SOME).to(tl.float32)
    value = tl.where(there, value, 0.0).to(out.dtype)
    out.store([image, begin, channel], value.reshape(1, TILE, SOME))
    value = value.to(tl.float32)  # what is normalised is what is handed on
    mean = tl.sum(value, 0) / count
    value = tl.where(there, value - mean[None, :], 0.0)
    tl.store(moments + own, mean)
    tl.store(moments + E + own, tl.sum(value * value, 0))
