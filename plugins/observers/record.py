"""What a run folder says about its run, read from the files alone.

A run may still be going on, may have been killed in the middle of a line, or may have been resumed
several times: everything here must make sense of such a folder without having seen the run.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class TaskRecord:
    """One task, over all the sessions that worked on it."""

    label: str
    plan: Mapping[str, str] = field(default_factory=dict)
    curves: dict[str, dict[int, float]] = field(default_factory=dict)
    """Scalar name to its values by images seen."""
    done: int = 0
    total: int = 0
    messages: list[str] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)
    result: Mapping[str, Any] = field(default_factory=dict)
    ended: bool = False
    seconds: float = 0.0
    """Time spent, sessions that were cut short included."""

    _began: float | None = None
    _last: float = 0.0

    @property
    def name(self) -> str:
        """The label without its position, as in `train-tokenizer`."""
        position, _, name = self.label.partition("-")
        return name if position.isdigit() and name else self.label

    def begin(self, moment: float) -> None:
        """A session starts; one that never ended counts until its last sign of life."""
        self.close(self._last)
        self._began = self._last = moment

    def close(self, moment: float) -> None:
        if self._began is not None:
            self.seconds += max(0.0, moment - self._began)
        self._began = None


@dataclass
class RunRecord:
    """One run folder."""

    folder: Path
    tasks: dict[str, TaskRecord] = field(default_factory=dict)
    started: float | None = None
    """When the first session began, in unix seconds."""
    going: bool = False
    """Whether the log has no end: the run goes on, or it was killed."""
    error: str | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)
    recipe: str = ""
    notes: list[str] = field(default_factory=list)
    """What could not be read."""

    @property
    def title(self) -> str:
        """The recipe's name, or the folder's where it is not known."""
        return str(self.environment.get("recipe") or self.folder.resolve().name)

    @property
    def seconds(self) -> float:
        return sum(task.seconds for task in self.tasks.values())

    def task(self, label: str) -> TaskRecord:
        return self.tasks.setdefault(label, TaskRecord(label))


def read_run(folder: Path) -> RunRecord:
    """Read a run folder. Raises FileNotFoundError if there is none; parts may be missing."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no run folder {folder}")
    run = RunRecord(folder)
    for event in _events(run):
        _fold(run, event)
    for task in run.tasks.values():
        task.close(task._last)
    for path in sorted(folder.glob("*/result.json"), key=_position):
        task = run.task(path.parent.name)
        task.result, task.ended = _mapping(run, path), True
    for task in run.tasks.values():
        if isinstance(seconds := task.result.get("seconds"), int | float):
            task.seconds = float(seconds)  # measured, where the log only has times of day
        task.pictures = task.pictures or sorted((folder / task.label).glob("*.png"))
    run.environment = _mapping(run, folder / "environment.json")
    recipe = folder / "recipe.yaml"
    run.recipe = recipe.read_text("utf-8", errors="replace") if recipe.is_file() else ""
    return run


def _position(path: Path) -> tuple[int, str]:
    label = path.parent.name
    position = label.partition("-")[0]
    return (int(position) if position.isdigit() else 0, label)


def _mapping(run: RunRecord, path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError:
        value = None
    if isinstance(value, dict):
        return value
    run.notes.append(f"{path.relative_to(run.folder)} could not be read")
    return {}


def _events(run: RunRecord) -> Iterator[Mapping[str, Any]]:
    path = run.folder / "log.jsonl"
    if not path.is_file():
        run.notes.append("there is no log.jsonl, hence no curves and no times")
        return
    num_broken = 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:
                event = None
            if isinstance(event, dict):
                yield event
            else:
                num_broken += 1
    if num_broken:
        run.notes.append(f"{num_broken} line(s) of log.jsonl could not be read")


def _fold(run: RunRecord, event: Mapping[str, Any]) -> None:
    kind, moment = event.get("event"), float(event.get("time") or 0.0)
    if kind == "run_started":
        run.started = moment if run.started is None else run.started
        run.going, run.error = True, None
    elif kind == "run_ended":
        run.going, run.error = False, event.get("error")
    elif label := event.get("task"):
        task = run.task(str(label))
        if kind == "task_started":
            task.begin(moment)
            task.plan = event.get("plan") or task.plan
        elif kind == "task_ended":
            task.close(task._last if event.get("skipped") else moment)
            task.ended, task.result = True, event.get("result") or {}
        else:
            _fold_progress(run, task, kind, event)
        task._last = moment


def _fold_progress(run: RunRecord, task: TaskRecord, kind: Any, event: Mapping[str, Any]) -> None:
    if kind == "step":
        task.done, task.total = int(event.get("done") or 0), int(event.get("total") or 0)
        for name, value in (event.get("scalars") or {}).items():
            if isinstance(value, int | float) and math.isfinite(value):
                task.curves.setdefault(name, {})[task.done] = float(value)
    elif kind == "message":
        task.messages.append(str(event.get("text", "")))
    elif kind == "picture":
        path = run.folder / str(event.get("path", ""))
        task.pictures = [*(other for other in task.pictures if other != path), path]
