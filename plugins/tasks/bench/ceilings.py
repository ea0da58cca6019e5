"""What the machine can do at best, measured in the same run: a large matrix product, and a copy."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import sandbox

from ..clock import Clock, Precision, attempt

_REPEATS = 5
_ENOUGH_SEC = 1.0
_SIDE = {"cuda": 8192, "cpu": 1024}
_COPIED_BYTES = {"cuda": 2**30, "cpu": 2**28}


def matrix_product(clock: Clock, precision: Precision) -> dict[str, Any]:
    """TFLOP/s of a square product, the best of a few, the right factor transposed and not.

    A network's layers have it transposed. In float32 it is what torch does unasked, so not TF32; on
    a CPU also what oneDNN does, which may be faster.
    """
    side, calls = _SIDE[clock.device.type], 4 if clock.on_gpu else 1  # launching hides in four

    def measure() -> dict[str, Any]:
        shape, dtype = (side, side), getattr(torch, precision)
        left, right = (torch.randn(shape, device=clock.device).to(dtype) for _ in range(2))
        out = torch.empty_like(left)

        def call(factor: Tensor) -> None:
            for _ in range(calls):
                torch.mm(left, factor, out=out)

        seconds = [*_best(clock, lambda: call(right)), *_best(clock, lambda: call(right.T))]
        if sandbox.suits_onednn(left, right):
            zeros = left.new_zeros(side)
            seconds += _best(clock, partial(sandbox.onednn_linear, left, right, zeros))
        flops = 2 * side**3 * calls
        return {"side": side, "seconds": seconds, "flops_per_second": flops / min(seconds)}

    return {"precision": precision, **attempt(measure)}


def copy(clock: Clock) -> dict[str, Any]:
    """Bytes a second of a copy, read and written ones, the best of a few."""
    size = _COPIED_BYTES[clock.device.type]

    def measure() -> dict[str, Any]:
        source = torch.ones(size, dtype=torch.uint8, device=clock.device)
        target = torch.empty_like(source)
        seconds = _best(clock, lambda: target.copy_(source))
        return {"seconds": seconds, "bytes_per_second": 2 * size / min(seconds)}

    return {"bytes": size, **attempt(measure)}


def _best(clock: Clock, call: Callable[[], object]) -> list[float]:
    """Seconds of a few calls, after one to warm up; of fewer where they are slow."""
    (first,) = clock.time(call, 1)
    return clock.time(call, _REPEATS if first * _REPEATS < _ENOUGH_SEC else 1)
