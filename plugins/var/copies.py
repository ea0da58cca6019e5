"""What drawing reads of a network's weights: as they are, or copied in the type it computes in.

The one idea to hold: autocast casts a matrix once for all steps, but within compiled code at every
call, and Triton kernels not at all. So both read copies, cast when they are made and written anew
where they lie; a CUDA graph leaves the copying out, so whoever replays it asks for that when
weights moved.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .blocks import Block

if TYPE_CHECKING:
    from .model import VAR

_CAST = "attn", "ffn", "ada_lin"


@dataclass
class Weights:
    """What all steps read; a shared AdaLN and the head are not in it."""

    word_embed: nn.Linear
    blocks: Sequence[Block]
    biases: Sequence[Float[Tensor, " three_d"]]
    places: Float[Tensor, "1 l d"]
    ada_lin: tuple[Float[Tensor, "rows d"], Float[Tensor, " rows"]] | None = None
    """Weights and biases of all blocks' AdaLN, one below the other, where they lie so."""

    def tensors(self) -> Iterator[Tensor]:
        """Of those that were copied, every one."""
        yield from self.word_embed.parameters()
        for block in self.blocks:
            for name in _CAST:
                if part := block._modules.get(name):
                    yield from part.parameters()
        yield from self.biases
        yield self.places


class Casts(dict[Any, Weights]):
    """Copies by type and place; a network that is copied begins without any."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Casts":
        return Casts()


def own(network: "VAR", dtype: torch.dtype) -> Weights:
    """The network's, with what is put together of them in `dtype`."""
    blocks = list(network.blocks)
    biases = [block.attn.bias().to(dtype) for block in blocks]
    return Weights(network.word_embed, blocks, biases, network.places().to(dtype))


def current(network: "VAR", dtype: torch.dtype) -> Weights:
    """Copies in `dtype`, if need be: made once for a place of the weights, brought up to date by
    every call that no graph records."""
    weight, made = network.word_embed.weight, network._cast
    if dtype == weight.dtype:
        return own(network, dtype)
    key = dtype, weight.device
    if key not in made:
        made[key] = cast(network, dtype)
    if weight.device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        refresh(made[key], network)
    return made[key]


def cast(network: "VAR", dtype: torch.dtype) -> Weights:
    """Copies in `dtype`, as autocast has them; they are no inference tensors."""
    with torch.inference_mode(False), torch.no_grad():  # the first would have gradients taken
        of = own(network, dtype)
        word_embed = copy.deepcopy(of.word_embed).to(dtype).requires_grad_(False)
        blocks = [cast_block(block, dtype) for block in of.blocks]
        return Weights(word_embed, blocks, of.biases, of.places, _stacked(blocks))


def _stacked(blocks: Sequence[Block]) -> tuple[Tensor, Tensor] | None:
    """Lay the blocks' AdaLN one below the other, so that one product serves all of them."""
    layers: list[Any] = [block._modules.get("ada_lin") for block in blocks]
    if None in layers:
        return None
    weights, biases = (
        torch.cat([getattr(layer[1], name) for layer in layers]) for name in ("weight", "bias")
    )
    for layer, weight, bias in zip(
        layers, weights.chunk(len(layers)), biases.chunk(len(layers)), strict=True
    ):
        layer[1].weight.data, layer[1].bias.data = weight, bias
    return weights, biases


@torch.no_grad()
def refresh(copied: Weights, network: "VAR") -> None:
    """Bring copies up to date, without waiting for the device."""
    for mine, theirs in zip(
        copied.tensors(), own(network, copied.places.dtype).tensors(), strict=True
    ):
        mine.copy_(theirs, non_blocking=True)


def cast_block(block: Block, dtype: torch.dtype) -> Block:
    """A copy of what a step reads, its matrices and their biases in `dtype`, as autocast has them.

    What multiplies in float32 (the scale of the attention) or is put together before it is cast
    (the biases of queries and values) stays as it is. The attention's backend is the same one.
    """
    cast, memo = copy.copy(block), {id(block.attn.backend): block.attn.backend}
    parts = [name for name in _CAST if name in block._modules]
    halves = {name: copy.deepcopy(block._modules[name], memo) for name in parts}
    for half in halves.values():
        half.requires_grad_(False)
        for module in half.modules():
            if isinstance(module, nn.Linear):
                module.to(dtype)
    cast._modules = {**block._modules, **halves}
    return cast
