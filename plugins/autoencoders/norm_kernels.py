"""The Triton kernels of `norms`: where each stands in a norm is said there.

The one idea to hold: whatever reads a map reads all channels of a pixel together, as they lie.
"""

import torch
import triton
import triton.language as tl

_HAS_PTX = tl.constexpr(not triton.knobs.runtime.interpret and torch.version.hip is None)
"""Whether NVIDIA's assembly can be written; not where kernels are interpreted."""


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
    row,
    image_size,
    to_row,
    to_image_size,
    D: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    APART: tl.constexpr,  # noqa: N803
    TO_APART: tl.constexpr,  # noqa: N803
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
    first += image * image_size
    if second is not None:
        second += image * image_size
    if summed is not None:
        summed += image * to_image_size
    # Near all others of its channel, so that the squares of what is left over lose nothing.
    start_place = begin // columns * row + begin % columns if APART else begin
    middle = _value(first, first_bias, second, second_bias, start_place, own, begin < end, D)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    squares = tl.zeros([ROWS, WIDTH], tl.float32)
    for start in range(begin, end, ROWS):
        pixel = start + tl.arange(0, ROWS)[:, None]
        there = pixel < end
        place = pixel // columns * row + pixel % columns if APART else pixel
        value = _value(first, first_bias, second, second_bias, place, own, there, D)
        if summed is not None:
            value = value.to(summed.dtype.element_ty)  # what is normalised is what is handed on
            place = pixel // columns * to_row + pixel % columns if TO_APART else pixel
            tl.store(summed + place * D + own, value, there)
            value = value.to(tl.float32)
        if moments is not None:
            value = tl.where(there, value - middle, 0.0)
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
def rounded(value):
    """To TF32, ties away from 0, as `convolving.rounded` has it."""
    near = ((value.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
    return tl.where(value == value, near, value)  # NaN stays


@triton.jit
def silu(value):
    """To float32's last digits: without what a division does for numbers that are not met here."""
    if _HAS_PTX:
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 t;
            mul.ftz.f32 t, $1, 0fBFB8AA3B;
            ex2.approx.ftz.f32 t, t;
            add.ftz.f32 t, t, 0f3F800000;
            rcp.approx.ftz.f32 t, t;
            mul.ftz.f32 $0, $1, t;
            }""",
            "=f,f",
            [value],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return value / (1 + tl.exp(-value))


@triton.jit
def finish(
    moments,
    scales,
    weight,
    bias,
    eps,
    pixels,
    share,
    positions,
    row,
    D: tl.constexpr,  # noqa: N803
    CHANNELS: tl.constexpr,  # noqa: N803
    SHARES: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    REPEATS: tl.constexpr,  # noqa: N803
    OVERLAPS: tl.constexpr,  # noqa: N803
):
    """A group of an image: from the moments of its channels' shares to what they amount to.

    Every `row`-th position is no pixel.
    """
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
    begin = part % (SHARES // REPEATS) * share
    end = tl.minimum(begin + share, positions)
    count = tl.where(there, end - end // row - begin + begin // row, 0).to(tl.float32)
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
    columns,
    row,
    image_size,
    to_row,
    to_image_size,
    D: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    APART: tl.constexpr,  # noqa: N803
    TO_STRIP: tl.constexpr,  # noqa: N803
    ROUNDED: tl.constexpr,  # noqa: N803
    SILU: tl.constexpr,  # noqa: N803
    OVERLAPS: tl.constexpr,  # noqa: N803
):
    """Some pixels of an image; in a strip 0 stands before the first and after each row."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    across, image = D // WIDTH, tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)[:, None]
    there, column = pixel < pixels, pixel % columns
    own = tl.program_id(0) % across * WIDTH + tl.arange(0, WIDTH)[None, :]
    place = pixel // columns * row + column if APART else pixel
    value = _value(maps + image * image_size, None, None, None, place, own, there, D)
    scale = tl.load(scales + image * 2 * D + own)
    shift = tl.load(scales + image * 2 * D + D + own)
    if bias is not None:
        added = tl.load(bias + own).to(tl.float32)
        if maps.dtype.element_ty == tl.float32 and not ROUNDED:  # a large bias would cost digits
            value += added
        else:
            shift += added * scale
    value = value * scale + shift
    if SILU:
        value = silu(value)
    if ROUNDED:
        value = rounded(value)
    value = value.to(out.dtype.element_ty)
    out += image * to_image_size
    place = pixel // columns * to_row + column if TO_STRIP else pixel
    tl.store(out + place * D + own, value, there)
    if TO_STRIP:
        nothing = tl.zeros_like(value)
        tl.store(out + (place + 1) * D + own, nothing, there & (column == columns - 1))
        if tl.program_id(0) // across == 0:
            tl.store(out - D + own, tl.zeros([1, WIDTH], out.dtype.element_ty))


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
    value = _value(first, first_bias, second, second_bias, pixel, own, there, D, last)
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
        value = silu(value)
    out += image * pixels * D
    tl.store(out + pixel * D + own, value.to(out.dtype.element_ty), there)


@triton.jit
def _value(
    first,
    first_bias,
    second,
    second_bias,
    place,
    own,
    there,
    D: tl.constexpr,  # noqa: N803
    last=None,
):
    """What adds up to the numbers that are `there`, all in channels before `last`; 0 beyond."""
    here, known = place * D + own, own >= 0
    if last is not None:
        known = own < last
    value = tl.load(first + here, there, 0.0).to(tl.float32)
    if first_bias is not None:
        value += tl.load(first_bias + own, known, 0.0).to(tl.float32)
    if second is not None:
        value += tl.load(second + here, there, 0.0).to(tl.float32)
    if second_bias is not None:
        value += tl.load(second_bias + own, known, 0.0).to(tl.float32)
    return value
