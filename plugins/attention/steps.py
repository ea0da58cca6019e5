"""The backend with kernels of our own for training: a mask of steps, forward and backward.

The one idea to hold: what no query of a step sees is neither computed nor read, and its kernels are
operators, so that a block is compiled around them in one piece.
"""

from types import ModuleType

import torch
from torch import Tensor

import sandbox
from sandbox import AttentionRequest, Mask

from .plain import SdpaAttention, kept, kernels_limit, watched


class StepsAttention(SdpaAttention):
    """Triton kernels for a mask of steps: CUDA, heads of 16, 32, 64 or 128 channels.

    Queries, keys and values are read where they lie; what comes out, and their gradients, lie heads
    beside channels. Softmax and sums are in float32, whatever the type.
    """

    def limit(self, request: AttentionRequest) -> str | None:
        if reason := kernels_limit(request, "for steps"):
            return reason
        if request.mask.kind != "steps":
            return f"the kernels for steps are for a mask of steps, not: {request.mask.kind}"
        return _untried(request.device, request.dtype, request.head_dim)

    def compute(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
        if not torch.compiler.is_compiling() and watched():
            return super().compute(q, k, v, mask, scale)
        assert mask.step_lens is not None
        return _attend(q, k, v, list(mask.step_lens), scale)[0]


@kept
def _untried(device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """What a trial says: triton may be missing, or the compiler that it needs."""

    def trial() -> ModuleType:
        from . import steps_gradients, steps_kernel

        x = torch.zeros(1, 1, 2, head_dim, dtype=dtype, device=device)
        out, sums = steps_kernel.attend(x, x, x, [1, 1], 1.0)
        steps_gradients.gradients(out, x, x, x, out, sums, [1, 1], 1.0)
        return steps_kernel

    if sandbox.tried(trial, "attention under a mask of steps without its Triton kernels") is None:
        return "triton is not there, or cannot build the kernels for steps"
    return None


@torch.library.custom_op("var_sandbox::attend_steps", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, step_lens: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """What each query sees, and `b heads n` of float32 that its gradients are made with."""
    from . import steps_kernel

    return steps_kernel.attend(q, k, v, step_lens, scale)


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, step_lens: list[int], scale: float) -> tuple[Tensor, Tensor]:
    return _beside(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("var_sandbox::attend_steps_backward", mutates_args=())
def _gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    sums: Tensor,
    step_lens: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of queries, keys and values, from that of what was seen."""
    from . import steps_gradients

    return steps_gradients.gradients(dout, q, k, v, out, sums, step_lens, scale)


@_gradients.register_fake
def _(dout: Tensor, q: Tensor, *_others: object) -> tuple[Tensor, Tensor, Tensor]:
    return _beside(q), _beside(q), _beside(q)


def _beside(q: Tensor) -> Tensor:
    """`b heads n e` as the kernels lay it in memory: heads beside channels."""
    b, heads, n, e = q.shape
    return q.new_empty(b, n, heads, e).transpose(1, 2)


def _keep(ctx, inputs, output) -> None:
    (q, k, v, ctx.step_lens, ctx.scale), (out, sums) = inputs, output
    ctx.mark_non_differentiable(sums)
    ctx.save_for_backward(q, k, v, out, sums)


def _backward(ctx, dout, _):
    return *_gradients(dout, *ctx.saved_tensors, ctx.step_lens, ctx.scale), None, None


_attend.register_autograd(_backward, setup_context=_keep)
