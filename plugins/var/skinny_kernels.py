"""The two Triton kernels of `skinny`, as their programs run on a GPU.

The one idea to hold: a program owns a few output channels and streams their weights once. These
wait for no kernel before, so where it may start while one runs, it sends for them at once.
"""

import triton
import triton.language as tl

_TWICE_ROOT = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)


@triton.jit(do_not_specialize=["num_tokens"])  # one build for all steps of a plan
def linear(
    x,
    weight,
    bias,
    out,
    num_tokens,
    D: tl.constexpr,  # noqa: N803
    OUT: tl.constexpr,  # noqa: N803
    GELU: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    CHANNELS: tl.constexpr,  # noqa: N803
    STEP: tl.constexpr,  # noqa: N803
    OVERLAPS: tl.constexpr,  # noqa: N803
):
    """A few output channels of all tokens."""
    if OVERLAPS:
        _send_for(weight + tl.program_id(0) * (CHANNELS * D), D, D, CHANNELS)
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    row = tl.arange(0, ROWS)[None, :]
    there = row < num_tokens
    product = tl.zeros([CHANNELS, ROWS], tl.float32)
    product += tl.load(bias + channel).to(tl.float32)[:, None]
    for start in range(0, D, STEP):
        own = start + tl.arange(0, STEP)
        w = tl.load(weight + channel[:, None] * D + own[None, :])
        product = tl.dot(w, tl.load(x + row * D + own[:, None], there, 0.0), product)
    if GELU:
        steep = _TWICE_ROOT * (product + 0.044715 * product * product * product)
        product = product / (1 + tl.exp(-steep))
    tl.store(out + row * OUT + channel[:, None], product.to(out.dtype.element_ty), there)


@triton.jit(do_not_specialize=["num_tokens", "n"])  # one build for all steps of a plan
def gated_linear(
    y,
    weight,
    bias,
    gate,
    residual,
    out,
    partial,
    arrived,
    num_tokens,
    n,
    image_stride,
    head_stride,
    token_stride,
    gate_stride,
    HEADS: tl.constexpr,  # noqa: N803
    E: tl.constexpr,  # noqa: N803
    OUT: tl.constexpr,  # noqa: N803
    SPLITS: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    CHANNELS: tl.constexpr,  # noqa: N803
    STEP: tl.constexpr,  # noqa: N803
    OVERLAPS: tl.constexpr,  # noqa: N803
):
    """A few output channels of all tokens, or a part of their sums.

    Whoever is the last to have its part adds them all, always in the same order.
    """
    tile = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    if OVERLAPS:
        first = weight + tile * (CHANNELS * HEADS * E) + split * (HEADS * E // SPLITS)
        _send_for(first, HEADS * E, HEADS * E // SPLITS, CHANNELS)
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    channel = tile * CHANNELS + tl.arange(0, CHANNELS)
    row = tl.arange(0, ROWS)
    there = row[None, :] < num_tokens
    read = y + (row // n * image_stride + row % n * token_stride)[None, :]
    product = tl.zeros([CHANNELS, ROWS], tl.float32)
    for start in range(0, HEADS * E // SPLITS, STEP):
        own = split * (HEADS * E // SPLITS) + start + tl.arange(0, STEP)
        w = tl.load(weight + channel[:, None] * (HEADS * E) + own[None, :])
        if HEADS > 1:
            own = own // E * head_stride + own % E
        product = tl.dot(w, tl.load(read + own[:, None], there, 0.0), product)
    if SPLITS == 1:
        _add(product, bias, gate, residual, out, channel, row, num_tokens, n, gate_stride, OUT)
    else:
        held = tl.arange(0, CHANNELS)[:, None] * ROWS + row[None, :]
        parts = partial + tile * (SPLITS * CHANNELS * ROWS) + held
        tl.store(parts + split * (CHANNELS * ROWS), product)
        tl.debug_barrier()  # all of it is stored before it is counted
        if tl.atomic_add(arrived + tile, 1) == SPLITS - 1:
            product = tl.zeros([CHANNELS, ROWS], tl.float32)
            for each in tl.static_range(SPLITS):
                product += tl.load(parts + each * (CHANNELS * ROWS), cache_modifier=".cg")
            tl.store(arrived + tile, 0)
            _add(product, bias, gate, residual, out, channel, row, num_tokens, n, gate_stride, OUT)


@triton.jit
def _add(
    product,
    bias,
    gate,
    residual,
    out,
    channel,
    row,
    num_tokens,
    n,
    gate_stride,
    OUT: tl.constexpr,  # noqa: N803
):
    """Store the residual and the gated product with its bias."""
    channel, row = channel[:, None], row[None, :]
    there = row < num_tokens
    own = row * OUT + channel
    product += tl.load(bias + channel).to(tl.float32)
    product *= tl.load(gate + row // n * gate_stride + channel, there, 0.0).to(tl.float32)
    product += tl.load(residual + own, there, 0.0).to(tl.float32)
    tl.store(out + own, product.to(out.dtype.element_ty), there)


@triton.jit
def _send_for(
    weight,
    WIDTH: tl.constexpr,  # noqa: N803
    PART: tl.constexpr,  # noqa: N803
    CHANNELS: tl.constexpr,  # noqa: N803
):
    """Start the first `PART` of each row of `WIDTH` on its way to the cache that programs share.

    No number is read, so none can be read too early.
    """
    line: tl.constexpr = 1024 // weight.dtype.element_ty.primitive_bitwidth  # 128 bytes
    lines: tl.constexpr = PART // line
    for start in tl.static_range(0, CHANNELS * lines, 256):
        turn = tl.minimum(start + tl.arange(0, 256), CHANNELS * lines - 1)
        address = weight + turn // lines * WIDTH + turn % lines * line
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; // dummy $0",
            "=r,l",
            [address.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
