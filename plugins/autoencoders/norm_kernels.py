"""The Triton kernels of `norms`: where each stands in a norm is said there.

The one idea to hold: whatever reads a map reads all channels of a pixel together, as they lie.
"""

import triton
import triton.language as tl


@triton.jit
def sum_up(
    first,
    first_bias,
    second,
    second_bias,
    summed,
    moments,
    pixels,
    share,
    columns,
    D: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    PAD: tl.constexpr,  # noqa: N803
    OVERLAPS: tl.constexpr,  # noqa: N803
):
    """A share of an image's pixels: their sum, and each channel's mean and squares around it."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    across = D // WIDTH  # neighbours read the same pixels
    part, image = tl.program_id(0) // across, tl.program_id(1).to(tl.int64)
    begin = part * share
    end = tl.minimum(begin + share, pixels)
    own = tl.program_id(0) % across * WIDTH + tl.arange(0, WIDTH)[None, :]
    first += image * pixels * D
    if second is not None:
        second += image * pixels * D
    if summed is not None:
        summed += image * (pixels // columns + PAD) * (columns + PAD) * D
    # Near all others of its channel, so that the squares of what is left over lose nothing.
    middle = _value(first, first_bias, second, second_bias, begin, own, end, D)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    squares = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(begin, end, ROWS):
        pixel = start + tl.arange(0, ROWS)[:, None]
        value = _value(first, first_bias, second, second_bias, pixel, own, end, D)
        if summed is not None:
            value = value.to(summed.dtype.element_ty)  # what is normalised is what is handed on
            place = pixel // columns * (columns + PAD) + pixel % columns if PAD else pixel
            tl.store(summed + place * D + own, value, pixel < end)
            value = value.to(tl.float32)
        if moments is not None:
            value = tl.where(pixel < end, value - middle, 0.0)
            total += value
            squares += value * value
    if moments is not None:
        count = (end - begin).to(tl.float32)
        mean = tl.sum(total, 0, keep_dims=True) / count
        around = tl.sum(squares, 0, keep_dims=True) - mean * mean * count
        moments += (image * (tl.num_programs(0) // across) + part) * 2 * D
        tl.store(moments + own, middle + mean)
        tl.store(moments + D + own, around)


@triton.jit
def finish(
    moments,
    scales,
    weight,
    bias,
    eps,
    pixels,
    share,
    D: tl.constexpr,  # noqa: N803
    CHANNELS: tl.constexpr,  # noqa: N803
    SHARES: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    OVERLAPS: tl.constexpr,  # noqa: N803
):
    """A group of an image: from the moments of its channels' shares to what they amount to."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    group, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    part, own = tl.arange(0, BLOCK)[:, None], tl.arange(0, WIDTH)[None, :]
    there = (part < SHARES) & (own < CHANNELS)
    own += group * CHANNELS
    moments += (image * SHARES + part) * 2 * D + own
    means = tl.load(moments, there, 0.0)
    around = tl.load(moments + D, there, 0.0)
    count = tl.where(there, tl.minimum(share, pixels - part * share), 0).to(tl.float32)
    numbers = pixels.to(tl.float32) * CHANNELS
    mean = tl.sum(tl.sum(count * means, 0), 0) / numbers
    around += count * (means - mean) * (means - mean)
    inverse = 1 / tl.sqrt(tl.sum(tl.sum(around, 0), 0) / numbers + eps)
    own = group * CHANNELS + tl.arange(0, WIDTH)
    there = tl.arange(0, WIDTH) < CHANNELS
    scale = tl.load(weight + own, there, 0.0).to(tl.float32) * inverse
    shift = tl.load(bias + own, there, 0.0).to(tl.float32) - mean * scale
    tl.store(scales + image * 2 * D + own, scale, there)
    tl.store(scales + image * 2 * D + D + own, shift, there)


@triton.jit
def apply(
    maps,
    bias,
    scales,
    out,
    pixels,
    D: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    SILU: tl.constexpr,  # noqa: N803
    OVERLAPS: tl.constexpr,  # noqa: N803
):
    """Some pixels of an image."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    across, image = D // WIDTH, tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)[:, None]
    own = tl.program_id(0) % across * WIDTH + tl.arange(0, WIDTH)[None, :]
    value = _value(maps + image * pixels * D, bias, None, None, pixel, own, pixels, D)
    scale = tl.load(scales + image * 2 * D + own)
    shift = tl.load(scales + image * 2 * D + D + own)
    value = value * scale + shift
    if SILU:
        value = value / (1 + tl.exp(-value))
    out += image * pixels * D
    tl.store(out + pixel * D + own, value.to(out.dtype.element_ty), pixel < pixels)


@triton.jit
def held(
    first,
    first_bias,
    second,
    second_bias,
    summed,
    out,
    weight,
    bias,
    eps,
    pixels,
    D: tl.constexpr,  # noqa: N803
    CHANNELS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    SILU: tl.constexpr,  # noqa: N803
    OVERLAPS: tl.constexpr,  # noqa: N803
):
    """A group of an image."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    group, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first += image * pixels * D
    if second is not None:
        second += image * pixels * D
    pixel, own = tl.arange(0, BLOCK)[:, None], tl.arange(0, WIDTH)[None, :]
    known = own < CHANNELS
    there = (pixel < pixels) & known
    own += group * CHANNELS
    last = (group + 1) * CHANNELS
    value = _value(first, first_bias, second, second_bias, pixel, own, pixels, D, last)
    if summed is not None:
        value = value.to(summed.dtype.element_ty)
        tl.store(summed + image * pixels * D + pixel * D + own, value, there)
        value = value.to(tl.float32)
    numbers = pixels * CHANNELS
    value = tl.where(there, value, 0.0)
    value -= tl.sum(tl.sum(value, 0), 0) / numbers
    value = tl.where(there, value, 0.0)
    inverse = 1 / tl.sqrt(tl.sum(tl.sum(value * value, 0), 0) / numbers + eps)
    scale = tl.load(weight + own, known, 0.0).to(tl.float32) * inverse
    value = value * scale + tl.load(bias + own, known, 0.0).to(tl.float32)
    if SILU:
        value = value / (1 + tl.exp(-value))
    out += image * pixels * D
    tl.store(out + pixel * D + own, value.to(out.dtype.element_ty), there)


@triton.jit
def _value(
    first,
    first_bias,
    second,
    second_bias,
    pixel,
    own,
    end,
    D: tl.constexpr,  # noqa: N803
    last=None,
):
    """What adds up to pixels before `end`, in channels before `last`; 0 beyond."""
    there, known = pixel < end, own >= 0
    if last is not None:
        known = own < last
        there &= known
    value = tl.load(first + pixel * D + own, there, 0.0).to(tl.float32)
    if first_bias is not None:
        value += tl.load(first_bias + own, known, 0.0).to(tl.float32)
    if second is not None:
        value += tl.load(second + pixel * D + own, there, 0.0).to(tl.float32)
    if second_bias is not None:
        value += tl.load(second_bias + own, known, 0.0).to(tl.float32)
    return value
