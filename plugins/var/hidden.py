"""The MLP's hidden layer in training on a GPU: a bias, and GELU in its tanh form.

The one idea to hold: both gradients are made in one pass over memory, which compiled code makes in
two, after it has made the layer itself once more. What the second product reads is kept instead.
"""

from functools import cache
from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

import sandbox

from . import operators


def suits(x: Float[Tensor, "b n d"], weight: Float[Tensor, "f d"]) -> bool:
    """Whether `activated` is for their product: of 16 bits, on a GPU, with gradients to come."""
    dtype = operators.half(x, weight)
    return dtype is not None and _runs(x.device, dtype)


@torch.compiler.assume_constant_result  # compiled code asks while it is made
def _runs(device: torch.device, dtype: torch.dtype) -> bool:
    return _kernels(device, dtype) is not None


@cache
def _kernels(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """Its kernels, after a trial: triton may be missing, or the compiler that it needs."""

    def trial() -> ModuleType:
        from . import hidden_kernels as kernels

        product, bias = torch.zeros(1, 8, dtype=dtype, device=device), torch.zeros(8, device=device)
        kernels.activate(product, bias)
        kernels.gradients(product, product, bias)
        return kernels

    return sandbox.tried(trial, "the MLP's hidden layer without its Triton kernels")


@torch.library.custom_op("var_sandbox::activated", mutates_args=())
def activated(product: Tensor, bias: Tensor) -> Tensor:
    """`gelu(product + bias)` of `b n f` and `f`, in the type of the product."""
    from . import hidden_kernels

    return hidden_kernels.activate(product.flatten(0, -2), bias).view(product.shape)


@activated.register_fake
def _(product: Tensor, bias: Tensor) -> Tensor:
    return torch.empty_like(product, memory_format=torch.contiguous_format)


@torch.library.custom_op("var_sandbox::activated_gradients", mutates_args=())
def _gradients(of: Tensor, product: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `activated`'s product and bias, from that of what it made."""
    from . import hidden_kernels

    rows = (x.flatten(0, -2) for x in (of, product))
    towards, biases = hidden_kernels.gradients(*rows, bias)
    return towards.view(product.shape), biases


@_gradients.register_fake
def _(of: Tensor, product: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    towards = torch.empty_like(product, memory_format=torch.contiguous_format)
    return towards, torch.empty_like(bias)


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, of):
    return _gradients(of, *ctx.saved_tensors)


activated.register_autograd(_backward, setup_context=_keep)
