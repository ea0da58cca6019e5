"""A step of drawing in compiled pieces, which are cut where a block attends and nowhere else.

The one idea to hold: what ends one block and what begins the next read the same tokens, so both are
one piece, in which adding, gating and normalising are one kernel. Attention between the pieces is
the backend's; and where the module `kernel` takes keys and values to their place, that is too.
"""

from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sandbox import Mask

from .blocks import Block, kernel_for
from .few import products_for

if TYPE_CHECKING:
    from .model import VAR, State


class Layer(NamedTuple):
    """A block and what it reads besides tokens, the same in every step."""

    block: Block
    modulation: Float[Tensor, "b 1 6 d"]
    bias: Float[Tensor, " three_d"]


class Pieces(NamedTuple):
    """The compiled forms of `prepare`, `enter`, `between` and `leave`."""

    prepare: Callable[..., tuple[list[Tensor], Tensor]]
    enter: Callable[..., tuple[Tensor, Any]]
    between: Callable[..., tuple[Tensor, Any]]
    leave: Callable[..., Tensor]


def begin(
    network: "VAR", cond: Float[Tensor, "b d"], blocks: Sequence[Block]
) -> tuple[list[Float[Tensor, "b 1 6 d"]], Float[Tensor, "b 1 2 d"]]:
    """What a label makes of each block and of the head (`VAR.modulations`)."""
    with network.coarse_products():
        return compiled(dynamic=cond.device.type == "cpu").prepare(network, cond, blocks)


def step(
    network: "VAR", state: "State", context: Float[Tensor, "b n c"] | None, span: slice
) -> Float[Tensor, "b n v"]:
    """The logits of the tokens of `span`; the first ones have no context.

    With few tokens nothing is compiled: the products are kernels of their own, too.
    """
    weights = state.weights
    places, first = weights.places[:, span], weights.blocks[0]
    layers = [*map(Layer, weights.blocks, state.modulations, weights.biases)]
    read = state.cond, context, weights.word_embed
    kernel = kernel_for(first.attn, places, state.caches[0])
    count = len(state.cond) * places.shape[1]
    if kernel and (skinny := products_for(first, count, state.modulations[0])):
        x = network.read(*read) + places
        for layer, past in zip(layers, state.caches, strict=True):
            x = of_few(layer, x, past, span, kernel, skinny)
        return network.predict(x, state.head)
    parted = kernel is None
    pieces = compiled(dynamic=places.device.type == "cpu")
    x, made = pieces.enter(network, layers[0], read, places, parted)
    for index, (layer, past) in enumerate(zip(layers, state.caches, strict=True)):
        seen = layer.block.attn.see(made, Mask(), past, span, kernel)
        if index + 1 < len(layers):
            x, made = pieces.between(layer, layers[index + 1], x, seen, parted)
    with network.coarse_products():
        return pieces.leave(network, layers[-1], x, seen, state.head)


def prepare(
    network: "VAR", cond: Float[Tensor, "b d"], blocks: Sequence[Block]
) -> tuple[list[Tensor], Tensor]:
    """`VAR.modulations`."""
    return network.modulations(cond, blocks)


def enter(
    network: "VAR",
    first: Layer,
    tokens: tuple[Tensor, Tensor | None, nn.Linear],
    places: Float[Tensor, "1 n d"],
    parted: bool,
) -> tuple[Float[Tensor, "b n d"], Any]:
    """The tokens (`VAR.read`), and what the first block's attention is to see of them."""
    x = network.read(*tokens) + places
    return x, _before(first, x, parted)


def between(
    layer: Layer,
    following: Layer,
    x: Float[Tensor, "b n d"],
    seen: Float[Tensor, "b heads n e"],
    parted: bool,
) -> tuple[Float[Tensor, "b n d"], Any]:
    """From what a block's attention saw to what the next one's is to see."""
    x = layer.block.after(x, seen, layer.modulation)
    return x, _before(following, x, parted)


def leave(
    network: "VAR",
    last: Layer,
    x: Float[Tensor, "b n d"],
    seen: Float[Tensor, "b heads n e"],
    head: Float[Tensor, "b 1 2 d"],
) -> Float[Tensor, "b n v"]:
    """From what the last block's attention saw to the logits."""
    return network.predict(last.block.after(x, seen, last.modulation), head)


def of_few(
    layer: Layer,
    x: Float[Tensor, "b n d"],
    past: Float[Tensor, "2 b heads l e"],
    span: slice,
    kernel: ModuleType,
    skinny: ModuleType,
) -> Float[Tensor, "b n d"]:
    """A block to draw a few tokens, in six kernels."""
    attn, ffn = layer.block.attn, layer.block.ffn
    gate1, gate2, scale1, scale2, shift1, shift2 = layer.modulation.unbind(2)
    qkv = skinny.normed_linear(x, shift1, scale1, attn.mat_qkv.weight, layer.bias)
    seen = attn.see(qkv, Mask(), past, span, kernel)
    x = skinny.gated_linear(seen, attn.proj.weight, attn.proj.bias, gate1, x)
    hidden = skinny.normed_linear(x, shift2, scale2, ffn.fc1.weight, ffn.fc1.bias, gelu=True)
    return skinny.gated_linear(hidden[:, None], ffn.fc2.weight, ffn.fc2.bias, gate2, x)


def _before(layer: Layer, x: Float[Tensor, "b n d"], parted: bool) -> Any:
    return layer.block.before(x, layer.modulation, layer.bias, parted)


@cache
def compiled(*, dynamic: bool) -> Pieces:
    """Compiled once for all blocks of a kind, so their number costs no time.

    `dynamic` is once for steps of any number of tokens, as suits a CPU, where building takes long;
    on a GPU kernels for each number alone are faster, as they know how memory is aligned and get by
    with short integers.
    """
    return Pieces(
        *(torch.compile(each, dynamic=dynamic) for each in (prepare, enter, between, leave))
    )
