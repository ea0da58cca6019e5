"""Curves, pictures and the recipe for TensorBoard: `tensorboard --logdir RUN_FOLDER`.

Every task is a TensorBoard run of its own below `tensorboard/`, because each counts its images
from zero. A resumed task tells TensorBoard where it goes on, so that what was computed twice is
drawn once.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

import sandbox

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard:
    """Writes scalars and pictures by images seen, and the recipe as text."""

    class Params(sandbox.Params):
        pass

    def __init__(self, params: Params) -> None:
        self._writer: SummaryWriter | None = None
        self._done = 0

    @sandbox.hookimpl
    def run_started(self, run: Any) -> None:
        from torch.utils.tensorboard import SummaryWriter  # only a run that asks pays for it

        recipe = run.folder / "recipe.yaml"
        if recipe.is_file():
            with SummaryWriter(str(run.folder / "tensorboard")) as writer:
                text = recipe.read_text("utf-8")
                writer.add_text("recipe", "".join(f"    {line}\n" for line in text.splitlines()))

    @sandbox.hookimpl
    def step_ended(
        self, run: Any, task: str, done: int, total: int, scalars: Mapping[str, float]
    ) -> None:
        self._done = done
        if scalars:
            writer = self._open(run, task, purge_step=done)
            for name, value in scalars.items():
                writer.add_scalar(name, value, done)

    @sandbox.hookimpl
    def picture_saved(self, run: Any, task: str, path: Path) -> None:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        writer = self._open(run, task, purge_step=None)
        writer.add_image(path.stem, pixels, self._done, dataformats="HWC")

    @sandbox.hookimpl
    def task_ended(self, run: Any, task: str, result: Mapping[str, Any], skipped: bool) -> None:
        self._close()

    @sandbox.hookimpl
    def run_ended(self, run: Any, error: BaseException | None) -> None:
        self._close()

    def _open(self, run: Any, task: str, purge_step: int | None) -> "SummaryWriter":
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            folder = str(run.folder / "tensorboard" / task)
            self._writer = SummaryWriter(folder, purge_step=purge_step)
        return self._writer

    def _close(self) -> None:
        self._done = 0
        if self._writer is not None:
            self._writer.close()
            self._writer = None
