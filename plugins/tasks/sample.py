"""Generate images and keep them: as an array, as pictures, and as ADM's .npz if asked."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from time import perf_counter
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

import sandbox

from .arrays import new_array
from .drawing import best_sampler, drawing_with, in_turn, require_generator
from .npz import from_uint8, to_uint8, write_npz
from .plan import sampling_plan
from .settings import Precision, autocast, precision_on
from .sources import ARRAY, FACTS, LABELS
from .train_generator import coarse_to_fine


class Sample:
    """Sample the recipe's generator, classes in turn; keeps `samples.npy` in the run folder.

    Each batch draws from a stream of its own, so that a run that was stopped goes on with the next
    batch and ends with the same images.
    """

    class Params(sandbox.Params):
        num_images: int = Field(100, gt=0)
        """How many images in all."""
        batch_size: int = Field(50, gt=0)
        """Images generated together."""
        labels: tuple[int, ...] = ()
        """The classes to draw, in turn; all of them when empty."""
        sampler: Literal["recipe", "best"] = "recipe"
        """Draw as the recipe says, or with the best settings that `tune-sampler` found before."""
        precision: Precision = "auto"
        """Of the matrix work. `auto`: bfloat16 on a GPU, float32 on a CPU."""
        columns: int = Field(10, gt=0)
        """Images in a row of the picture."""
        picture_images: int = Field(100, gt=0)
        """Images in the picture, at most."""
        strip_images: int = Field(8, ge=0)
        """Images in the coarse-to-fine picture; none when 0."""
        npz: bool = False
        """Export the samples as `samples.npz` too, shuffled, as ADM's evaluation reads them."""
        untrained: bool = False
        """Sample a generator that has no trained weights."""

    def __init__(self, params: Params) -> None:
        self.params = params

    def plan(self, run: sandbox.Run) -> Mapping[str, str]:
        require_generator(run, self.params.untrained)
        wrong = [label for label in self.params.labels if not 0 <= label < run.num_classes]
        if wrong:
            raise sandbox.SandboxError(
                f"{run.label}: labels: {wrong[0]} is no class; they run from 0 to "
                f"{run.num_classes - 1}"
            )
        with self._drawing(run):
            return sampling_plan(run, self.params.num_images, self.params.batch_size)

    def run(self, run: sandbox.Run) -> dict[str, Any]:
        params = self.params
        labels = in_turn(params.labels or range(run.num_classes), params.num_images)
        with self._drawing(run):
            seconds = self._draw(run, labels)
            with sandbox.atomic(run.folder / LABELS) as path, path.open("wb") as file:
                np.save(file, labels.numpy())
            self._pictures(run, labels)
        how = {
            "num_images": params.num_images,
            "sampler": self._sampler(run),
            "precision": precision_on(run.device, params.precision),
            "seed": run.seed,
        }
        sandbox.write_json(run.folder / FACTS, how)
        return {
            "seconds_per_image": seconds / params.num_images,
            "images_per_second": params.num_images / seconds,
            **how,
        }

    def _drawing(self, run: sandbox.Run) -> ExitStack:
        """The sampler and the precision that were asked for, within this context."""
        stack = ExitStack()
        part = best_sampler(run) if self.params.sampler == "best" else None
        stack.enter_context(drawing_with(run, part))
        stack.enter_context(autocast(run.device, self.params.precision))
        return stack

    def _sampler(self, run: sandbox.Run) -> Mapping[str, Any] | None:
        if self.params.sampler == "best":
            return best_sampler(run).to_dict()
        return run.settings("generator").get("sampler")

    def _draw(self, run: sandbox.Run, labels: Tensor) -> float:
        """Draw and keep all images that are not there yet; return the seconds drawing took.

        A batch's clock stops when its images are on the CPU, so all of the GPU's work is in it. On
        a GPU a first batch, not kept and not counted, takes what is only set up once.
        """
        params = self.params
        done, seconds = self._position(run)
        if run.device.type == "cuda" and done < params.num_images:
            chosen = labels[: params.batch_size].to(run.device)
            run.generator.generate(chosen, run.rng("warm-up")).cpu()
        while done < params.num_images:
            chosen = labels[done : done + params.batch_size].to(run.device)
            began = perf_counter()
            images = to_uint8(run.generator.generate(chosen, run.rng("sample", done))).cpu()
            seconds += perf_counter() - began
            self._keep(run, images, done)
            done += len(chosen)
            sandbox.write_json(run.task_folder / "position.json", [done, seconds])
            run.report(done, params.num_images, seconds_per_image=seconds / done)
        return seconds

    def _position(self, run: sandbox.Run) -> tuple[int, float]:
        path = run.task_folder / "position.json"
        if not path.exists():
            return 0, 0.0
        done, seconds = json.loads(path.read_text())
        run.rewind(done)
        return done, seconds

    def _keep(self, run: sandbox.Run, images: Tensor, done: int) -> None:
        path = run.folder / ARRAY
        shape = (self.params.num_images, *images.shape[1:])
        if done == 0:
            array = new_array(path, np.dtype(np.uint8), shape)
        else:
            array = np.lib.format.open_memmap(path, "r+")
        array[done : done + len(images)] = images.numpy()
        array.flush()

    def _pictures(self, run: sandbox.Run, labels: Tensor) -> None:
        params = self.params
        array = np.load(run.folder / ARRAY, mmap_mode="r", allow_pickle=False)
        shown = torch.from_numpy(array[: params.picture_images].copy())
        run.picture("samples", from_uint8(shown), columns=params.columns)
        if params.strip_images:
            coarse_to_fine(run, params.strip_images)
        if params.npz:
            batches = (
                from_uint8(torch.from_numpy(array[i : i + 256].copy()))
                for i in range(0, len(array), 256)
            )
            write_npz(run.folder / "samples.npz", batches, labels, run.seed)
