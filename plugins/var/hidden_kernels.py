"""A bias and GELU, and both gradients, as two Triton kernels.

The one idea to hold: a program goes down some rows, so that what it sums for the bias stays in
registers. The shares' sums are written out and added by torch: always in the same order.

Imported only for tensors on a GPU: triton takes its time, and is not there on every platform.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

COLUMNS, ROWS = 1024, 4
"""Of a tile."""
SHARES = 264
"""Programs that share the rows of a tile's columns, at most: two for each of 132 processors."""


def activate(product: Float[Tensor, "n f"], bias: Float[Tensor, " f"]) -> Float[Tensor, "n f"]:
    """`gelu(product + bias)`, in the type of the product."""
    (n, f), product = product.shape, product.contiguous()
    out = torch.empty_like(product)
    with torch.cuda.device_of(product):
        _activate[(triton.cdiv(f, COLUMNS) * triton.cdiv(n, ROWS),)](
            product, bias, out, n, f, COLUMNS, ROWS, num_warps=8
        )
    return out


def gradients(
    of: Float[Tensor, "n f"], product: Float[Tensor, "n f"], bias: Float[Tensor, " f"]
) -> tuple[Float[Tensor, "n f"], Float[Tensor, " f"]]:
    """Of product and bias, from that of what `activate` made of them."""
    (n, f), of, product = product.shape, of.contiguous(), product.contiguous()
    share = max(triton.cdiv(triton.cdiv(n, SHARES), ROWS), 1) * ROWS
    shares = triton.cdiv(n, share)
    towards, sums = torch.empty_like(product), product.new_empty(shares, f, dtype=torch.float32)
    with torch.cuda.device_of(product):
        _gradients[(triton.cdiv(f, COLUMNS), shares)](
            of, product, bias, towards, sums, n, share, f, COLUMNS, ROWS, num_warps=8
        )
    return towards, sums.sum(0).to(bias.dtype)


@triton.jit
def _activate(
    product,
    bias,
    out,
    n,
    F: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
):
    """A tile."""
    across = (F + COLUMNS - 1) // COLUMNS
    own = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    row = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)[:, None]
    there = (row < n) & (own < F)
    here = row.to(tl.int64) * F + own
    x = tl.load(product + here, there, 0.0).to(tl.float32)
    x += tl.load(bias + own, own < F, 0.0).to(tl.float32)
    tl.store(out + here, (x * _open(x)).to(out.dtype.element_ty), there)


@triton.jit
def _gradients(
    of,
    product,
    bias,
    towards,
    sums,
    n,
    share,
    F: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
):
    """A share of the rows, in a tile's columns."""
    own = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    added = tl.load(bias + own, own < F, 0.0).to(tl.float32)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    begin = tl.program_id(1) * share
    for start in range(begin, tl.minimum(begin + share, n), ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        there = (row < n) & (own < F)
        here = row.to(tl.int64) * F + own
        x = tl.load(product + here, there, 0.0).to(tl.float32) + added
        slope = tl.load(of + here, there, 0.0).to(tl.float32)
        open = _open(x)
        slope *= open + x * open * (1 - open) * (1.5957691216057308 + 0.21406444881780092 * x * x)
        tl.store(towards + here, slope.to(towards.dtype.element_ty), there)
        total += slope
    tl.store(sums + tl.program_id(1) * F + own, tl.sum(total, 0, keep_dims=True), own < F)


@triton.jit
def _open(x):
    """How far GELU's tanh form, with sqrt(2 / pi) (x + 0.044715 x^3) in it, lets a number pass."""
    return 1 / (1 + tl.exp(-1.5957691216057308 * x - 0.07135481627260031 * x * x * x))
