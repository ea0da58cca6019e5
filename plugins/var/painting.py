"""What happens between two steps on a GPU, as two Triton kernels: a canvas is painted, and shrunk.

The one idea to hold: growing a step's codes and the convolution after it are linear, one along each
axis. So a program makes one row of the canvas at once, from the codes themselves: rows are mixed,
then channels, then columns, and no map that was grown is ever written.

Imported only for canvases on a GPU: triton takes its time, and is not there on every platform.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

import sandbox

BLOCK = 16
"""Channels of a canvas that a program paints: what a product takes at least."""


def paint(
    canvas: Float[Tensor, "b c h w"],
    codes: Float[Tensor, "b n c"],
    rows: Float[Tensor, "h i"],
    columns: Float[Tensor, "w j"],
    phi: tuple[Float[Tensor, "c c 3 3"], Float[Tensor, " c"], float] | None,
) -> Float[Tensor, "b c h w"]:
    """The canvas with codes of i x j cells grown and added, channels together; all in float32.

    `rows` and `columns` grow them; `phi` is a convolution's weights and its share in what is added.
    """
    (b, c, h, w), (i, j) = canvas.shape, (rows.shape[1], columns.shape[1])
    canvas = canvas.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(canvas, memory_format=torch.channels_last)
    if codes.stride(2) != 1 or codes.stride(1) != c:
        codes = codes.contiguous()
    weight, bias, ratio = phi or (None, None, 0.0)
    if weight is not None:  # out of c 3 3, a program would read each number by itself
        weight = weight.permute(3, 2, 1, 0).contiguous()
    with torch.cuda.device_of(canvas):
        _paint[(triton.cdiv(c, BLOCK), h, b)](
            canvas,
            codes,
            rows,
            columns,
            weight,
            bias,
            out,
            codes.stride(0),
            i,
            j,
            ratio,
            h,
            w,
            c,
            *map(_padded, (i, j, w, 3 * c)),
            BLOCK,
            **sandbox.overlapping(canvas.device),
            num_warps=4,
        )
    return out


def shrink(
    canvas: Float[Tensor, "b c h w"], rows: Float[Tensor, "i h"], columns: Float[Tensor, "j w"]
) -> Float[Tensor, "b ij c"]:
    """The canvas' means over i x j areas, row by row; `rows` and `columns` hold their shares."""
    (b, c, h, w), (i, j) = canvas.shape, (rows.shape[0], columns.shape[0])
    canvas = canvas.contiguous(memory_format=torch.channels_last)
    out = canvas.new_empty(b, i * j, c)
    with torch.cuda.device_of(canvas):
        _shrink[(i, b)](
            canvas,
            rows,
            columns,
            out,
            i,
            j,
            h,
            w,
            c,
            *map(_padded, (j, w, c)),
            **sandbox.overlapping(canvas.device),
            num_warps=4,
        )
    return out


def _padded(number: int) -> int:
    """What matrix units take; one number for most steps, so that there are few builds."""
    return max(16, triton.next_power_of_2(number))


@triton.jit(do_not_specialize=["batch_stride", "of_rows", "of_columns"])
def _paint(
    canvas,
    codes,
    rows,
    columns,
    weight,
    bias,
    out,
    batch_stride,
    of_rows,
    of_columns,
    ratio,
    H: tl.constexpr,  # noqa: N803
    W: tl.constexpr,  # noqa: N803
    C: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    TRIPLE: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    OVERLAPS: tl.constexpr,  # noqa: N803
):
    """A row of an image's canvas, in a few channels."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    y, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    codes += image * batch_stride
    # Three rows that the convolution reads, side by side, in the step's own columns.
    column, three = tl.arange(0, COLUMNS)[:, None], tl.arange(0, TRIPLE)[None, :]
    row, channel = y + three // C - 1, three % C
    known = (three < 3 * C) & (row >= 0) & (row < H)
    mixed = tl.zeros([COLUMNS, TRIPLE], tl.float32)
    for each in tl.static_range(ROWS):
        there = known & (each < of_rows)
        share = tl.load(rows + row * of_rows + each, there, 0.0)
        place = (each * of_columns + column) * C + channel
        mixed += share * tl.load(codes + place, there & (column < of_columns), 0.0)
    cell, own = tl.arange(0, WIDTH)[:, None], tl.arange(0, BLOCK)[None, :]
    own += tl.program_id(0) * BLOCK
    three, column = tl.arange(0, TRIPLE)[:, None], tl.arange(0, COLUMNS)[None, :]
    row, channel = three // C, three % C
    total = tl.zeros([WIDTH, BLOCK], tl.float32)
    for x in tl.static_range(3):
        kernel = tl.where((row == 1) & (channel == own) & (x == 1), 1 - ratio, 0.0)
        if weight is not None:
            place = (x * 3 * C + three) * C + own
            kernel += ratio * tl.load(weight + place, (three < 3 * C) & (own < C), 0.0)
        seen = cell + x - 1
        there = (seen >= 0) & (seen < W) & (column < of_columns)
        grown = tl.load(columns + seen * of_columns + column, there, 0.0)
        total += tl.dot(
            grown, tl.dot(mixed, kernel, input_precision="ieee"), input_precision="ieee"
        )
    there = (cell < W) & (own < C)
    place = ((image * H + y) * W + cell) * C + own
    total += tl.load(canvas + place, there, 0.0)
    if bias is not None:
        total += ratio * tl.load(bias + own, own < C, 0.0)
    tl.store(out + place, total, there)


@triton.jit(do_not_specialize=["of_rows", "of_columns"])
def _shrink(
    canvas,
    rows,
    columns,
    out,
    of_rows,
    of_columns,
    H: tl.constexpr,  # noqa: N803
    W: tl.constexpr,  # noqa: N803
    C: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    CHANNELS: tl.constexpr,  # noqa: N803
    OVERLAPS: tl.constexpr,  # noqa: N803
):
    """A row of an image's cells."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    cell, own = tl.arange(0, WIDTH)[:, None], tl.arange(0, CHANNELS)[None, :]
    canvas += image * H * W * C
    total = tl.zeros([WIDTH, CHANNELS], tl.float32)
    first, end = row * H // of_rows, ((row + 1) * H + of_rows - 1) // of_rows
    for y in tl.static_range(H):  # all are on their way at once; only what counts is read
        there = (cell < W) & (own < C) & (y >= first) & (y < end)
        value = tl.load(canvas + (y * W + cell) * C + own, there, 0.0)
        total += tl.load(rows + row * H + y) * value
    column, seen = tl.arange(0, COLUMNS)[:, None], tl.arange(0, WIDTH)[None, :]
    there = (column < of_columns) & (seen < W)
    shares = tl.load(columns + column * W + seen, there, 0.0)
    total = tl.dot(shares, total, input_precision="ieee")
    place = ((image * of_rows + row) * of_columns + column) * C + own
    tl.store(out + place, total, (column < of_columns) & (own < C))
