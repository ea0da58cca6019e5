"""One run: its observers and its tasks, one after the other, in the folder that is its record.

The folder is the run: the same command on the same folder goes on where it was stopped. Tasks whose
`result.json` is there are skipped; the rest resume by themselves. Of several processes the first
one does all of this; the others take part in the tasks that train, and leave no trace.
"""

import json
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import pluggy
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from sandbox import record
from sandbox.assembly import Assembly
from sandbox.checkpoint import Checkpoints, atomic, write_json
from sandbox.distributed import agree, barrier, first_to_fail, rank, world_size
from sandbox.errors import RunError, SandboxError
from sandbox.hooks import ObserverHooks
from sandbox.interfaces import Observer
from sandbox.parts import Part
from sandbox.provenance import choices_told_to, environment
from sandbox.recipe import Recipe
from sandbox.task import Task
from sandbox.values import Role

MIN_PICTURE_PX = 64
"""Smaller images are enlarged by whole factors, so that a person can look at them."""


class LiveRun(Assembly):
    """The `sandbox.Run` that tasks are handed; see that protocol for what each member means.

    Only in the first of several processes does it write and tell.
    """

    def __init__(
        self, recipe: Recipe, folder: Path, hooks: Any = None, device: torch.device | None = None
    ) -> None:
        super().__init__(recipe, folder)
        self.hooks, self.device = hooks, device or self.device

    @property
    def task_folder(self) -> Path:
        return self.folder / self.label

    def save_weights(
        self, role: Role, state: Mapping[str, Tensor], **facts: str | int | float
    ) -> Path:
        if rank() > 0:
            return self._trained(role)
        return super().save_weights(role, state, **facts)

    def rewind(self, done: int) -> None:
        if rank() == 0:
            record.keep(
                self.folder,
                lambda e: e.get("task") != self.label or e["event"] != "step" or e["done"] <= done,
            )

    def report(self, done: int, total: int, **scalars: float) -> None:
        if scalars:
            self.log("step", done=done, total=total, scalars=scalars)
        self._tell("step_ended", done=done, total=total, scalars=scalars)

    def say(self, text: str) -> None:
        self.log("message", text=text)
        self._tell("message", text=text)

    def keep_choice(self, what: str, case: str, chosen: str, why: str) -> None:
        """Keep in `environment.json` what a part chose; tell of each outcome once, at its first."""
        if rank() > 0:
            return
        path = self.folder / "environment.json"
        facts = json.loads(path.read_text())
        known = facts.setdefault("choices", {}).setdefault(what, {})
        if chosen not in known.values():
            self.say(f"{what}: {chosen} for {case} ({why}); all choices are in {path.name}")
        if known.get(case) != chosen:
            known[case] = chosen
            write_json(path, facts)

    def picture(self, name: str, images: Tensor, columns: int) -> Path:
        path = self.task_folder / f"{name}.png"
        if rank() > 0:
            return path
        images = images.detach().float().cpu().clamp(-1, 1)
        factor = max(1, MIN_PICTURE_PX // min(images.shape[-2:]))
        enlarged = images.repeat_interleave(factor, -2).repeat_interleave(factor, -1)
        grid = make_grid(enlarged, nrow=columns, padding=2, pad_value=1.0)
        pixels = ((grid + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        with atomic(path) as draft:
            Image.fromarray(pixels).save(draft, format="png")
        self.log("picture", path=str(path.relative_to(self.folder)))
        self._tell("picture_saved", path=path)
        return path

    def log(self, event: str, **content: Any) -> None:
        """Append one line to `log.jsonl`."""
        if rank() == 0:
            record.append(self.folder, self.label, event, **content)

    def _tell(self, hook: str, **content: Any) -> None:
        if self.hooks is not None:
            getattr(self.hooks, hook)(run=self, task=self.label, **content)


@dataclass
class _Outcome:
    error: BaseException | None = None
    results: dict[str, Mapping[str, Any]] = field(default_factory=dict)


def execute(
    recipe: Recipe,
    folder: Path,
    *,
    name: str,
    command: str = "",
    fresh: bool = False,
    local_rank: int = 0,
) -> dict[str, Any]:
    """Run all tasks of a recipe in `folder`; return their results by label.

    With `fresh`, whatever the folder holds is deleted before. `local_rank`: which of this machine's
    GPUs is ours where there are several processes; those but the first return the results of the
    tasks they took part in. Raises SandboxError for a folder that cannot be used or holds another
    recipe's run, RunError for a failure on the way; all that was done stays in the folder.
    """
    if not recipe.tasks:
        raise SandboxError(f"the recipe {name!r} names no tasks: add `tasks:` to it")
    device = _own_device(recipe.device, local_rank)
    if rank() > 0:
        return _follow(LiveRun(recipe, folder, device=device))
    with record.claimed(folder):
        if fresh:
            record.empty(folder)
        record.remember(recipe, folder)
        hooks = _observers(recipe.observers)
        run = LiveRun(recipe, folder, hooks, device)
        facts = environment(run.device, command)
        if world_size() > 1:
            facts["processes"] = str(world_size())
        write_json(folder / "environment.json", {"recipe": name, **facts})
        record.keep(folder)
        run.log("run_started")
        hooks.run_started(run=run)
        barrier()
        return _lead(run)


def _lead(run: LiveRun) -> dict[str, Any]:
    outcome = _Outcome()
    try:
        with _warnings_said(run), choices_told_to(run.keep_choice), _current(run.device):
            _run_tasks(run, outcome)
    except BaseException as error:
        outcome.error = error
        if not first_to_fail():
            outcome.error = RunError("another process failed; its message says why")
        elif _is_unexpected(error):
            (run.folder / "error.log").write_text(traceback.format_exc())
        raise
    finally:
        run.log("run_ended", error=_one_line(outcome.error) if outcome.error else None)
        run.hooks.run_ended(run=run, error=outcome.error)
    return dict(outcome.results)


def _follow(run: LiveRun) -> dict[str, Any]:
    """The part of a process that is not the first."""
    barrier()  # the folder stands
    outcome = _Outcome()
    try:
        with _warnings_said(run), choices_told_to(run.keep_choice), _current(run.device):
            _run_tasks(run, outcome)
    except BaseException as error:
        if _is_unexpected(error) and first_to_fail():
            (run.folder / "error.log").write_text(traceback.format_exc())
        raise
    return dict(outcome.results)


def _run_tasks(run: LiveRun, outcome: _Outcome) -> None:
    with _blaming(run):
        tasks = [part.build() for part in run.recipe.tasks]  # their mistakes show before any work
    for number, (part, task) in enumerate(zip(run.recipe.tasks, tasks, strict=True), 1):
        run.label = f"{number}-{part.name}"
        skipped = agree((run.task_folder / "result.json").exists())
        if rank() == 0:
            _run_task(run, task, skipped, outcome)
        elif getattr(task, "parallel", False) and not skipped:
            with _blaming(run):
                outcome.results[run.label] = dict(task.run(run))
    run.label = ""


def _run_task(run: LiveRun, task: Task, skipped: bool, outcome: _Outcome) -> None:
    kept = run.task_folder / "result.json"
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
        before = record.seconds_before(run.folder, run.label)
        result["seconds"] = round(perf_counter() - began + before, 3)
        write_json(kept, result)
    Checkpoints(run.task_folder / "checkpoints").clear()  # nothing is lost without them now
    outcome.results[run.label] = result
    run.log("task_ended", result=result, skipped=skipped)
    run._tell("task_ended", result=result, skipped=skipped)


def _own_device(name: str, local_rank: int) -> torch.device | None:
    """The GPU of one of several processes; None where the recipe's word is enough."""
    if world_size() == 1 or not torch.cuda.is_available() or not name.startswith(("auto", "cuda")):
        return None
    if name.startswith("cuda:"):
        raise SandboxError(
            f"device: {name!r} is one GPU, and there are {world_size()} processes; use cuda"
        )
    if local_rank >= torch.cuda.device_count():
        raise SandboxError(
            f"there are more processes on this machine than its {torch.cuda.device_count()} GPUs: "
            "lower --nproc-per-node, or set device: cpu"
        )
    return torch.device("cuda", local_rank)


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Let what names no GPU (random states, new kernels) mean this one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _is_unexpected(error: BaseException) -> bool:
    return not isinstance(error, SandboxError | RunError | KeyboardInterrupt)


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


def _observers(parts: Sequence[Part[Observer]]) -> Any:
    manager = pluggy.PluginManager("sandbox")
    manager.add_hookspecs(ObserverHooks)
    for index, part in reversed(list(enumerate(parts))):  # pluggy calls the last first
        manager.register(part.build(), f"{index}:{part.name}")
    manager.check_pending()
    return manager.hook


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
