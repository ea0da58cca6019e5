"""Progress for the person at the terminal, or plain lines where the output is no terminal.

Each task shows its plan, then one bar (images seen, rate, time left, latest scalars), then its
result. The time left is that of the running task; what later tasks will take is not known before
they have begun, so it is not guessed: the heading says how many are to come.
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field
from tqdm import tqdm

import sandbox

from .wording import columns_of, duration, folded, is_scalar, is_table, number, one_line

_LIST_CHARACTERS = 100
_NUM_SCALARS = 2


class Console:
    """Writes progress, plans, messages and results to `stream`, by default the standard output."""

    class Params(sandbox.Params):
        every_sec: float = Field(default=10.0, gt=0, le=3600)
        """Seconds between two progress lines where the output is not a terminal."""

    def __init__(self, params: Params) -> None:
        self.params = params
        self.stream = sys.stdout
        self._bar: tqdm[Any] | None = None
        self._num_tasks = 0
        self._run_began = self._task_began = time.monotonic()
        self._forget_progress()

    def _forget_progress(self) -> None:
        self._first: tuple[float, int] | None = None  # when counting began, and from which count
        self._last_line = time.monotonic()
        self._latest: dict[str, float] = {}

    @sandbox.hookimpl
    def run_started(self, run: Any) -> None:
        self._run_began = time.monotonic()
        self._num_tasks = _count_tasks(run.folder / "recipe.yaml")
        self._write(f"run folder: {run.folder}")

    @sandbox.hookimpl
    def task_started(self, run: Any, task: str, plan: Mapping[str, str]) -> None:
        self._close_bar()
        position = task.partition("-")[0]
        several = self._num_tasks > 1 and position.isdigit()
        heading = f"{task}  (task {position} of {self._num_tasks})" if several else task
        self._write("", heading, *_aligned(list(plan.items())))
        self._task_began = time.monotonic()
        self._forget_progress()

    @sandbox.hookimpl
    def step_ended(
        self, run: Any, task: str, done: int, total: int, scalars: Mapping[str, float]
    ) -> None:
        self._latest.update(scalars)
        if self.stream.isatty():
            self._move_bar(task, done, total)
        else:
            self._progress_line(task, done, total)

    @sandbox.hookimpl
    def picture_saved(self, run: Any, task: str, path: Path) -> None:
        self._write(f"  picture: {path}")

    @sandbox.hookimpl
    def message(self, run: Any, task: str, text: str) -> None:
        self._write(f"  {text}")

    @sandbox.hookimpl
    def task_ended(self, run: Any, task: str, result: Mapping[str, Any], skipped: bool) -> None:
        self._close_bar()
        if skipped:
            self._write(f"{task}: kept from an earlier run")
            return
        self._write(f"{task}: done in {duration(time.monotonic() - self._task_began)}")
        self._write(*describe({key: v for key, v in result.items() if key != "seconds"}))

    @sandbox.hookimpl
    def run_ended(self, run: Any, error: BaseException | None) -> None:
        self._close_bar()
        took = duration(time.monotonic() - self._run_began)
        if error is None:
            self._write("", f"ok: finished in {took}; everything is in {run.folder}")
        else:
            self._write("", f"failed after {took}: {one_line(error)}")

    def _write(self, *lines: str) -> None:
        with tqdm.external_write_mode(file=self.stream):  # clears a bar and redraws it below
            for line in lines:
                print(line, file=self.stream)
            self.stream.flush()

    def _move_bar(self, task: str, done: int, total: int) -> None:
        if self._bar is None or done < self._bar.n:  # a task may count more than once
            self._close_bar()
            self._bar = tqdm(
                total=total,
                initial=done,
                desc=f"  {task.partition('-')[2] or task}",
                unit=" images",
                unit_scale=True,
                dynamic_ncols=True,
                file=self.stream,
            )
        self._bar.total = total
        self._bar.set_postfix_str(_brief(self._latest), refresh=False)
        self._bar.update(done - self._bar.n)

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _progress_line(self, task: str, done: int, total: int) -> None:
        now = time.monotonic()
        if self._first is None or done < self._first[1]:
            self._first = now, done
        if now - self._last_line < self.params.every_sec:
            return
        self._last_line = now
        began, start = self._first
        left = ""
        if done > start:
            left = f"  about {duration((now - began) * (total - done) / (done - start))} left"
        percent = f"{100 * done / max(total, 1):3.0f} %"
        count = f"{number(done)} of {number(total)}"
        scalars = f"  {_brief(self._latest)}" if self._latest else ""
        self._write(f"  {task}  {percent}  {count}{left}{scalars}")


def describe(result: Mapping[str, Any], indent: str = "  ") -> list[str]:
    """A task's result as aligned lines: numbers first, then the nested mappings and tables."""
    result = folded(result)
    lines = _aligned([(k, number(v)) for k, v in result.items() if is_scalar(v)], indent)
    for key, value in result.items():
        if is_scalar(value):
            continue
        if isinstance(value, Mapping):
            lines += [f"{indent}{key}", *describe(value, indent + "  ")]
        elif is_table(value):
            lines += [f"{indent}{key}", *_table(value, indent + "  ")]
        elif value and isinstance(value, list) and all(isinstance(v, int | float) for v in value):
            lines.append(f"{indent}{key}  {'  '.join(map(number, value))}")
        else:
            text = json.dumps(value, default=str)
            short = text if len(text) <= _LIST_CHARACTERS else text[:_LIST_CHARACTERS] + " ..."
            lines.append(f"{indent}{key}  {short}")
    return lines


def _aligned(pairs: Sequence[tuple[str, str]], indent: str = "  ") -> list[str]:
    width = max((len(label) for label, _ in pairs), default=0)
    return [f"{indent}{label:<{width}}  {text}" for label, text in pairs]


def _table(rows: Sequence[Mapping[str, Any]], indent: str) -> list[str]:
    """Columns as narrow as can be: a heading of several words (`psnr_upto`) stands on as many
    lines, the last word beside the others'."""
    columns = columns_of(rows)
    words = [column.strip("_").split("_") for column in columns]
    height = max(map(len, words))
    stacked = [[""] * (height - len(each)) + each for each in words]
    cells = [list(line) for line in zip(*stacked, strict=True)]
    cells += [[number(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    return [
        indent + "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        for row in cells
    ]


def _brief(scalars: Mapping[str, float]) -> str:
    """The few scalars that fit a line: losses first, a whole before its parts (`loss/scale1`)."""

    def rank(name: str) -> tuple[bool, bool]:
        return "/" in name.removeprefix("validation/"), "loss" not in name

    shown = sorted(scalars, key=rank)[:_NUM_SCALARS]
    return "  ".join(f"{name} {number(scalars[name])}" for name in shown)


def _count_tasks(recipe: Path) -> int:
    if not recipe.is_file():
        return 0
    tasks = (yaml.safe_load(recipe.read_text("utf-8")) or {}).get("tasks")
    return len(tasks) if isinstance(tasks, list | dict) else 0
