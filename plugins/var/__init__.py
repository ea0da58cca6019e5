"""The reference VAR (arXiv 2404.02905): next-scale prediction as published."""

from typing import Any

import sandbox

from .model import VAR
from .tokenizer import VarTokenizer


@sandbox.hookimpl
def sandbox_register(register: Any) -> None:
    register(sandbox.Backbone, "var", VAR)
    register(sandbox.Tokenizer, "var-vq", VarTokenizer)
