"""Attention backends: several ways to compute `softmax(scale q k^T) v` under a mask.

The one idea to hold: a backend is handed a *description* of the mask and either honours it or
refuses the call with the reason.
"""

from typing import Any

import sandbox

from .auto import AutoAttention
from .cached import CachedAttention
from .kernels import CudnnAttention, FlexAttention, XformersAttention
from .plain import MathAttention, SdpaAttention
from .prefix import PrefixAttention
from .steps import StepsAttention

__all__ = [
    "AutoAttention",
    "CachedAttention",
    "CudnnAttention",
    "FlexAttention",
    "MathAttention",
    "PrefixAttention",
    "SdpaAttention",
    "StepsAttention",
    "XformersAttention",
]


@sandbox.hookimpl
def sandbox_register(register: Any) -> None:
    for name, cls in {
        "auto": AutoAttention,
        "math": MathAttention,
        "sdpa": SdpaAttention,
        "cudnn": CudnnAttention,
        "prefix": PrefixAttention,
        "xformers": XformersAttention,
        "flex": FlexAttention,
        "cached": CachedAttention,
        "steps": StepsAttention,
    }.items():
        register(sandbox.AttentionBackend, name, cls)
