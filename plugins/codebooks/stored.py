"""Settings that stand in the weights, because weights mean something else without them."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import sandbox


def store(module: nn.Module, buffer: str, value: Any, setting: str, words: Any = str) -> None:
    """Keep `value` as a buffer of the module; refuse to load weights that have another.

    `words` puts a value as the recipe has it. Loading raises SandboxError, which names the setting.
    """
    module.register_buffer(buffer, torch.tensor(value))
    module.register_load_state_dict_pre_hook(partial(_refuse, buffer, value, setting, words))


def _refuse(
    buffer: str,
    value: Any,
    setting: str,
    words: Any,
    module: nn.Module,
    state: dict[str, Tensor],
    prefix: str,
    *_: object,
) -> None:
    theirs = state.get(prefix + buffer)
    if theirs is None or theirs.is_meta:
        return
    if not torch.equal(theirs.cpu(), torch.tensor(value, device="cpu")):
        there, here = words(theirs.tolist()), words(value)
        raise sandbox.SandboxError(
            f"these weights were trained with `codebook.{setting}: {there}`, the recipe has "
            f"`{setting}: {here}`: set it to {there}, or train anew"
        )
