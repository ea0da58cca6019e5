"""A run's events as JSON lines, for other programs: `sandbox run recipe.yaml | my-dashboard`.

The lines have the keys of the run folder's own `log.jsonl`, and come as things happen. They are
strict JSON: a value that is not finite becomes null.
"""

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import sandbox


class JsonLines:
    """Writes one line an event to a file or to the standard output, flushed at once."""

    class Params(sandbox.Params):
        path: str = "-"
        """The file the lines are appended to; `-` is the standard output."""

    def __init__(self, params: Params) -> None:
        self.params = params
        self.stream: TextIO = sys.stdout

    @sandbox.hookimpl
    def run_started(self, run: Any) -> None:
        if self.params.path != "-":
            try:
                self.stream = open(self.params.path, "a", encoding="utf-8")  # noqa: SIM115
            except OSError as error:
                raise sandbox.SandboxError(
                    f"observer jsonl: cannot write {self.params.path}: {error.strerror}"
                ) from error
        self._write("run_started", folder=str(run.folder))

    @sandbox.hookimpl
    def task_started(self, run: Any, task: str, plan: Mapping[str, str]) -> None:
        self._write("task_started", task=task, plan=plan)

    @sandbox.hookimpl
    def step_ended(
        self, run: Any, task: str, done: int, total: int, scalars: Mapping[str, float]
    ) -> None:
        self._write("step", task=task, done=done, total=total, scalars=scalars)

    @sandbox.hookimpl
    def picture_saved(self, run: Any, task: str, path: Path) -> None:
        self._write("picture", task=task, path=str(path))

    @sandbox.hookimpl
    def message(self, run: Any, task: str, text: str) -> None:
        self._write("message", task=task, text=text)

    @sandbox.hookimpl
    def task_ended(self, run: Any, task: str, result: Mapping[str, Any], skipped: bool) -> None:
        self._write("task_ended", task=task, result=result, skipped=skipped)

    @sandbox.hookimpl
    def run_ended(self, run: Any, error: BaseException | None) -> None:
        self._write("run_ended", error=None if error is None else str(error))
        if self.params.path != "-":
            self.stream.close()

    def _write(self, event: str, **facts: Any) -> None:
        line = _strict({"time": time.time(), "event": event, **facts})
        print(json.dumps(line, allow_nan=False), file=self.stream, flush=True)


def _strict(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _strict(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(each) for each in value]
    return value
