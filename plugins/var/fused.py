"""A step of drawing by as few kernels as there are: products, and what stands between two of them.

The one idea to hold: on a GPU nothing is compiled for a number of tokens. A block is four products
of the library, attention by its backend, and between them Triton kernels that serve every step;
with few tokens the products are Triton kernels, too, so that none waits for its weights. Where
these kernels cannot be, on a CPU to begin with, the compiled pieces do the same.
"""

from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

import sandbox
from sandbox import Mask

from . import copies, pieces
from .blocks import SelfAttention
from .few import products_for
from .pieces import Layer, layers_of

if TYPE_CHECKING:
    from .model import VAR
    from .stepwise import State


def begin(
    network: "VAR", cond: Float[Tensor, "b d"], weights: copies.Weights
) -> tuple[list[Float[Tensor, "b 1 6 d"]], Float[Tensor, "b 1 2 d"]]:
    """What a label makes of each block and of the head (`VAR.modulations`)."""
    if cond.device.type == "cpu":  # elsewhere it costs little, once for all steps
        return pieces.begin(network, cond, weights.blocks)
    if weights.ada_lin is None:
        return network.modulations(cond, weights.blocks)
    return at_once(network.label(cond), *weights.ada_lin), network.head_modulation(cond)


def at_once(
    label: Float[Tensor, "b d"], weight: Float[Tensor, "rows d"], bias: Float[Tensor, " rows"]
) -> list[Float[Tensor, "b 1 6 d"]]:
    """What a label makes of every block, by one product."""
    made = F.linear(label, weight, bias)
    made = rearrange(made, "b (blocks six d) -> blocks b 1 six d", six=6, d=label.shape[1])
    return list(made.unbind())


def step(
    network: "VAR",
    state: "State",
    context: Float[Tensor, "b n c"] | None,
    span: slice,
    weight: float | None = None,
) -> Float[Tensor, "b_or_half n v"]:
    """The logits of the tokens of `span`, with a weight guided; the first ones have no context."""
    places = state.weights.places[:, span]
    kernel = kernel_for(state.weights.blocks[0].attn, places, state.caches[0])
    if kernel is None:
        return pieces.step(network, state, context, span, weight)
    from . import gating, reading

    layers, embed = layers_of(state), state.weights.word_embed
    if context is None or context.shape[2] > reading.WIDEST:
        x = network.read(state.cond, context, embed) + places
    else:
        x = reading.read(context, embed.weight, embed.bias, places)
    skinny = products_for(layers[0].block, x.shape[:2].numel(), layers[0].modulation)
    head_scale, head_shift = state.head.unbind(2)
    if skinny:
        for layer, past in zip(layers, state.caches, strict=True):
            x = of_few(layer, x, past, span, kernel, skinny)
        _, normed = gating.gated_norm(x, None, head_shift, head_scale)
        return predicted(network, normed, weight)
    moves = [(layer.modulation[:, :, 4], layer.modulation[:, :, 2]) for layer in layers]
    _, normed = gating.gated_norm(x, None, *moves[0])
    moves.append((head_shift, head_scale))
    for layer, past, following in zip(layers, state.caches, moves[1:], strict=True):
        x, normed = of_many(layer, x, normed, following, past, span, kernel)
    return predicted(network, normed, weight)


def predicted(
    network: "VAR", normed: Float[Tensor, "b n d"], weight: float | None
) -> Float[Tensor, "b_or_half n v"]:
    """The logits, with a weight guided: before the head, unless that would round too much."""
    if weight is None:
        return network.project(normed)
    if normed.dtype != torch.float32:
        return sandbox.guided(network.project(normed), weight)
    return network.project(sandbox.guided(normed, weight))


