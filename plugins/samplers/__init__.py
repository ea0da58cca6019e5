"""Samplers: logits to ids."""

from typing import Any

import sandbox

from .likeliest import Greedy, TopKTopP

__all__ = ["Greedy", "TopKTopP"]


@sandbox.hookimpl
def sandbox_register(register: Any) -> None:
    register(sandbox.Sampler, "top-k-top-p", TopKTopP)
    register(sandbox.Sampler, "greedy", Greedy)
