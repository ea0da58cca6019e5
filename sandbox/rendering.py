"""From an autoencoder's features to images in [-1, 1], the plain way or by faster kernels.

The one thing to hold in mind: on a GPU, and under autocast, what is built reads a copy of the
weights, in the precision and memory order it wants. They are copied at every call; only a CUDA
graph leaves that out, and whoever replays one calls `refresh` when weights have moved. Whatever
else makes an autoencoder (its settings, the code it runs) is that of the first call.
"""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sandbox.compiler import compiling, fastest_convolutions
from sandbox.interfaces import Autoencoder

_PRODUCTS = nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d
_Copies = dict[tuple[torch.dtype | None, torch.device, tuple[torch.dtype, ...]], "_Copy"]
_copies: WeakKeyDictionary[nn.Module, _Copies] = WeakKeyDictionary()
"""By the type (None: their own) and the place of what the copies multiply, and the types of the
weights themselves; recordings read them, so they stay."""


def render(
    autoencoder: Autoencoder, features: Float[Tensor, "b c h w"], *, fused: bool = False
) -> Float[Tensor, "b 3 H W"]:
    """The images, float32. `fused` runs the autoencoder's own kernels, where `quicken` says that it
    has some, else kernels that are built for each size of the features.

    They keep the channels of convolutions in the fastest axis of memory, round otherwise in the
    last digits, and give no gradients.
    """
    if not fused:
        return _images(autoencoder, features)
    # Of the several modes without gradients always the same one, or it would be built for each.
    with fastest_convolutions(), torch.inference_mode(False), torch.no_grad():
        ready, quick = _ready(autoencoder, features.device)
        if quick:
            return _images(ready, features)
        with compiling():
            return fused_images()(ready, features)


def quickened(autoencoder: Autoencoder, device: torch.device) -> Autoencoder | None:
    """A copy that codes by kernels of its own, in the precision that autocast is now set to.

    It gives no gradients, and keeps the weights as they are now. None where it has no such kernels.
    """
    if not isinstance(autoencoder, nn.Module) or not hasattr(autoencoder, "quicken"):
        return None
    half = torch.is_autocast_enabled(device.type)
    copied = _Copy(autoencoder, torch.get_autocast_dtype(device.type) if half else None)
    copied.refresh(autoencoder)
    return copied.module if copied.quick else None


def refresh(autoencoder: nn.Module) -> None:
    """Bring what recordings read of the weights up to date, without waiting for the device.

    For any module: of what was never rendered there is nothing.
    """
    for copied in _copies.get(autoencoder, {}).values():
        copied.refresh(autoencoder)


@cache
def fused_images() -> Callable[[Autoencoder, Tensor], Tensor]:
    """What `render` computes, compiled: once for all autoencoders that are built alike."""
    return torch.compile(_images, dynamic=False)


def _images(
    autoencoder: Autoencoder, features: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b 3 H W"]:
    return autoencoder.decode(features).float().clamp(-1, 1).contiguous()


def _ready(autoencoder: Autoencoder, device: torch.device) -> tuple[Autoencoder, bool]:
    """The autoencoder or its copy, with the weights as they are; whether by kernels of its own."""
    half = torch.is_autocast_enabled(device.type)
    if not isinstance(autoencoder, nn.Module) or not (half or device.type == "cuda"):
        return autoencoder, False
    dtypes = tuple(tensor.dtype for tensor in _tensors(autoencoder))
    key = torch.get_autocast_dtype(device.type) if half else None, device, dtypes
    mine = _copies.setdefault(autoencoder, {})
    if key not in mine:
        mine[key] = _Copy(autoencoder, key[0])
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        mine[key].refresh(autoencoder)
    return mine[key].module, mine[key].quick


class _Copy:
    """An autoencoder to code with: what multiplies is in `dtype`, as autocast has it, and channels
    lie together; by kernels of its own (`quick`) where it has some.

    The order matters: for weights in the other one, which the compiler turns around by itself,
    cuDNN took a kernel for a decoder's last convolution half as long as all others together.
    """

    def __init__(self, autoencoder: nn.Module, dtype: torch.dtype | None) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.module: Any = copy.deepcopy(autoencoder).requires_grad_(False)
        for name in ("encode", "decode"):  # what stands in their place for a while leads back here
            vars(self.module).pop(name, None)
        self.quick = False
        if dtype is not None:
            for module in self.module.modules():
                if isinstance(module, _PRODUCTS):
                    module.to(dtype)
        for parameter in self.module.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    def refresh(self, autoencoder: nn.Module) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for mine, theirs in zip(_tensors(self.module), _tensors(autoencoder), strict=True):
                mine.copy_(theirs, non_blocking=True)
            for own, original in zip(self.module.modules(), autoencoder.modules(), strict=True):
                own.training = original.training
            if quicken := getattr(self.module, "quicken", None):
                self.quick = quicken() and not autoencoder.training


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
