"""Stepwise prediction: what it remembers from step to step, and a step, plain or fused.

The one idea to hold: a step goes through the blocks as `forward` does, only that keys and values of
the steps before lie in caches, which have room for the whole sequence from the start.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from sandbox import Mask

from . import copies, fused

if TYPE_CHECKING:
    from .model import VAR


@dataclass
class State:
    """What stepwise prediction remembers: the weights, what a label makes of each block and of the
    head, and each block's keys and values so far."""

    weights: copies.Weights
    cond: Float[Tensor, "b d"]
    modulations: list[Float[Tensor, "b 1 6 d"]]
    head: Float[Tensor, "b 1 2 d"]
    caches: list[Float[Tensor, "2 b heads l e"]]
    next_step: int = 0


def begin(network: "VAR", cond: Float[Tensor, "b d"], dtype: torch.dtype) -> State:
    """See `VAR.begin`; `dtype` is what the blocks compute in."""
    b, d = cond.shape
    heads = network.blocks[0].attn.num_heads
    shape = 2, b, heads, network.tokens.layout.seq_len, d // heads
    weights = copies.current(network, dtype) if network.fused else copies.own(network, dtype)
    if network.fused:
        modulations, head = fused.begin(network, cond, weights)
    else:
        modulations, head = network.modulations(cond, weights.blocks)
    caches = [cond.new_empty(shape, dtype=dtype) for _ in network.blocks]
    return State(weights, cond, modulations, head, caches)


def step(
    network: "VAR",
    state: State,
    context: Float[Tensor, "b n c"],
    step: int,
    weight: float | None = None,
) -> Float[Tensor, "b_or_half n v"]:
    """See `VAR.step` and, with a weight, which is for fused steps alone, `VAR.guided_step`."""
    if step != state.next_step:
        raise ValueError(f"step {state.next_step} comes next, not step {step}")
    span = network.tokens.layout.spans[step]
    read = context if step else None
    if network.fused:
        logits = fused.step(network, state, read, span, weight)
    else:
        logits = _plain(network, state, read, span)
    state.next_step += 1
    return logits


def _plain(
    network: "VAR", state: State, context: Float[Tensor, "b n c"] | None, span: slice
) -> Float[Tensor, "b n v"]:
    weights = state.weights
    x = network.read(state.cond, context) + weights.places[:, span]
    for block, modulation, bias, cache in zip(
        weights.blocks, state.modulations, weights.biases, state.caches, strict=True
    ):
        x = block.forward(x, modulation, Mask(), (cache, span, bias))
    return network.predict(x, state.head)
