"""What ran on the device in one call, kernel by kernel: where the time of a slow row went."""

from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from ..clock import Clock, attempt

_MOST = 60
_NAME_LENGTH = 160


def kernels_of(clock: Clock, call: Callable[[], object]) -> dict[str, Any]:
    """The kernels of one call (on a CPU its operators), those that took longest first.

    `kernels` has their names, calls and seconds, `kernels_seconds` what all of them took; what that
    is less than the row's own seconds, the device had nothing to do for, roughly: kernels may run
    side by side, and watching them takes time. `kernels_launched` is how many there were, and
    `kernels_gaps_seconds` in how much of the time from first to last none ran. Without them, why.
    """

    def measure() -> dict[str, Any]:
        on = ProfilerActivity.CUDA if clock.on_gpu else ProfilerActivity.CPU
        with torch.profiler.profile(activities=[on], acc_events=True) as profile:
            call()
            clock.settle()
        kind = DeviceType.CUDA if clock.on_gpu else DeviceType.CPU
        ran = [e for e in profile.events() if e.device_type == kind and not e.is_user_annotation]
        rows = [row for event in profile.key_averages() if (row := _row(event, clock.on_gpu))]
        rows.sort(key=lambda row: -row["seconds"])
        return {
            "kernels": rows[:_MOST],
            "kernels_seconds": sum(row["seconds"] for row in rows),
            "kernels_launched": len(ran),
            "kernels_gaps_seconds": gaps((e.time_range.start, e.time_range.end) for e in ran) / 1e6,
        }

    found = attempt(measure)
    status = found.pop("status")
    return found if status == "ok" else {"kernels": found.get("reason", status)}


def gaps(spans: Iterable[tuple[float, float]]) -> float:
    """How much of the time from the first start to the last end is in none of the spans."""
    ordered = sorted(spans)
    reached = accumulate((end for _, end in ordered), max)
    starts = (start for start, _ in ordered[1:])
    return sum(max(0.0, start - before) for start, before in zip(starts, reached, strict=False))


def _row(event: Any, on_gpu: bool) -> Mapping[str, Any] | None:
    spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
    if not spent or event.is_user_annotation:
        return None
    return {"name": event.key[:_NAME_LENGTH], "calls": event.count, "seconds": spent / 1e6}
