"""What stands between the products of a block, in training on a GPU: sums, gates and norms.

The one idea to hold: all that is read or made of the same token is read or made in one pass, there
and back. So what autograd would add by itself is not left to it: tokens pass through their norm, by
which both their gradients meet where the norm's is made; and the bias of a product is added here,
since its gradient is a sum that the gate's is made of, too.
"""

from functools import cache
from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

import sandbox

from . import operators

WIDEST = 4096
"""Of tokens, in channels: a program holds them whole."""


def norm_dtype(
    x: Float[Tensor, "b n d"], modulation: Float[Tensor, "b 1 6 d"], weight: Float[Tensor, "f d"]
) -> torch.dtype | None:
    """The type of norms for a product with `weight`, where these functions are for it; else None.

    They are for products of 16 bits, on a GPU, with gradients to come, of which the gated sum with
    `x` is of the type of `x`.
    """
    dtype, d = operators.half(x, weight), x.shape[-1]
    if dtype is None or d > WIDEST or modulation.shape != (len(x), 1, 6, d):
        return None
    wide = all(torch.promote_types(x.dtype, each) == x.dtype for each in (dtype, modulation.dtype))
    return dtype if wide and _runs(x.device, x.dtype, modulation.dtype, dtype, d) else None


@torch.compiler.assume_constant_result  # compiled code asks while it is made
def _runs(device: torch.device, *kind: torch.dtype | int) -> bool:
    return _kernels(device, *kind) is not None


@cache
def _kernels(
    device: torch.device, of_x: torch.dtype, of_rows: torch.dtype, dtype: torch.dtype, d: int
) -> ModuleType | None:
    """Its kernels, after a trial: triton may be missing, or the compiler that it needs."""

    def trial() -> ModuleType:
        from . import between_kernels as kernels

        x, h = (torch.zeros(1, 10, d, dtype=each, device=device) for each in (of_x, dtype))
        row, bias = torch.zeros(1, 1, d, dtype=of_rows, device=device), x.new_zeros(d).float()
        for branch in (None, (h, bias, row)):
            _, _, moments = kernels.join(x, branch, (row, row, dtype))
            kernels.gradients(x, branch, (h, x, moments, row))
        kernels.join(x, branch, None)
        kernels.gradients(x, branch, None)
        return kernels

    return sandbox.tried(trial, "sums and norms in blocks without their Triton kernels")


def modulated(
    x: Float[Tensor, "b n d"],
    scale: Float[Tensor, "b 1 d"],
    shift: Float[Tensor, "b 1 d"],
    dtype: torch.dtype,
) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b n d"]]:
    """`x` itself, and its layer norm times 1 + `scale`, plus `shift`, of type `dtype`.

    What else reads `x` is to read it from here.
    """
    return _Modulated.apply(x, scale, shift, dtype)


def added(
    x: Float[Tensor, "b n d"],
    product: Float[Tensor, "b n d"],
    bias: Float[Tensor, " d"],
    gate: Float[Tensor, "b 1 d"],
) -> Float[Tensor, "b n d"]:
    """`x + (product + bias) * gate`, in the type of `x`."""
    return _added(x, product, bias, gate)


def added_and_modulated(
    x: Float[Tensor, "b n d"],
    product: Float[Tensor, "b n d"],
    bias: Float[Tensor, " d"],
    gate: Float[Tensor, "b 1 d"],
    scale: Float[Tensor, "b 1 d"],
    shift: Float[Tensor, "b 1 d"],
) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b n d"]]:
    """What `added` gives and, of the type of `product`, its norm as `modulated` has it."""
    x, normed, _ = _added_and_modulated(x, product, bias, gate, scale, shift)
    return x, normed


class _Modulated(torch.autograd.Function):
    """No operator's gradient, as those of the others: an operator may not return what it got."""

    @staticmethod
    def forward(ctx, x, scale, shift, dtype):
        normed, moments = _normed(x, scale, shift, dtype)
        ctx.save_for_backward(x, moments, scale)
        return x.view_as(x), normed

    @staticmethod
    def backward(ctx, towards, of):
        return *_normed_gradients(towards, of, *ctx.saved_tensors), None


