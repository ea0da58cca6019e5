"""Train a generator on what its tokenizer, or nothing, makes of the data set."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

import sandbox

from .cache import cached
from .compiled import compiler_of
from .encoding import CodingPrecision, coding, coding_precision, in_bulk
from .loop import Fit, train
from .plan import training_plan
from .settings import Training


class TrainGenerator:
    """Fit the recipe's generator; keeps `weights/generator.safetensors`.

    With `cache`, what the generator reads of the images is computed once and kept on disk.
    """

    parallel = True

    class Params(Training):
        cache: bool = True
        """Encode the data set once and train from the file; off, encode each batch anew. The
        encoder runs by kernels of its own, or compiled, for a cache from 40,000 images on (on a
        GPU, unless `compile` is off), and for batches where the training is compiled."""
        cache_passes: int = Field(1, ge=1)
        """Differently augmented copies of the data set in the cache."""
        encoder_precision: CodingPrecision = "tf32"
        """Of the encoder that makes the ids; a cache's name tells it. `float32` is exact; `tf32`
        (float32 on a CPU) changes under 2 % of the ids, `bfloat16` up to 14 % of a scale's."""
        num_validation_images: int = Field(1024, gt=0)
        """Held-out images on which the loss is measured."""
        strips: bool = True
        """Draw a few samples, coarse to fine, at the end."""

    def __init__(self, params: Params) -> None:
        self.params = params

    def plan(self, run: sandbox.Run) -> Mapping[str, str]:
        made, size = run.generator, run.dataset.image_size
        examples = made.prepare(torch.zeros(1, 3, *size, device=run.device))

        def loss(num_images: int) -> Tensor:
            labels = torch.zeros(num_images, dtype=torch.long, device=run.device)
            return made.loss(examples.expand(num_images, *examples.shape[1:]), labels).total

        rows = training_plan(run, self.params, made.network, loss)
        tokens = "cached on disk" if self.params.cache else "encoded every step"
        if _has_untrained_tokenizer(run):
            tokens += ", of a tokenizer that was never trained"
        return rows | {"tokens": tokens}

    def run(self, run: sandbox.Run) -> dict[str, Any]:
        made, params = run.generator, self.params
        sources = {split: self._source(run, split) for split in ("train", "validation")}

        def loss(batch: sandbox.Batch, progress: float = 0.0) -> sandbox.Losses:
            return made.loss(self._read(run, batch.images), batch.labels)

        def validate() -> dict[str, float]:
            sums: dict[str, float] = {}
            count = 0
            for batch in sandbox.sweep(
                sources["validation"],
                "validation",
                self._validation_batch(),
                limit=params.num_validation_images,
            ):
                found = loss(
                    sandbox.Batch(batch.images.to(run.device), batch.labels.to(run.device))
                )
                for name, value in {"loss": found.total, **found.parts}.items():
                    sums[name] = sums.get(name, 0.0) + float(value) * len(batch.labels)
                count += len(batch.labels)
            return {name: value / count for name, value in sums.items()}

        fit = Fit(
            run,
            params,
            made.network,
            sources["train"],
            "generator",
            loss,
            validate,
            "loss",
            compile=compiler_of(made),
            spare_memory=True,
        )
        with self._encoder(run):
            result = train(fit)
        run.save_weights("generator", made.network.state_dict(), images_seen=result["images_seen"])
        if params.strips:
            coarse_to_fine(run, num_images=8)
        return result

    def _source(self, run: sandbox.Run, split: sandbox.Split) -> sandbox.Dataset:
        params = self.params
        if not params.cache:
            return run.dataset
        passes = params.cache_passes if split == "train" else 1
        limit = None if split == "train" else params.num_validation_images
        return cached(
            run,
            split,
            params.batch_size,
            passes,
            limit,
            params.encoder_precision,
            compile=params.compile != "off",
            num_workers=params.num_workers,
        )

    def _encoder(self, run: sandbox.Run) -> AbstractContextManager[None]:
        """Where every batch is encoded anew, as fast as for a cache."""
        if self.params.cache:
            return nullcontext()
        tokenizer = run.tokenizer if run.settings("tokenizer") else None
        return in_bulk(tokenizer, run.device, compiled=self.params.compiles(run.device))

    def _validation_batch(self) -> int:
        """As many as a step takes at once, where all of them are to be encoded."""
        size = self.params.batch_size
        if self.params.cache:
            return size
        return max(1, size // (self.params.accumulate * sandbox.world_size()))

    def _read(self, run: sandbox.Run, images: Tensor) -> Tensor:
        """What the generator reads of a batch."""
        if self.params.cache:
            return images
        with coding(run.device, coding_precision(run.device, self.params.encoder_precision)):
            return run.generator.prepare(images)


def _has_untrained_tokenizer(run: sandbox.Run) -> bool:
    tokenizer = run.tokenizer if run.settings("tokenizer") else None
    learns = isinstance(tokenizer, nn.Module) and any(True for _ in tokenizer.parameters())
    return learns and not run.has_weights("tokenizer")


def coarse_to_fine(run: sandbox.Run, num_images: int) -> Path | None:
    """A picture of samples after every step (14 at most); None of a generator without steps."""
    labels = torch.arange(num_images, device=run.device) % run.num_classes
    rows: list[Tensor] = []
    run.generator.generate(labels, run.rng("strip"), lambda step, images: rows.append(images.cpu()))
    if not rows:
        return None
    shown = torch.linspace(0, len(rows) - 1, min(len(rows), 14)).round().long().tolist()
    return run.picture("coarse-to-fine", torch.cat([rows[i] for i in shown]), columns=num_images)
