"""The reference VAR (arXiv 2404.02905): next-scale prediction as published."""

from typing import Any

import sandbox

from .model import VAR


@sandbox.hookimpl
def sandbox_register(register: Any) -> None:
    register(sandbox.Backbone, "var", VAR)
