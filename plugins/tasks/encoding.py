"""Images to ids and back outside of a tokenizer's training: how precisely, and how fast.

The one thing to hold in mind: the precision is that of encoder and decoder alone. A tokenizer keeps
its lookups in exact float32 by itself (`sandbox.exact_float32`).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

import sandbox

from .loop import laid_out_for_speed
from .replacing import replaced

CodingPrecision = Literal["float32", "tf32", "bfloat16"]


def coding_precisions(device: torch.device) -> tuple[CodingPrecision, ...]:
    """Those that differ on this device, exact float32 first."""
    tf32 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return ("float32", "tf32", "bfloat16") if tf32 else ("float32", "bfloat16")


def coding_precision(device: torch.device, asked: CodingPrecision) -> CodingPrecision:
    """What is meant on this device: float32 where it has no TF32."""
    return asked if asked in coding_precisions(device) else "float32"


def coding(device: torch.device, precision: CodingPrecision) -> AbstractContextManager[Any]:
    """Matrix products and convolutions in this precision, whatever it is outside."""
    if precision == "float32":
        return sandbox.exact_float32(device)
    if precision == "tf32":
        return sandbox.float32_products(device, "tf32")
    return torch.autocast(device.type, torch.bfloat16)


@contextmanager
def in_bulk(tokenizer: Any, device: torch.device, *, compiled: bool) -> Iterator[None]:
    """Many batches of one size, within this context; their precision is to be set within it too.

    Where the tokenizer has an `autoencoder`, its convolutions lie in a GPU's fastest memory order;
    `compiled`, its halves run by kernels of their own, with the weights as they are at the first
    batch, or are built for that size. They round otherwise, as any other kernel does.
    """
    autoencoder = getattr(tokenizer, "autoencoder", None)
    if not isinstance(autoencoder, nn.Module):
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(laid_out_for_speed(autoencoder, device))
        if compiled:
            stack.enter_context(sandbox.compiling())
            for name in ("encode", "decode"):
                stack.enter_context(replaced(autoencoder, name, _quickest(autoencoder, name)))
        yield


def _quickest(autoencoder: Any, name: str) -> Callable[[Tensor], Tensor]:
    """A half of the autoencoder, by its own kernels where it has some for such a call."""
    built = torch.compile(getattr(autoencoder, name), dynamic=False)
    ready: dict[torch.dtype | None, Any] = {}

    def code(maps: Tensor) -> Tensor:
        kind = maps.device.type
        half = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        if torch.is_grad_enabled():
            return built(maps)
        if half not in ready:
            ready[half] = sandbox.quickened(autoencoder, maps.device)
        return built(maps) if ready[half] is None else getattr(ready[half], name)(maps)

    return code
