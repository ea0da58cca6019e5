"""Find the sampler settings whose samples score best.

The one thing to hold in mind: all settings draw from the same random streams and are compared with
the same reference images, so that rows differ by their setting; a score chosen as the best of many
flatters a little, which is why the task `sample` draws anew from other streams.
"""

import json
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

import sandbox
from sandbox import Evidence, Part, Split

from .drawing import BEST, adjusted, drawing_with, in_turn, require_generator, sampler_of
from .evidence import evidence, extractor, named_scores, require_extractor
from .npz import from_uint8, to_uint8
from .plan import sampling_plan
from .settings import Precision, autocast, precision_on

Values = Annotated[tuple[Any, ...], Field(min_length=1)]


class TuneSampler:
    """Score every combination of sampler settings; `sample` with `sampler: best` takes the best."""

    class Params(sandbox.Params):
        grid: Annotated[dict[str, Values], Field(min_length=1)]
        """Settings of the generator's sampler and their values, as `{guidance: [0, 1.5]}`; every
        combination is tried."""
        score: Part[sandbox.Metric] = Field(default="fid", validate_default=True)
        """The metric that decides, by the first of its scores."""
        num_images: int = Field(1000, gt=1)
        """Images drawn for each combination, classes in turn."""
        reference: Split = "validation"
        """The split of the data set that samples are compared with."""
        num_reference: int | None = Field(None, gt=1)
        """At most so many of the reference; all when absent."""
        batch_size: int = Field(100, gt=0)
        """Images generated, and whose features are computed, together."""
        precision: Precision = "auto"
        """Of the matrix work. `auto`: bfloat16 on a GPU, float32 on a CPU."""
        untrained: bool = False
        """Sample a generator that has no trained weights."""

    def __init__(self, params: Params) -> None:
        self.params = params
        if params.score.build().paired:
            raise sandbox.SandboxError(
                f"tune-sampler: score: {params.score.name} compares image by image, and samples "
                "have no image to be compared with"
            )

    def plan(self, run: sandbox.Run) -> Mapping[str, str]:
        params, size = self.params, run.dataset.size(self.params.reference)
        require_generator(run, params.untrained)
        parts = self._parts(run)
        require_extractor(run)
        with autocast(run.device, params.precision):
            rows = sampling_plan(run, len(parts) * params.num_images, params.batch_size)
        return rows | {
            "settings": f"{len(parts)}: {', '.join(params.grid)}",
            "score": f"{params.score.name}, features of {extractor(run)}",
            "reference": f"{min(size, params.num_reference or size):,} images, the "
            f"{params.reference} split of {run.settings('dataset')['name']}",
        }

    def run(self, run: sandbox.Run) -> dict[str, Any]:
        parts, position = self._parts(run), run.task_folder / "position.json"
        rows = json.loads(position.read_text()) if position.exists() else []
        reference = list(self._reference(run)) if len(rows) < len(parts) else []
        for number, part in enumerate(parts):
            if number < len(rows):
                continue
            shown = {name: part.to_dict()[name] for name in self.params.grid}
            with drawing_with(run, part):
                rows.append(shown | self._scored(run, reference, number, len(parts)))
            sandbox.write_json(position, rows)
            run.say(", ".join(f"{name} {_short(value)}" for name, value in rows[-1].items()))
        best, score = self._best(rows)
        setting = {name: best[name] for name in self.params.grid}
        found = {"name": sampler_of(run).name, "setting": setting, score: best[score]}
        sandbox.write_json(run.task_folder / BEST, found)
        return {
            "settings": rows,
            "best": best,
            "decided by": score,
            "num_images": self.params.num_images,
            "precision": precision_on(run.device, self.params.precision),
        }

    def _parts(self, run: sandbox.Run) -> list[Part[sandbox.Sampler]]:
        """The sampler in every combination of settings, the last setting varying fastest."""
        own, grid = sampler_of(run), self.params.grid
        try:
            return [
                adjusted(own, dict(zip(grid, values, strict=True)))
                for values in product(*grid.values())
            ]
        except ValueError as error:
            raise sandbox.SandboxError(f"{run.label}: grid: {error}") from None

    def _reference(self, run: sandbox.Run) -> Iterator[Evidence]:
        """The reference with its features, its images as bytes: they are kept throughout."""
        p = self.params
        for batch in sandbox.sweep(run.dataset, p.reference, p.batch_size, limit=p.num_reference):
            seen = evidence(run, batch.images, batch.labels)
            bytes_ = to_uint8(batch.images).to(run.device)
            yield Evidence(bytes_, seen.features, seen.logits, seen.labels)

    def _scored(
        self, run: sandbox.Run, reference: list[Evidence], number: int, num_settings: int
    ) -> dict[str, float]:
        """The scores of samples drawn with the sampler that the generator has now."""
        metric, size = self.params.score.build(), self.params.num_images
        for real in reference:
            images = real.images.float() / 255
            metric.update(Evidence(images, real.features, real.logits, real.labels), None)
        right: list[Tensor] = []
        done = 0
        for labels in in_turn(range(run.num_classes), size).split(self.params.batch_size):
            fake = self._drawn(run, labels.to(run.device), done)
            metric.update(None, fake)
            right.append(fake.logits.argmax(dim=1) == fake.labels)
            done += len(labels)
            run.report(number * size + done, num_settings * size)
        scores = dict(named_scores(run, metric))
        if _knows_classes(run, reference):
            accuracy = float(torch.cat(right).double().mean())
            scores.setdefault(f"class_accuracy[{extractor(run)}]", accuracy)
        return scores

    def _drawn(self, run: sandbox.Run, labels: Tensor, position: int) -> Evidence:
        """One batch of samples, through the 8 bits that the task `sample` keeps."""
        with autocast(run.device, self.params.precision):
            images = run.generator.generate(labels, run.rng("tune", position))
        return evidence(run, from_uint8(to_uint8(images)), labels)

    def _best(self, rows: list[dict[str, Any]]) -> tuple[dict[str, Any], str]:
        """The best row and the name of the score that says so; the first of equals."""
        score = next(name for name in rows[0] if name not in self.params.grid)
        higher = getattr(self.params.score.cls, "higher_is_better", False)
        return (max if higher else min)(rows, key=lambda row: row[score]), score


def _knows_classes(run: sandbox.Run, reference: list[Evidence]) -> bool:
    """Whether the extractor's logits are trained ones, of the classes that are sampled."""
    return run.features.needs_weights and reference[0].logits.shape[1] == run.num_classes


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