def of_many(
    layer: Layer,
    x: Float[Tensor, "b n d"],
    normed: Float[Tensor, "b n d"],
    following: tuple[Tensor, Tensor],
    past: Float[Tensor, "2 b heads l e"],
    span: slice,
    kernel: ModuleType,
) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b n d"]]:
    """A block, in eight kernels: from tokens, and what its attention reads of them, to both anew.

    `following` shifts and scales what is read next.
    """
    from . import gating

    attn, ffn = layer.block.attn, layer.block.ffn
    gate1, gate2, _, scale2, _, shift2 = layer.modulation.unbind(2)
    seen = attn.see(attn.product(normed, layer.bias), Mask(), past, span, kernel)
    x, normed = gating.gated_norm(x, (attn.merge(seen), gate1), shift2, scale2)
    branch = ffn.fc2(linear_gelu(normed, ffn.fc1.weight, ffn.fc1.bias))
    return gating.gated_norm(x, (branch, gate2), *following)


def of_few(
    layer: Layer,
    x: Float[Tensor, "b n d"],
    past: Float[Tensor, "2 b heads l e"],
    span: slice,
    kernel: ModuleType,
    skinny: ModuleType,
) -> Float[Tensor, "b n d"]:
    """A block to draw a few tokens, in eight kernels, each of which starts before the last ends."""
    from . import gating

    attn, ffn = layer.block.attn, layer.block.ffn
    gate1, gate2, scale1, scale2, shift1, shift2 = layer.modulation.unbind(2)
    _, normed = gating.gated_norm(x, None, shift1, scale1)
    qkv = skinny.linear(normed, attn.mat_qkv.weight, layer.bias)
    seen = attn.see(qkv, Mask(), past, span, kernel)
    x = skinny.gated_linear(seen, attn.proj.weight, attn.proj.bias, gate1, x)
    _, normed = gating.gated_norm(x, None, shift2, scale2)
    hidden = skinny.linear(normed, ffn.fc1.weight, ffn.fc1.bias, gelu=True)
    return skinny.gated_linear(hidden[:, None], ffn.fc2.weight, ffn.fc2.bias, gate2, x)


def linear_gelu(
    x: Float[Tensor, "b n d"], weight: Float[Tensor, "out d"], bias: Float[Tensor, " out"]
) -> Float[Tensor, "b n out"]:
    """GELU (its tanh form) of a linear layer; in 16 bits on a GPU a part of the product."""
    if not x.is_cuda or x.dtype == torch.float32:
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")
    product = torch._addmm_activation(bias, x.flatten(0, -2), weight.T, use_gelu=True)
    return rearrange(product, "(b n) out -> b n out", b=len(x))


def kernel_for(
    attn: SelfAttention, x: Float[Tensor, "b n d"], past: Float[Tensor, "2 b heads l e"]
) -> ModuleType | None:
    """The module `kernel`, where it and `gating` can draw with such tokens as `x`."""
    e = past.shape[-1]
    if not x.is_cuda or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if e > 256 or e & (e - 1) or past.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return None
    if x.dtype != past.dtype or not past.is_contiguous():
        return None
    return _kernel(x.device, past.dtype, attn.num_heads, e, attn.qk_norm)


@cache
def _kernel(
    device: torch.device, dtype: torch.dtype, num_heads: int, e: int, qk_norm: bool
) -> ModuleType | None:
    """The module `kernel`, after a trial: triton may be missing, or the compiler that it needs."""

    def trial() -> ModuleType:
        from . import gating, kernel, reading

        scale = torch.zeros(1, num_heads, 1, 1, device=device) if qk_norm else None
        qkv = torch.zeros(1, 1, 3 * num_heads * e, dtype=dtype, device=device)
        kernel.place(qkv, scale, qkv.new_empty(2, 1, num_heads, 1, e), 0)
        x = qkv[..., : num_heads * e].contiguous()
        gating.gated_norm(x, (x, x), x, x)
        reading.read(x[..., :4], x.new_zeros(8, 4), x.new_zeros(8), x.new_zeros(1, 1, 8))
        return kernel

    return sandbox.tried(trial, "what stands between products without its Triton kernels")
