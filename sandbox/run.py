"""One run: its folder, its record, its observers, its tasks one after the other.

The folder is the run: the same command on the same folder goes on where it was stopped. Tasks whose
`result.json` is there are skipped; the rest resume by themselves.
"""

import fcntl
import json
import shutil
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter, time
from typing import Any

import pluggy
import yaml
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from sandbox.assembly import Assembly
from sandbox.checkpoint import Checkpoints, atomic, write_json
from sandbox.errors import RunError, SandboxError
from sandbox.hooks import ObserverHooks
from sandbox.interfaces import Observer
from sandbox.parts import Part
from sandbox.provenance import environment
from sandbox.recipe import Recipe, to_yaml

LOCK = ".lock"
MIN_PICTURE_PX = 64
"""Smaller images are enlarged by whole factors, so that a person can look at them."""


class LiveRun(Assembly):
    """The `sandbox.Run` that tasks are handed; see that protocol for what each member means."""

    def __init__(self, recipe: Recipe, folder: Path, hooks: Any = None) -> None:
        super().__init__(recipe, folder)
        self.hooks = hooks

    @property
    def task_folder(self) -> Path:
        return self.folder / self.label

    def rewind(self, done: int) -> None:
        self._log_keep(
            lambda e: e.get("task") != self.label or e["event"] != "step" or e["done"] <= done
        )

    def report(self, done: int, total: int, **scalars: float) -> None:
        if scalars:
            self.log("step", done=done, total=total, scalars=scalars)
        self._tell("step_ended", done=done, total=total, scalars=scalars)

    def say(self, text: str) -> None:
        self.log("message", text=text)
        self._tell("message", text=text)

    def picture(self, name: str, images: Tensor, columns: int) -> Path:
        images = images.detach().float().cpu().clamp(-1, 1)
        factor = max(1, MIN_PICTURE_PX // min(images.shape[-2:]))
        enlarged = images.repeat_interleave(factor, -2).repeat_interleave(factor, -1)
        grid = make_grid(enlarged, nrow=columns, padding=2, pad_value=1.0)
        pixels = ((grid + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        path = self.task_folder / f"{name}.png"
        with atomic(path) as draft:
            Image.fromarray(pixels).save(draft, format="png")
        self.log("picture", path=str(path.relative_to(self.folder)))
        self._tell("picture_saved", path=path)
        return path

    def log(self, event: str, **content: Any) -> None:
        """Append one line to `log.jsonl`."""
        line = {"time": round(time(), 3), "task": self.label, "event": event, **content}
        try:
            with (self.folder / "log.jsonl").open("a") as file:
                file.write(json.dumps(line, default=str) + "\n")
        except OSError as error:
            raise RunError(f"cannot write {self.folder / 'log.jsonl'}: {error}") from error

    def _tell(self, hook: str, **content: Any) -> None:
        if self.hooks is not None:
            getattr(self.hooks, hook)(run=self, task=self.label, **content)

    def _log_keep(self, wanted: Any) -> None:
        """Drop log lines that are not wanted, and a last line that a crash cut short."""
        path = self.folder / "log.jsonl"
        kept = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                if wanted(json.loads(line)):
                    kept.append(line + "\n")
            except ValueError:
                continue
        with atomic(path) as draft:
            draft.write_text("".join(kept))


@dataclass
class _Outcome:
    error: BaseException | None = None
    results: dict[str, Mapping[str, Any]] = field(default_factory=dict)


def execute(
    recipe: Recipe, folder: Path, *, name: str, command: str = "", fresh: bool = False
) -> dict[str, Any]:
    """Run all tasks of a recipe in `folder`; return their results by label.

    With `fresh`, whatever the folder holds is deleted before.
    Raises SandboxError for a folder that cannot be used or holds another recipe's run, RunError for
    a failure on the way; all that was done stays in the folder.
    """
    if not recipe.tasks:
        raise SandboxError(f"the recipe {name!r} names no tasks: add `tasks:` to it")
    with _claimed(folder):
        if fresh:
            _empty(folder)
        _remember(recipe, folder)
        hooks = _observers(recipe.observers)
        run = LiveRun(recipe, folder, hooks)
        write_json(
            folder / "environment.json", {"recipe": name, **environment(run.device, command)}
        )
        run._log_keep(lambda event: True)
        run.log("run_started")
        hooks.run_started(run=run)
        outcome = _Outcome()
        try:
            with _warnings_said(run):
                _run_tasks(run, outcome)
        except BaseException as error:
            outcome.error = error
            if not isinstance(error, SandboxError | RunError | KeyboardInterrupt):
                (folder / "error.log").write_text(traceback.format_exc())
            raise
        finally:
            text = _one_line(outcome.error) if outcome.error else None
            run.log("run_ended", error=text)
            hooks.run_ended(run=run, error=outcome.error)
        return dict(outcome.results)


def _run_tasks(run: LiveRun, outcome: _Outcome) -> None:
    with _blaming(run):
        tasks = [part.build() for part in run.recipe.tasks]  # their mistakes show before any work
    for number, (part, task) in enumerate(zip(run.recipe.tasks, tasks, strict=True), 1):
        run.label = f"{number}-{part.name}"
        kept = run.task_folder / "result.json"
        skipped = kept.exists()
        if skipped:
            result = json.loads(kept.read_text())
        else:
            with _blaming(run):
                plan = dict(task.plan(run))
            run.log("task_started", plan=plan)
            run._tell("task_started", plan=plan)
            began = perf_counter()
            with _blaming(run):
                result = dict(task.run(run))
            result["seconds"] = round(perf_counter() - began + _seconds_before(run), 3)
            write_json(kept, result)
        Checkpoints(run.task_folder / "checkpoints").clear()  # nothing is lost without them now
        outcome.results[run.label] = result
        run.log("task_ended", result=result, skipped=skipped)
        run._tell("task_ended", result=result, skipped=skipped)
    run.label = ""


@contextmanager
def _warnings_said(run: LiveRun) -> Iterator[None]:
    """Let warnings (a skipped image, say) reach the log and the observers."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: run.say(str(message))
        yield


@contextmanager
def _blaming(run: LiveRun) -> Iterator[None]:
    """Put what a part refuses, or the machine, as one line that names the task."""
    label = run.label or "tasks"
    try:
        yield
    except ValueError as error:
        raise SandboxError(f"{label}: {error}") from error
    except OSError as error:
        raise RunError(f"{label}: {error} (mend it and run the same command again)") from error


def _seconds_before(run: LiveRun) -> float:
    """Seconds that earlier, interrupted calls of this task took, by the log."""
    total, began, last = 0.0, None, 0.0
    for line in (run.folder / "log.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["task"] != run.label:
            continue
        if event["event"] == "task_started":
            total += last - began if began is not None else 0.0
            began = event["time"]
        last = event["time"]
    return total


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Hold the folder against a second process for as long as the run lasts."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    except OSError as error:
        raise SandboxError(
            f"cannot write to the run folder {folder}: {error.strerror}; choose another with --out"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SandboxError(f"{folder} is in use by another process; choose --out") from None
        yield


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _remember(recipe: Recipe, folder: Path) -> None:
    path = folder / "recipe.yaml"
    numbers = {path.parent.name.partition("-")[0] for path in folder.glob("[0-9]*-*/*")}
    begun = tuple(f"tasks.{int(number) - 1}." for number in numbers if number.isdigit())
    if path.exists() and begun:  # what has not begun can still be mended, and tasks be added
        before = _flat(yaml.safe_load(path.read_text()))
        now = _flat(yaml.safe_load(to_yaml(recipe)))
        for key in sorted({*before, *now}):
            free = key.startswith(("observers", "tasks.")) and not key.startswith(begun)
            if before.get(key) != now.get(key) and not free:
                raise SandboxError(
                    f"{folder} holds a run of another recipe ({key} is {before.get(key)!r} there, "
                    f"{now.get(key)!r} here): choose another with --out, or empty it with --fresh"
                )
    with atomic(path) as draft:
        draft.write_text(to_yaml(recipe))


def _flat(value: Any, where: str = "") -> dict[str, Any]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    flat: dict[str, Any] = {}
    for key, inner in items:
        name = f"{where}.{key}" if where else str(key)
        if isinstance(inner, dict | list):
            flat |= _flat(inner, name)
        else:
            flat[name] = inner
    return flat


def _observers(parts: Sequence[Part[Observer]]) -> Any:
    manager = pluggy.PluginManager("sandbox")
    manager.add_hookspecs(ObserverHooks)
    for index, part in reversed(list(enumerate(parts))):  # pluggy calls the last first
        manager.register(part.build(), f"{index}:{part.name}")
    manager.check_pending()
    return manager.hook


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
