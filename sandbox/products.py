"""Products of float32 on a CPU, by oneDNN.

The one idea to hold: PyTorch leaves them to MKL, which on a processor that is not Intel's keeps to
half the width of its registers (on an AMD EPYC 205 GFLOP/s where oneDNN has 460); oneDNN makes code
for whatever it finds, and adds a bias or takes GELU before a result leaves the cache.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

FEWEST = 16
"""Rows from which on it is no slower to call."""


def suits_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether `onednn_linear` is for their product: of float32, out of autocast, on a CPU."""
    if x.device.type != "cpu":
        return False
    return x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")


@torch.library.custom_op("var_sandbox::onednn_linear", mutates_args=())
def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool = False) -> Tensor:
    """A linear layer of `b n d`, `f d` and `f`, and GELU in its tanh form; without gradients."""
    if x.numel() >= FEWEST * x.shape[-1] and runs():
        how = ("gelu", "tanh") if gelu else ("none", "")
        product: Tensor = _onednn()(x.contiguous(), weight, bias, how[0], [], how[1])
        return product
    with torch.autocast("cpu", enabled=False):
        made = F.linear(x, weight, bias)
    return F.gelu(made, approximate="tanh") if gelu else made


@onednn_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, gelu: bool = False) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


@cache
def runs() -> bool:
    """Whether oneDNN is there and makes such a product, as PyTorch's compiler has it make them."""
    x = torch.ones(FEWEST, 8)
    try:
        made = _onednn()(x, torch.ones(4, 8), torch.ones(4), "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(made, torch.full((FEWEST, 4), 9.0))


def _onednn() -> Any:
    return torch.ops.mkldnn._linear_pointwise
