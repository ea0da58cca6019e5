"""What ran on the device in one call, kernel by kernel: where the time of a slow row went."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from .clock import Clock, attempt

_MOST = 60
_NAME_LENGTH = 160


def kernels_of(clock: Clock, call: Callable[[], object]) -> dict[str, Any]:
    """The kernels of one call (on a CPU its operators), those that took longest first.

    `kernels` has their names, calls and seconds, `kernels_seconds` what all of them took; what that
    is less than the row's own seconds, the device had nothing to do for, roughly: kernels may run
    side by side, and watching them takes time. Without them, why.
    """

    def measure() -> dict[str, Any]:
        on = ProfilerActivity.CUDA if clock.on_gpu else ProfilerActivity.CPU
        with torch.profiler.profile(activities=[on], acc_events=True) as profile:
            call()
            clock.settle()
        rows = [row for event in profile.key_averages() if (row := _row(event, clock.on_gpu))]
        rows.sort(key=lambda row: -row["seconds"])
        return {"kernels": rows[:_MOST], "kernels_seconds": sum(row["seconds"] for row in rows)}

    found = attempt(measure)
    status = found.pop("status")
    return found if status == "ok" else {"kernels": found.get("reason", status)}


def _row(event: Any, on_gpu: bool) -> Mapping[str, Any] | None:
    spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
    if not spent or event.is_user_annotation:
        return None
    return {"name": event.key[:_NAME_LENGTH], "calls": event.count, "seconds": spent / 1e6}
