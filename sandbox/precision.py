"""Exact float32 where it decides which code is nearest.

Autocast and TF32 both pick other codes (TF32 1 in 50, bfloat16 1 in 6). The switch for TF32 is a
global of torch that a compiled function cannot set, so inside one only autocast is turned off: who
compiles such a function calls it within `exact_float32` as well.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch


def exact_float32(device: torch.device) -> AbstractContextManager[None]:
    """Neither autocast nor TF32, in matrix products and convolutions, within this context."""
    if torch.compiler.is_compiling():
        return torch.autocast(device.type, enabled=False)
    return float32_products(device, "ieee")


@contextmanager
def float32_products(device: torch.device, how: Literal["ieee", "tf32"]) -> Iterator[None]:
    """No autocast; products and convolutions of float32 on a GPU exact, or in TF32."""
    with products_of_float32(how), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def products_of_float32(how: Literal["ieee", "tf32"]) -> Iterator[None]:
    """Products and convolutions of float32 on a GPU exact, or in TF32; autocast stays as it is."""
    backends: Any = torch.backends  # torch leaves these switches untyped
    switches = backends.cuda.matmul, backends.cudnn.conv
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = how
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value
