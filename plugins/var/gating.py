"""What stands between two products of a block, as one Triton kernel: the gate, the sum, the norm.

The one idea to hold: what ends one branch and what begins the next read the same token, so a
program adds, gates, normalises and modulates it at once; sizes are known to it only where they must
be, so that one build serves steps of any number of tokens and nothing is compiled for each.

Imported only for tokens on a GPU: triton takes its time, and is not there on every platform.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

import sandbox

from .blocks import LAYER_NORM_EPS

_EPS = tl.constexpr(LAYER_NORM_EPS)


def gated_norm(
    x: Float[Tensor, "b n d"],
    branch: tuple[Float[Tensor, "b n d"], Float[Tensor, "b 1 d"]] | None,
    shift: Float[Tensor, "b 1 d"],
    scale: Float[Tensor, "b 1 d"],
) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b n d"]]:
    """Tokens with a branch added, and their layer norm, scaled by 1 + `scale` and shifted.

    `branch` is what was computed beside them and its gate; without it the tokens are as they were.
    The norm is of the type of `shift`. Raises ValueError where shapes or types do not fit.
    """
    (b, n, d), y, gate = x.shape, *(branch or (None, None))
    fits = [t is None or (t.shape, t.dtype) == (x.shape, x.dtype) for t in (x, y)]
    fits += [t is None or (t.shape, t.stride(2)) == ((b, 1, d), 1) for t in (gate, shift, scale)]
    if not all(fits):
        raise ValueError(f"no norm of tokens {x.dtype} {tuple(x.shape)} and what is beside them")
    added = x if y is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    normed = x.new_empty(b, n, d, dtype=shift.dtype)
    if not x.numel():
        return added, normed
    block = triton.next_power_of_2(d)
    with torch.cuda.device_of(x):
        _gated_norm[(b * n,)](
            x.contiguous(),
            None if y is None else y.contiguous(),
            gate,
            shift,
            scale,
            added,
            normed,
            n,
            0 if gate is None else gate.stride(0),
            shift.stride(0),
            scale.stride(0),
            d,
            block,
            **sandbox.overlapping(x.device),
            num_warps=min(max(block // 256, 1), 8),
        )
    return added, normed


@triton.jit(do_not_specialize=["n"])  # one build for all steps
def _gated_norm(
    x,
    y,
    gate,
    shift,
    scale,
    added,
    normed,
    n,
    gate_stride,
    shift_stride,
    scale_stride,
    D: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    OVERLAPS: tl.constexpr,  # noqa: N803
):
    """One token."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    image = token // n
    own = tl.arange(0, BLOCK)
    there = own < D
    here = token * D + own
    value = tl.load(x + here, there, 0.0).to(tl.float32)
    moved = tl.load(shift + image * shift_stride + own, there, 0.0).to(tl.float32)
    gain = 1 + tl.load(scale + image * scale_stride + own, there, 0.0).to(tl.float32)
    if y is not None:
        opened = tl.load(gate + image * gate_stride + own, there, 0.0).to(tl.float32)
        value += tl.load(y + here, there, 0.0).to(tl.float32) * opened
        value = value.to(added.dtype.element_ty)  # what is normalised is what is handed on
        tl.store(added + here, value, there)
        value = value.to(tl.float32)
    value -= tl.sum(value, 0) / D
    value = tl.where(there, value, 0.0)
    inverse = 1 / tl.sqrt(tl.sum(value * value, 0) / D + _EPS)
    value = value * inverse * gain + moved
    tl.store(normed + here, value.to(normed.dtype.element_ty), there)
