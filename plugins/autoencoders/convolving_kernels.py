"""The Triton kernels of `convolving`: convolutions that also add, and take moments.

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
    OVERLAPS: tl.constexpr,  # noqa: N803
):
    """A tile of positions of one image, and as many channels as a program takes."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    across: tl.constexpr = E // (FIRST + REST)
    tile, image = tl.program_id(0) // across, tl.program_id(1)
    begin, channel = tile * TILE, tl.program_id(0) % across * (FIRST + REST)
    weights = weight, rest_weight, last_weight, last_rest_weight
    read = windows, last_windows
    total, rest = _products(
        read, weights, image, begin - row, channel, row, 3, WINDOW, TILE, BLOCK, FIRST, REST
    )
    there, count = _pixels(begin, positions, row, TILE)
    moments += (image.to(tl.int64) * (tl.num_programs(0) // across) + tile) * 2 * E
    biases = bias, beside_bias
    value = _added(total, biases, beside, image, begin, channel, there, out.dtype, TILE, FIRST)
    out.store([image, begin, channel], value.reshape(1, TILE, FIRST))
    _moments(value, there, count, moments + channel + tl.arange(0, FIRST), E)
    if REST:
        channel += FIRST
        value = _added(
            rest, biases, rest_beside, image, begin, channel, there, out.dtype, TILE, REST
        )
        rest_out.store([image, begin, channel], value.reshape(1, TILE, REST))
        _moments(value, there, count, moments + channel + tl.arange(0, REST), E)


@triton.jit
def convolve_doubled(
    windows,
    last_windows,
    weight,
    rest_weight,
    last_weight,
    last_rest_weight,
    out,
    bias,
    moments,
    positions,
    row,
    image_size,
    WINDOW: tl.constexpr,  # noqa: N803
    E: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    FIRST: tl.constexpr,  # noqa: N803
    REST: tl.constexpr,  # noqa: N803
    OVERLAPS: tl.constexpr,  # noqa: N803
):
    """The same, of one parity of the doubled map's rows and columns: 2 x 2 pixels around each."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    across: tl.constexpr = E // (FIRST + REST)
    parity, image = tl.program_id(0) // across % 4, tl.program_id(1)
    tile, tiles = tl.program_id(0) // (4 * across), tl.num_programs(0) // (4 * across)
    begin, channel = tile * TILE, tl.program_id(0) % across * (FIRST + REST)
    even_row, even_column = parity // 2, parity % 2
    at = begin + 1 - even_column - even_row * row
    weights = weight, rest_weight, last_weight, last_rest_weight
    read, rows = (windows, last_windows), parity * E + channel
    total, rest = _products(
        read, weights, image, at, rows, row, 2, WINDOW, TILE, BLOCK, FIRST, REST
    )
    there, count = _pixels(begin, positions, row, TILE)
    moments += (image.to(tl.int64) * 4 * tiles + parity * tiles + tile) * 2 * E
    position = begin + tl.arange(0, TILE)
    place = (2 * (position // row) + 1 - even_row) * (2 * row - 1)
    place += 2 * (position % row) + 1 - even_column
    out += image.to(tl.int64) * image_size + place[:, None] * E
    dtype: tl.constexpr = out.dtype.element_ty
    own = channel + tl.arange(0, FIRST)
    value = _added(total, (bias, None), None, image, begin, channel, there, dtype, TILE, FIRST)
    tl.store(out + own[None, :], value, there)
    _moments(value, there, count, moments + own, E)
    if REST:
        channel += FIRST
        own = channel + tl.arange(0, REST)
        value = _added(rest, (bias, None), None, image, begin, channel, there, dtype, TILE, REST)
        tl.store(out + own[None, :], value, there)
        _moments(value, there, count, moments + own, E)


@triton.jit
def _products(
    read,
    weights,
    image,
    at,
    channel,
    row,
    ROWS: tl.constexpr,  # noqa: N803
    WINDOW: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    FIRST: tl.constexpr,  # noqa: N803
    REST: tl.constexpr,  # noqa: N803
):
    """Windows from `at` on, in so many rows, times the weights of channels.

    These are FIRST and REST, since a block has a power of two of them; likewise a window is read
    BLOCK numbers at a time, and then what is left of it.
    """
    windows, last_windows = read
    weight, rest_weight, last_weight, last_rest_weight = weights
    total = tl.zeros([TILE, FIRST], tl.float32)
    rest = tl.zeros([TILE, REST or 16], tl.float32)
    blocks: tl.constexpr = WINDOW // BLOCK
    left: tl.constexpr = WINDOW % BLOCK
    for step in range(ROWS * blocks):
        tap, start = step // blocks, step % blocks * BLOCK
        numbers = windows.load([image, at + tap * row, start]).reshape(TILE, BLOCK)
        total = tl.dot(numbers, weight.load([channel, tap * WINDOW + start]).T, total)
        if REST:
            more = rest_weight.load([channel + FIRST, tap * WINDOW + start])
            rest = tl.dot(numbers, more.T, rest)
    if left:
        for tap in range(ROWS):
            start = tap * WINDOW + WINDOW - left
            numbers = last_windows.load([image, at + tap * row, WINDOW - left]).reshape(TILE, left)
            total = tl.dot(numbers, last_weight.load([channel, start]).T, total)
            if REST:
                more = last_rest_weight.load([channel + FIRST, start])
                rest = tl.dot(numbers, more.T, rest)
    return total, rest


@triton.jit
def _pixels(begin, positions, row, TILE: tl.constexpr):  # noqa: N803
    """Which positions of a tile are pixels, and how many are."""
    position = begin + tl.arange(0, TILE)
    there = (position < positions) & (position % row < row - 1)
    end = tl.minimum(begin + TILE, positions)
    pixels = end - end // row - begin + begin // row
    return there[:, None], tl.maximum(pixels, 1).to(tl.float32)


@triton.jit
def _added(
    value,
    biases,
    beside,
    image,
    begin,
    channel,
    there,
    dtype: tl.constexpr,
    TILE: tl.constexpr,  # noqa: N803
    SOME: tl.constexpr,  # noqa: N803
):
    """The sum of all that is to be added, in its type; 0 where no pixel is."""
    own = channel + tl.arange(0, SOME)
    if biases[0] is not None:
        value += tl.load(biases[0] + own).to(tl.float32)[None, :]
    if biases[1] is not None:
        value += tl.load(biases[1] + own).to(tl.float32)[None, :]
    if beside is not None:
        value += beside.load([image, begin, channel]).reshape(TILE, SOME).to(tl.float32)
    return tl.where(there, value, 0.0).to(dtype)


@triton.jit
def _moments(value, there, count, moments, E: tl.constexpr):  # noqa: N803
    """Write each channel's mean, and its squares around that."""
    value = value.to(tl.float32)  # what is normalised is what is handed on
    mean = tl.sum(value, 0) / count
    value = tl.where(there, value - mean[None, :], 0.0)
    tl.store(moments, mean)
    tl.store(moments + E, tl.sum(value * value, 0))