@torch.library.custom_op("var_sandbox::normed", mutates_args=())
def _normed(x: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The norm, and moments `2 b n`."""
    from . import between_kernels

    _, normed, moments = between_kernels.join(x, None, (scale, shift, dtype))
    return normed, moments


@_normed.register_fake
def _(x: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=dtype), _moments(x)


@torch.library.custom_op("var_sandbox::normed_gradients", mutates_args=())
def _normed_gradients(
    towards: Tensor, of: Tensor, x: Tensor, moments: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of `x`, scale and shift, from those of `x` by itself and of its norm."""
    from . import between_kernels

    dx, *_, dscale, dshift = between_kernels.gradients(towards, None, (of, x, moments, scale))
    return dx, dscale, dshift


@_normed_gradients.register_fake
def _(
    towards: Tensor, of: Tensor, x: Tensor, moments: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x), _like(scale), _like(scale)


@torch.library.custom_op("var_sandbox::added", mutates_args=())
def _added(x: Tensor, product: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
    from . import between_kernels

    return between_kernels.join(x, (product, bias, gate), None)[0]


@_added.register_fake
def _(x: Tensor, product: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
    return _like(x)


@torch.library.custom_op("var_sandbox::added_gradients", mutates_args=())
def _added_gradients(
    towards: Tensor, product: Tensor, bias: Tensor, gate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of product, bias and gate, from that of the sum."""
    from . import between_kernels

    return between_kernels.gradients(towards, (product, bias, gate), None)[1:4]


@_added_gradients.register_fake
def _(
    towards: Tensor, product: Tensor, bias: Tensor, gate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(product), _like(bias), _like(gate)


@torch.library.custom_op("var_sandbox::added_and_modulated", mutates_args=())
def _added_and_modulated(
    x: Tensor, product: Tensor, bias: Tensor, gate: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum, its norm, and moments `2 b n`."""
    from . import between_kernels

    return between_kernels.join(x, (product, bias, gate), (scale, shift, product.dtype))


@_added_and_modulated.register_fake
def _(
    x: Tensor, product: Tensor, bias: Tensor, gate: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x), _like(product), _moments(x)


@torch.library.custom_op("var_sandbox::added_and_modulated_gradients", mutates_args=())
def _added_and_modulated_gradients(
    towards: Tensor,
    of: Tensor,
    x: Tensor,
    moments: Tensor,
    scale: Tensor,
    product: Tensor,
    bias: Tensor,
    gate: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of all that it was made of, from those of the sum by itself and of its norm."""
    from . import between_kernels

    branch, normed = (product, bias, gate), (of, x, moments, scale)
    return between_kernels.gradients(towards, branch, normed)


@_added_and_modulated_gradients.register_fake
def _(
    towards: Tensor,
    of: Tensor,
    x: Tensor,
    moments: Tensor,
    scale: Tensor,
    product: Tensor,
    bias: Tensor,
    gate: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(_like(each) for each in (x, product, bias, gate, scale, scale))


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _moments(x: Tensor) -> Tensor:
    return x.new_empty(2, *x.shape[:2], dtype=torch.float32)


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx, towards):
    return towards, *_added_gradients(towards, *ctx.saved_tensors)


def _keep_normed(ctx, inputs, output) -> None:
    *_, moments = output
    x, product, bias, gate, scale, _ = inputs
    ctx.mark_non_differentiable(moments)
    ctx.save_for_backward(x, moments, scale, product, bias, gate)


def _backward_normed(ctx, towards, of, _):
    return _added_and_modulated_gradients(towards, of, *ctx.saved_tensors)


_added.register_autograd(_backward, setup_context=_keep)
_added_and_modulated.register_autograd(_backward_normed, setup_context=_keep_normed)
