"""What a training reports of itself: means of its scalars, its speed, and whether it is sound.

The one thing to hold in mind: scalars are summed where they lie, and read only when a report is
due, so that a GPU is not waited for between two reports.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import sandbox

from .clock import Clock
from .settings import Training

_LONG_WAIT = 0.1
"""Share of the time, waited for data, from which on a training on a GPU says how to wait less."""
_BEGINNING_SECONDS = 30.0
"""Of which nothing is told yet: the first batches are always waited for."""


class Watch:
    """Sums scalars on the device, and speaks up when a report is due."""

    def __init__(self, run: sandbox.Run, settings: Training, done: int) -> None:
        self.run, self.settings = run, settings
        self._clock = Clock(run.device)
        self._waits: list[tuple[Any, Any]] = []
        self._waited, self._seconds, self._told = 0.0, 0.0, False
        self._sums: dict[str, Any] = {}
        self._counts: dict[str, int] = {}
        self._restart(done)
        if run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(run.device)

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self._sums, "counts": self._counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        device = self.run.device
        self._sums = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in state["sums"].items()
        }
        self._counts = dict(state["counts"])

    def add(self, scalars: Mapping[str, float | Tensor]) -> None:
        """Take in one step's scalars: numbers, or tensors of no axes that are left as they are."""
        for name in scalars:
            self._counts[name] = self._counts.get(name, 0) + 1
        add_scaled(self._sums, scalars)

    def pulse(self, done: int, total: int) -> None:
        """A step is over: report, if it is time."""
        if done < total and not is_due(done, self.settings.report_every, self.settings.batch_size):
            if self.run.device.type == "cpu":
                self.check(done)  # nothing to wait for there: the very step is named
            return self.run.report(done, total)
        self.check(done)
        sums = _read(self._sums, self.run.device)
        means = {name: value / self._counts[name] for name, value in sums.items()}
        speed = self._speed(done)
        self._advise()
        self._sums, self._counts = {}, {}
        self._restart(done)
        return self.run.report(done, total, **means, **speed)

    def check(self, done: int) -> None:
        """Stop where the loss or its gradient is no longer finite."""
        sick = [
            name
            for name in ("loss", "gradient_norm")
            if name in self._sums and not torch.isfinite(torch.as_tensor(self._sums[name]))
        ]
        if sick:
            begin = done - self.settings.batch_size
            first = begin if self.run.device.type == "cpu" else self._last_done
            raise sandbox.RunError(
                f"{self.run.label}: the {sick[0]} is no longer finite, between image {first:,} and "
                f"image {done:,}; the last good checkpoint stays in "
                f"{self.run.task_folder / 'checkpoints'}; lower learning_rate or clip, in a new "
                "folder (--out) or over this one (--fresh)"
            )

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within, a batch is waited for. What counts is what the device idles meanwhile: on a GPU
        nothing, where it still has work of the steps before."""
        began = self._clock.mark()
        yield
        self._waits.append((began, self._clock.mark()))

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time that does not count as training."""
        began = perf_counter()
        yield
        self._began += perf_counter() - began

    def _restart(self, done: int) -> None:
        self._last_done, self._began = done, perf_counter()
        self._waits = []

    def _speed(self, done: int) -> dict[str, float]:
        self._clock.settle()
        seconds = max(perf_counter() - self._began, 1e-9)
        waited = sum(self._clock.seconds(*wait) for wait in self._waits)
        self._waited, self._seconds = self._waited + waited, self._seconds + seconds
        found = {
            "images_per_second": (done - self._last_done) / seconds,
            "waiting_per_second": min(1.0, waited / seconds),
        }
        if self.run.device.type == "cuda":
            found["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.run.device) / 2**30
        return found

    def _advise(self) -> None:
        """Once; not on a CPU, where loading and training share the cores."""
        share = self._waited / self._seconds
        early = self._seconds < _BEGINNING_SECONDS
        if self._told or early or share < _LONG_WAIT or self.run.device.type == "cpu":
            return
        self._told = True
        self.run.say(
            f"the GPU waits for data {share:.0%} of the time: let more processes load it "
            f"(num_workers: 4 to 16; now {self.settings.num_workers}), or keep it in memory"
        )


@torch.no_grad()
def add_scaled(
    sums: dict[str, Any], scalars: Mapping[str, float | Tensor], share: float = 1.0
) -> None:
    """Add `share` of each scalar to its sum, in one launch where they are of one kind."""
    known: tuple[list[Tensor], list[Tensor]] = ([], [])
    for name, value in scalars.items():
        before = sums.get(name)
        if isinstance(value, Tensor) and isinstance(before, Tensor) and before.dtype == value.dtype:
            known[0].append(before)
            known[1].append(value.detach())
        elif isinstance(value, Tensor) and before is None:
            sums[name] = value.detach() * share  # a sum of its own, to be added to in place
        else:
            sums[name] = (0.0 if before is None else before) + value * share
    if known[0]:
        torch._foreach_add_(*known, alpha=share)


def is_due(done: int, every: int | None, batch_size: int) -> bool:
    """Whether a multiple of `every` was reached in this very step."""
    return every is not None and done // every > (done - batch_size) // every


def _read(sums: Mapping[str, Any], device: torch.device) -> dict[str, float]:
    """The sums as numbers, read from the device at once."""
    tensors = {name: value for name, value in sums.items() if isinstance(value, Tensor)}
    if not tensors:
        return dict(sums)
    read = torch.stack([value.to(device, torch.float64) for value in tensors.values()]).tolist()
    return {**sums, **dict(zip(tensors, read, strict=True))}
