"""The layout of the published VAR checkpoints, and the facts a state dict tells of its model.

The one idea to hold: parameters have the same names here and there. A published file also holds
three kinds of buffers that follow from the schedule: they are checked when read, made when written.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from sandbox import Layout, SandboxError

_LEVELS, _BIAS, _ZERO = "lvl_1L", "attn_bias_for_masking", "attn.zero_k_bias"


def to_ours(state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor] | None:
    """A published state dict without its buffers; None if `state` has not the published layout.

    Raises SandboxError if the buffers contradict the layout. A file of another length passes:
    its parameters do not fit either, and `describe` puts that in plainer words.
    """
    if not {_LEVELS, _BIAS, "word_embed.weight", "pos_1LC"} <= set(state):
        return None
    levels = state[_LEVELS].flatten().cpu()
    if len(levels) == layout.seq_len and not torch.equal(levels, layout.level_of()):
        raise SandboxError(
            f"the checkpoint has other scales: tokens per scale {levels.bincount().tolist()}, "
            f"but the schedule has {layout.level_of().bincount().tolist()}"
        )
    bias = state[_BIAS].float().cpu()
    if bias.shape[-1] == layout.seq_len and not torch.equal(bias, _attention_bias(layout)):
        raise SandboxError("the checkpoint has another attention mask than the schedule")
    for name, value in state.items():
        if name.endswith(_ZERO) and value.any():
            raise SandboxError(
                f"the checkpoint has a bias on its keys, {name}; here keys have none"
            )
    return {
        name: value
        for name, value in state.items()
        if name not in (_LEVELS, _BIAS) and not name.endswith(_ZERO)
    }


def from_ours(state: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Our state dict with the buffers of the published layout; nothing else changes."""
    zeros = {
        name.replace("q_bias", "zero_k_bias"): torch.zeros_like(value)
        for name, value in state.items()
        if name.endswith("attn.q_bias")
    }
    levels = layout.level_of()[None]
    return {**state, **zeros, _LEVELS: levels, _BIAS: _attention_bias(layout)}


def describe(state: Mapping[str, Tensor]) -> dict[str, str]:
    """What the shapes of a state dict say of its model, fact to value, as far as they say it."""
    facts: dict[str, str] = {}
    blocks = {int(name.split(".")[1]) for name in state if name.startswith("blocks.")}
    if blocks:
        facts["depth"] = str(max(blocks) + 1)
        facts["AdaLN"] = "shared" if "blocks.0.ada_gss" in state else "per block"
        scale = state.get("blocks.0.attn.scale_mul_1H11")
        facts["query-key normalisation"] = "off" if scale is None else "on"
        if scale is not None:
            facts["head count"] = str(scale.shape[1])
    for fact, name, axis in (
        ("width", "word_embed.weight", 0),
        ("code width", "word_embed.weight", 1),
        ("token count", "pos_1LC", 1),
        ("first step's token count", "pos_start", 1),
        ("scale count", "lvl_embed.weight", 0),
        ("vocabulary size", "head.weight", 0),
    ):
        if name in state:
            facts[fact] = str(state[name].shape[axis])
    if "class_emb.weight" in state:  # the last row means "no class"
        facts["class count"] = str(len(state["class_emb.weight"]) - 1)
    return facts


def _attention_bias(layout: Layout) -> Float[Tensor, "1 1 l l"]:
    allowed = layout.mask()
    return torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)[None, None]
