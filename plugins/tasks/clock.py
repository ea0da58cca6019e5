"""Seconds and bytes: how a call is timed, what it held at its peak, and whether it fitted."""

import gc
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch

import sandbox

Precision = Literal["float32", "bfloat16", "float16"]
_NO_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
_REFUSALS = (RuntimeError, MemoryError, ValueError, TypeError, sandbox.SandboxError)
_PROCESS = Path("/proc/self")
WARM_SECONDS = 0.5
"""Work after which a GPU that was idle runs at its speed again."""


class Clock:
    """Marks in time: CUDA events on a GPU, which make nothing wait; elsewhere the CPU's clock.

    A mark that is made while a CUDA graph is recorded is set anew at every replay.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_gpu = device, device.type == "cuda"

    def mark(self) -> Any:
        """Now, in the order of the device's work."""
        if not self.on_gpu:
            return perf_counter()
        recorded = torch.cuda.is_current_stream_capturing()
        event = torch.cuda.Event(enable_timing=True, external=recorded)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def settle(self) -> None:
        """Wait until the device has done its work; marks can be read from then on."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, began: Any, ended: Any) -> float:
        return began.elapsed_time(ended) / 1000 if self.on_gpu else ended - began

    def time(self, call: Callable[[], Any], repeats: int) -> list[float]:
        """Seconds of each of so many calls."""
        found = []
        for _ in range(repeats):
            self.settle()
            began = self.mark()
            call()
            ended = self.mark()
            self.settle()
            found.append(self.seconds(began, ended))
        return found

    def time_on_end(self, call: Callable[[], Any], repeats: int) -> list[float]:
        """Seconds of each of so many calls that follow one another, as a device does them."""
        self.settle()
        marks = [self.mark()]
        for _ in range(repeats):
            call()
            marks.append(self.mark())
        self.settle()
        return [self.seconds(*pair) for pair in pairwise(marks)]

    def warm_up(self, call: Callable[[], Any], least: int) -> list[float]:
        """Seconds of calls until a GPU is no longer idle enough to run at less than its speed."""
        found = self.time(call, least)
        while self.on_gpu and sum(found) < WARM_SECONDS:
            found += self.time(call, 1)
        return found


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(seconds) == 1:
        return dict.fromkeys(("median_seconds", "q1_seconds", "q3_seconds"), seconds[0])
    q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"median_seconds": median, "q1_seconds": q1, "q3_seconds": q3}


def forget_peak(device: torch.device) -> bool:
    """Begin a new peak of memory; False where this machine does not offer that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        (_PROCESS / "clear_refs").write_text("5")  # Linux: the resident set's high-water mark
    except OSError:
        return False
    return True


def peak_bytes(device: torch.device) -> int:
    """The peak since it was forgotten: tensors on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    lines = (_PROCESS / "status").read_text().splitlines()
    (found,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(found) * 1024


def attempt(measure: Callable[[], dict[str, Any]], *, strict: bool = False) -> dict[str, Any]:
    """What was measured with `status` ok, or why it could not be; `strict`, only lack of memory."""
    try:
        return {"status": "ok", **measure()}
    except (*_REFUSALS, sandbox.NotRecorded) as error:
        if is_out_of_memory(error):
            found = {"status": "out of memory"}
        elif strict:
            raise
        else:
            reason = " ".join(str(error).split())[:200]
            found = {"status": "refused", "reason": f"{type(error).__name__}: {reason}"}
    gc.collect()  # here, where the error no longer holds what did not fit
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return found


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or here."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    kinds = (RuntimeError, sandbox.NotRecorded)
    return isinstance(error, kinds) and any(text in str(error) for text in _NO_MEMORY)
