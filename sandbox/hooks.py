"""The hooks a plugin may implement. Their arguments are a promise to plugin authors.

One hook offers parts; the others notify the observers that a recipe names. No hook returns a value,
so the order in which plugins load can change no result.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import pluggy

hookspec = pluggy.HookspecMarker("sandbox")
hookimpl = pluggy.HookimplMarker("sandbox")


class Register(Protocol):
    """What `sandbox_register` is handed."""

    def __call__(self, interface: type, name: str, cls: type) -> None: ...


class PluginHooks:
    """Called once, when a plugin is loaded."""

    @hookspec
    def sandbox_register(self, register: Register) -> None:
        """Offer components: `register(sandbox.Sampler, "top-k", TopK)`."""


class ObserverHooks:
    """Called on the observers that a recipe names. They watch; they return nothing.

    `run` is the `sandbox.Run`; `task` is the label of the running task, as in "1-train-tokenizer".
    """

    @hookspec
    def run_started(self, run: Any) -> None:
        """The run folder stands; no task has begun."""

    @hookspec
    def task_started(self, run: Any, task: str, plan: Mapping[str, str]) -> None:
        """A task begins; `plan` is what it says it will do, as label to text."""

    @hookspec
    def step_ended(
        self, run: Any, task: str, done: int, total: int, scalars: Mapping[str, float]
    ) -> None:
        """`done` of `total` units (images seen) are behind; `scalars` is empty between reports."""

    @hookspec
    def picture_saved(self, run: Any, task: str, path: Path) -> None:
        """A PNG was written below the run folder."""

    @hookspec
    def message(self, run: Any, task: str, text: str) -> None:
        """Something a person should read: a skipped image, a warning, a finished stage."""

    @hookspec
    def task_ended(self, run: Any, task: str, result: Mapping[str, Any], skipped: bool) -> None:
        """A task is done; `skipped` where its result was already there."""

    @hookspec
    def run_ended(self, run: Any, error: BaseException | None) -> None:
        """The run is over, well or not."""
