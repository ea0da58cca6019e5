"""What a run folder remembers: who holds it, which recipe it is a run of, and what happened in it.

The log is one JSON line an event; the last one may have been cut short, and is then dropped.
"""

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import time
from typing import Any

import yaml

from sandbox.checkpoint import atomic
from sandbox.errors import RunError, SandboxError
from sandbox.recipe import Recipe, deciding, to_yaml

LOCK = ".lock"


def append(folder: Path, task: str, event: str, **content: Any) -> None:
    """Add one line to `log.jsonl`."""
    line = {"time": round(time(), 3), "task": task, "event": event, **content}
    try:
        with (folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(line, default=str) + "\n")
    except OSError as error:
        raise RunError(f"cannot write {folder / 'log.jsonl'}: {error}") from error


def keep(folder: Path, wanted: Callable[[Any], bool] = lambda event: True) -> None:
    """Drop log lines that are not wanted, and a last line that a crash cut short."""
    path = folder / "log.jsonl"
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            if wanted(json.loads(line)):
                kept.append(line + "\n")
        except ValueError:
            continue
    with atomic(path) as draft:
        draft.write_text("".join(kept))


def seconds_before(folder: Path, task: str) -> float:
    """Seconds that earlier, interrupted calls of a task took, by the log."""
    total, began, last = 0.0, None, 0.0
    for line in (folder / "log.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["task"] != task:
            continue
        if event["event"] == "task_started":
            total += last - began if began is not None else 0.0
            began = event["time"]
        last = event["time"]
    return total


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
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


def empty(folder: Path) -> None:
    """Delete all but the claim."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def remember(recipe: Recipe, folder: Path) -> None:
    """Keep the recipe. Raises SandboxError where another one's run has begun in the folder."""
    path = folder / "recipe.yaml"
    numbers = {path.parent.name.partition("-")[0] for path in folder.glob("[0-9]*-*/*")}
    begun = tuple(f"tasks.{int(number) - 1}." for number in numbers if number.isdigit())
    if path.exists() and begun:  # what has not begun can still be mended, and tasks be added
        before = _flat(yaml.safe_load(path.read_text()))
        now = _flat(yaml.safe_load(to_yaml(recipe)))
        incidental = now.keys() - _flat(deciding(recipe)).keys()
        for key in sorted({*before, *now}):
            free = key.startswith(("observers", "tasks.")) and not key.startswith(begun)
            if before.get(key) != now.get(key) and not (free or key in incidental):
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
