"""A step of drawing in compiled pieces, which are cut where a block attends and nowhere else.

The one idea to hold: what ends one block and what begins the next read the same tokens, so both are
one piece, in which adding, gating and normalising are one kernel. Attention between the pieces is
the backend's. So a CPU draws; a GPU does where it cannot draw by the kernels of `fused`.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from sandbox import Mask

from .blocks import Block

if TYPE_CHECKING:
    from .model import VAR
    from .stepwise import State


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
        return compiled(dynamic=True).prepare(network, cond, blocks)


def step(
    network: "VAR",
    state: "State",
    context: Float[Tensor, "b n c"] | None,
    span: slice,
    weight: float | None = None,
) -> Float[Tensor, "b_or_half n v"]:
    """The logits of the tokens of `span`, with a weight guided; the first ones have no context."""
    layers, places = layers_of(state), state.weights.places[:, span]
    read = state.cond, context, state.weights.word_embed
    pieces = compiled(dynamic=places.device.type == "cpu")
    x, made = pieces.enter(network, layers[0], read, places)
    for index, (layer, past) in enumerate(zip(layers, state.caches, strict=True)):
        seen = layer.block.attn.see(made, Mask(), past, span)
        if index + 1 < len(layers):
            x, made = pieces.between(layer, layers[index + 1], x, seen)
    with network.coarse_products():
        share = None if weight is None else x.new_full((), 1 + weight, dtype=torch.float32)
        return pieces.leave(network, layers[-1], x, seen, state.head, share)


def layers_of(state: "State") -> list[Layer]:
    weights = state.weights
    return [*map(Layer, weights.blocks, state.modulations, weights.biases)]


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
) -> tuple[Float[Tensor, "b n d"], Any]:
    """The tokens (`VAR.read`), and what the first block's attention is to see of them."""
    x = network.read(*tokens) + places
    return x, _before(first, _alone(x), len(x))


def between(
    layer: Layer,
    following: Layer,
    x: Float[Tensor, "b n d"],
    seen: Float[Tensor, "b heads n e"],
) -> tuple[Float[Tensor, "b n d"], Any]:
    """From what a block's attention saw to what the next one's is to see."""
    alone = _after(layer, x, seen)
    return alone.view(x.shape), _before(following, alone, len(x))


def leave(
    network: "VAR",
    last: Layer,
    x: Float[Tensor, "b n d"],
    seen: Float[Tensor, "b heads n e"],
    head: Float[Tensor, "b 1 2 d"],
    share: Float[Tensor, ""] | None,
) -> Float[Tensor, "b_or_half n v"]:
    """From what the last block's attention saw to the logits; guided with the `share` of those with
    a label: before the head, unless that would round too much.
    """
    normed = network.normed(_after(last, x, seen), _spread(head, x.shape[1]))
    early = share is not None and normed.dtype == torch.float32
    logits = network.project(_mixed(normed, share) if early else normed)
    logits = logits if share is None or early else _mixed(logits, share)
    return logits.view(-1, x.shape[1], logits.shape[-1])


def _mixed(rows: Float[Tensor, "two_bn 1 d"], share: Float[Tensor, ""]) -> Float[Tensor, "bn 1 d"]:
    with_label, without = rows.chunk(2)
    return without.lerp(with_label, share)


def _before(
    layer: Layer, alone: Float[Tensor, "bn 1 d"], batch: int
) -> tuple[Tensor, Tensor, Tensor]:
    modulation = _spread(layer.modulation, len(alone) // batch)
    q, k, v = layer.block.before(alone, modulation, layer.bias)
    q, k, v = (rearrange(each, "(b n) heads 1 e -> b heads n e", b=batch) for each in (q, k, v))
    return q, k, v


def _after(
    layer: Layer, x: Float[Tensor, "b n d"], seen: Float[Tensor, "b heads n e"]
) -> Float[Tensor, "bn 1 d"]:
    seen = rearrange(seen, "b heads n e -> (b n) heads 1 e")
    return layer.block.after(_alone(x), seen, _spread(layer.modulation, x.shape[1]))


def _alone(x: Float[Tensor, "b n d"]) -> Float[Tensor, "bn 1 d"]:
    """Every token as if it were an image's only one: then one loop over tokens does for all that
    stands between two products, and what it has of a token stays in a core's nearest cache.
    """
    return rearrange(x, "b n d -> (b n) 1 d")


def _spread(modulation: Float[Tensor, "b 1 k d"], n: int) -> Float[Tensor, "bn 1 k d"]:
    """The modulation of each such token; compiled, it is read from where it was."""
    return modulation.expand(-1, n, -1, -1).flatten(0, 1)[:, None]


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
