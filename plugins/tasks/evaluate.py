"""Score images against a data set: samples, reconstructions, a split, a folder or an .npz.

The one thing to hold in mind: a score means something beside its floor, which is what the data
set's own training images score (`images: train`).
"""

from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

import sandbox

from .evidence import evidence, extractor, named_scores, require_extractor
from .reference import checksum
from .sources import batches, how_drawn, read_images
from .usage import CodebookUsage, usage_rows

Images = Iterator[tuple[Tensor, Tensor]]
"""Batches of images in [-1, 1] with their labels (-1: not known)."""


class Evaluate:
    """Compute the metrics; every score's name says whose features it used."""

    class Params(sandbox.Params):
        metrics: tuple[sandbox.Part[sandbox.Metric], ...]
        """The scores to compute."""
        images: Literal["samples", "reconstructions", "train", "validation"] | Path = "samples"
        """What is scored: the run's samples, the tokenizer's reconstructions of the reference, a
        split of the data set itself (`train`, augmented as it is, gives the floor of a score), a
        folder of pictures of one size, an .npz with `arr_0`, or the folder of another run."""
        reference: Literal["train", "validation"] = "validation"
        """The split of the data set that is compared with."""
        num_images: int | None = Field(None, gt=1)
        """At most so many of each; all when absent."""
        num_reference: int | None = Field(None, gt=1)
        """At most so many of the reference; `num_images` when absent."""
        batch_size: int = Field(100, gt=0)
        """Images whose features are computed together."""

    def __init__(self, params: Params) -> None:
        self.params = params
        metrics = [part.build() for part in params.metrics]
        self._reads_features = any(metric.reads_features for metric in metrics)
        paired = [p.name for p, made in zip(params.metrics, metrics, strict=True) if made.paired]
        if paired and params.images != "reconstructions":
            raise sandbox.SandboxError(
                f"evaluate: {', '.join(paired)} compare image by image: set images: "
                "reconstructions, or drop them"
            )
        if params.images == "reconstructions" and params.num_reference is not None:
            raise sandbox.SandboxError(
                "evaluate: num_reference: there is one reconstruction an image of the reference: "
                "set num_images alone"
            )
        if params.images == params.reference:
            raise sandbox.SandboxError(
                f"evaluate: images: {params.images} is the reference itself: set the other split "
                "as reference"
            )
        if isinstance(params.images, Path) and not params.images.exists():
            raise sandbox.SandboxError(
                f"evaluate: images: {params.images}: no such folder or .npz, nor is it samples, "
                "reconstructions, train or validation"
            )

    def plan(self, run: sandbox.Run) -> Mapping[str, str]:
        size = self._size(run)
        if self.params.images == "reconstructions" and not run.has_weights("tokenizer"):
            tokenizer = run.tokenizer
            if isinstance(tokenizer, torch.nn.Module) and any(True for _ in tokenizer.parameters()):
                raise sandbox.SandboxError(
                    f"{run.label}: the tokenizer has no trained weights: run train-tokenizer "
                    "before, or set weights.tokenizer"
                )
        if self._reads_features:
            require_extractor(run)
        return {
            "scores": ", ".join(part.name for part in self.params.metrics),
            "features": self._extractor(run),
            "images": self._source(run),
            "reference": f"{size:,} images, the {self.params.reference} split of "
            f"{run.settings('dataset')['name']}",
        }

    def run(self, run: sandbox.Run) -> dict[str, Any]:
        metrics = [part.build() for part in self.params.metrics]
        usage = self._usage(run)
        seen: list[Tensor] = []
        counts = {"reference": 0, "images": 0}
        total = self._size(run)
        for pairs in zip_longest(self._reference(run), self._images(run, usage)):
            real, fake = (
                evidence(run, *pair, self._reads_features) if pair else None for pair in pairs
            )
            for name, found in (("reference", real), ("images", fake)):
                counts[name] += len(found.images) if found else 0
            if real:
                seen.append(real.features)
            for metric in metrics:
                metric.update(real, fake)
            run.report(min(max(counts.values()), total), total)
        result: dict[str, Any] = {
            "scores": {k: v for metric in metrics for k, v in named_scores(run, metric).items()},
            "provenance": self._provenance(run, seen, counts),
        }
        if usage:
            result["codebook"] = usage_rows(run.tokenizer.layout, usage)
        return result

    def _extractor(self, run: sandbox.Run) -> str:
        return extractor(run) if self._reads_features else "no features"

    def _source(self, run: sandbox.Run) -> str:
        images = self.params.images
        if images in ("train", "validation"):
            return f"{images} split of {run.settings('dataset')['name']}"
        return str(images)

    def _size(self, run: sandbox.Run) -> int:
        """How many images of the reference take part."""
        size = run.dataset.size(self.params.reference)
        return min(size, self.params.num_reference or self.params.num_images or size)

    def _split(self, run: sandbox.Run, split: sandbox.Split, limit: int | None) -> Images:
        for batch in sandbox.sweep(run.dataset, split, self.params.batch_size, limit=limit):
            yield batch.images, batch.labels

    def _reference(self, run: sandbox.Run) -> Images:
        return self._split(run, self.params.reference, self._size(run))

    def _images(self, run: sandbox.Run, usage: CodebookUsage | None) -> Images:
        params = self.params
        if params.images == "train" or params.images == "validation":
            return self._split(run, params.images, params.num_images)
        if usage:
            return self._reconstructions(run, usage)
        return batches(*read_images(self._path(run)), params.batch_size, params.num_images)

    def _reconstructions(self, run: sandbox.Run, usage: CodebookUsage) -> Images:
        for images, labels in self._reference(run):
            with torch.no_grad():
                ids = run.tokenizer.encode(images.to(run.device))
                usage.update(ids)
                yield run.tokenizer.decode(ids), labels

    def _usage(self, run: sandbox.Run) -> CodebookUsage | None:
        if self.params.images != "reconstructions":
            return None
        return CodebookUsage(run.tokenizer.layout, run.tokenizer.vocab_size)

    def _path(self, run: sandbox.Run) -> Path:
        images = self.params.images
        return images if isinstance(images, Path) else run.folder / "samples.npy"

    def _provenance(
        self, run: sandbox.Run, seen: list[Tensor], counts: Mapping[str, int]
    ) -> dict[str, Any]:
        made = self.params.images == "samples" or isinstance(self.params.images, Path)
        drawn = how_drawn(self._path(run)) if made else {}
        return {
            "extractor": self._extractor(run),
            "extractor settings": run.settings("features"),
            "reference": f"{self.params.reference} split of {run.settings('dataset')['name']}",
            "reference checksum": checksum(torch.cat(seen)) if self._reads_features else "none",
            "reference images": counts["reference"],
            "images": self._source(run),
            "scored images": counts["images"],
            "sampler": drawn.get("sampler"),
            "sampled in": drawn.get("precision"),
            "seed": drawn.get("seed", run.seed),
            "precision": "float32",
        }
