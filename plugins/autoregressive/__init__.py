"""The autoregressive generator: a tokenizer's ids, predicted step by step."""

from typing import Any

import sandbox

from .generator import Autoregressive

__all__ = ["Autoregressive"]


@sandbox.hookimpl
def sandbox_register(register: Any) -> None:
    register(sandbox.Generator, "autoregressive", Autoregressive)
