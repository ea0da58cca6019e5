"""From the product of queries, keys and values to what attention reads, in training on a GPU.

The one idea to hold: the gradient of x / |x| needs x / |x| and |x| alone. Attention keeps the first
for its own gradients, so all that is kept besides is one norm a token and head: not the product.
And the product's bias is added here, since its gradient is a sum of what then passes by.
"""

from functools import cache
from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

import sandbox

HALVES = torch.float16, torch.bfloat16
Heads = Float[Tensor, "b heads n e"]


def half(x: Float[Tensor, "b n d"], weight: Float[Tensor, "f d"]) -> torch.dtype | None:
    """The 16-bit type of their product, if it is one on a GPU with gradients to come."""
    if not (x.is_cuda and torch.is_grad_enabled() and weight.requires_grad):
        return None
    cast = torch.is_autocast_enabled("cuda")
    dtype = torch.get_autocast_dtype("cuda") if cast else weight.dtype
    return dtype if dtype in HALVES else None


def suits(x: Float[Tensor, "b n d"], weight: Float[Tensor, "three_d d"], heads: int) -> bool:
    """Whether `part` is for their product: of 16 bits, on a GPU, with gradients to come."""
    dtype, e = half(x, weight), len(weight) // (3 * heads)
    return dtype is not None and e <= 256 and not e & (e - 1) and _runs(x.device, dtype, heads, e)


@torch.compiler.assume_constant_result  # compiled code asks while it is made
def _runs(device: torch.device, dtype: torch.dtype, heads: int, e: int) -> bool:
    return _kernels(device, dtype, heads, e) is not None


@cache
def _kernels(device: torch.device, dtype: torch.dtype, heads: int, e: int) -> ModuleType | None:
    """Its kernels, after a trial: triton may be missing, or the compiler that it needs."""

    def trial() -> ModuleType:
        from . import training_kernel as kernels

        scale = torch.zeros(1, heads, 1, 1, device=device)
        product = torch.ones(1, 1, 3 * heads * e, dtype=dtype, device=device)
        bias = torch.zeros(3 * heads * e, device=device)
        q, k, v, norms = kernels.part(product, bias, scale)
        kernels.gather(q, k, v, q, k, norms, scale)
        return kernels

    return sandbox.tried(trial, "queries and keys normalised without their Triton kernels")


def part(
    product: Float[Tensor, "b n three_d"],
    bias: Float[Tensor, " three_d"],
    log_scale: Float[Tensor, "1 heads 1 1"],
) -> tuple[Heads, Heads, Heads]:
    """Queries, keys and values of `product + bias`, as `SelfAttention.project` makes them with
    `qk_norm`; the sum is made in float32.

    In memory a token's heads lie side by side, as attention's output then does, too. The gradient
    takes the directions of queries and keys from what is returned, so from rounded numbers: its
    error is that of a gradient which was itself rounded to their type once more. It has no
    gradient of its own.
    """
    q, k, v, _ = _part(product, bias, log_scale)
    return q, k, v


@torch.library.custom_op("var_sandbox::part", mutates_args=())
def _part(
    product: Tensor, bias: Tensor, log_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values, and the norms `2 b n heads` of the first two, float32."""
    from . import training_kernel

    return training_kernel.part(product, bias, log_scale)


@_part.register_fake
def _(product: Tensor, bias: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (b, n, three_d), heads = product.shape, log_scale.shape[1]
    e = three_d // (3 * heads)
    q, k, v = (product.new_empty(b, n, heads, e).transpose(1, 2) for _ in range(3))
    return q, k, v, product.new_empty(2, b, n, heads, dtype=torch.float32)


@torch.library.custom_op("var_sandbox::gather", mutates_args=())
def _gather(
    dq: Tensor, dk: Tensor, dv: Tensor, q: Tensor, k: Tensor, norms: Tensor, log_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `_part`'s arguments, the bias' in float32, from those of what it made."""
    from . import training_kernel

    return training_kernel.gather(dq, dk, dv, q, k, norms, log_scale)


@_gather.register_fake
def _(
    dq: Tensor, dk: Tensor, dv: Tensor, q: Tensor, k: Tensor, norms: Tensor, log_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    b, heads, n, e = q.shape
    three_d = 3 * heads * e
    return q.new_empty(b, n, three_d), norms.new_empty(three_d), torch.empty_like(log_scale)


def _keep(ctx, inputs, output) -> None:
    q, k, _, norms = output
    ctx.mark_non_differentiable(norms)
    _, bias, log_scale = inputs
    ctx.save_for_backward(q, k, norms, log_scale)
    ctx.bias_dtype = bias.dtype


def _backward(ctx, dq, dk, dv, _):
    dproduct, dbias, dlog_scale = _gather(dq, dk, dv, *ctx.saved_tensors)
    return dproduct, dbias.to(ctx.bias_dtype), dlog_scale


_part.register_autograd(_backward, setup_context=_keep)
