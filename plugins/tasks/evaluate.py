"""Score images against a data set: a run's samples, reconstructions, a folder or an .npz."""

from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

import sandbox

from .npz import from_uint8, read_npz
from .reference import checksum
from .sample import ARRAY, LABELS
from .usage import CodebookUsage, usage_rows

Images = Iterator[tuple[Tensor, Tensor]]
"""Batches of images in [-1, 1] with their labels (-1: not known)."""


class Evaluate:
    """Compute the metrics; every score's name says whose features it used."""

    class Params(sandbox.Params):
        metrics: tuple[sandbox.Part[sandbox.Metric], ...]
        """The scores to compute."""
        images: Literal["samples", "reconstructions"] | Path = "samples"
        """What is scored: the run's samples, the tokenizer's reconstructions of the reference, a
        folder of pictures of one size, an .npz with `arr_0`, or the folder of another run."""
        reference: Literal["train", "validation"] = "validation"
        """The split of the data set that is compared with."""
        num_images: int | None = Field(None, gt=1)
        """At most so many of each; all when absent."""
        batch_size: int = Field(100, gt=0)
        """Images whose features are computed together."""

    def __init__(self, params: Params) -> None:
        self.params = params
        paired = [part.name for part in params.metrics if part.build().paired]
        if paired and params.images != "reconstructions":
            raise sandbox.SandboxError(
                f"evaluate: {', '.join(paired)} compare image by image: set images: "
                "reconstructions, or drop them"
            )
        if isinstance(params.images, Path) and not params.images.exists():
            raise sandbox.SandboxError(
                f"evaluate: images: {params.images}: no such folder or .npz, nor is it samples or "
                "reconstructions"
            )

    def plan(self, run: sandbox.Run) -> Mapping[str, str]:
        split_size = run.dataset.size(self.params.reference)
        if self.params.images == "reconstructions" and not run.has_weights("tokenizer"):
            tokenizer = run.tokenizer
            if isinstance(tokenizer, torch.nn.Module) and any(True for _ in tokenizer.parameters()):
                raise sandbox.SandboxError(
                    f"{run.label}: the tokenizer has no trained weights: run train-tokenizer "
                    "before, or set weights.tokenizer"
                )
        unweighted = self._reads_features() and not run.has_weights("features")
        if unweighted and run.features.needs_weights:
            raise sandbox.SandboxError(
                f"{run.label}: the feature extractor has no weights: run train-classifier "
                "before, or set weights.features"
            )
        return {
            "scores": ", ".join(part.name for part in self.params.metrics),
            "features": self._extractor(run),
            "images": str(self.params.images),
            "reference": f"{split_size:,} images, the {self.params.reference} split of "
            f"{run.settings('dataset')['name']}",
        }

    def run(self, run: sandbox.Run) -> dict[str, Any]:
        params = self.params
        metrics = [part.build() for part in params.metrics]
        reals, fakes = self._reference(run), self._images(run)
        seen: list[Tensor] = []
        counts = {"reference": 0, "images": 0}
        total = self._size(run)
        for real, fake in zip_longest(reals, fakes):
            evidence = [self._evidence(run, pair) if pair else None for pair in (real, fake)]
            for name, found in zip(counts, evidence, strict=True):
                counts[name] += len(found.images) if found else 0
            if evidence[0]:
                seen.append(evidence[0].features.cpu())
            for metric in metrics:
                metric.update(*evidence)
            run.report(min(max(counts.values()), total), total)
        scores = {}
        for metric in metrics:
            suffix = f"[{self._extractor(run)}]" if metric.reads_features else ""
            scores |= {f"{name}{suffix}": value for name, value in metric.compute().items()}
        provenance = self._provenance(run, seen, counts)
        result: dict[str, Any] = {"scores": scores, "provenance": provenance}
        if params.images == "reconstructions":
            result["codebook"] = self._codebook(run)
        return result

    def _reads_features(self) -> bool:
        return any(part.build().reads_features for part in self.params.metrics)

    def _extractor(self, run: sandbox.Run) -> str:
        if not self._reads_features():
            return "no features"
        label = run.features.label
        return f"{label}:{run.settings('dataset')['name']}" if label == "classifier" else label

    def _evidence(self, run: sandbox.Run, pair: tuple[Tensor, Tensor]) -> sandbox.Evidence:
        images, labels = (tensor.to(run.device) for tensor in pair)
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # as provenance says
        with torch.no_grad(), exact:
            if self._reads_features():
                features, logits = run.features.features(images)
            else:
                features = logits = torch.zeros(len(images), 1, device=run.device)
        return sandbox.Evidence((images + 1) / 2, features.float(), logits.float(), labels)

    def _reference(self, run: sandbox.Run) -> Images:
        p = self.params
        for batch in sandbox.sweep(run.dataset, p.reference, p.batch_size, limit=p.num_images):
            yield batch.images, batch.labels

    def _images(self, run: sandbox.Run) -> Images:
        source = self.params.images
        if source == "reconstructions":
            for images, labels in self._reference(run):
                with torch.no_grad():
                    ids = run.tokenizer.encode(images.to(run.device))
                    yield run.tokenizer.decode(ids), labels
            return
        images, labels = _read(run.folder / ARRAY if source == "samples" else Path(source))
        limit = self.params.num_images or len(images)
        for begin in range(0, min(limit, len(images)), self.params.batch_size):
            end = min(begin + self.params.batch_size, limit)
            part = torch.from_numpy(np.array(images[begin:end]))
            yield from_uint8(part), labels[begin:end]

    def _size(self, run: sandbox.Run) -> int:
        size = run.dataset.size(self.params.reference)
        return min(size, self.params.num_images or size)

    def _codebook(self, run: sandbox.Run) -> list[dict[str, float]]:
        usage = CodebookUsage(run.tokenizer.layout, run.tokenizer.vocab_size)
        with torch.no_grad():
            for images, _ in self._reference(run):
                usage.update(run.tokenizer.encode(images.to(run.device)))
        return usage_rows(run.tokenizer.layout, usage)

    def _provenance(
        self, run: sandbox.Run, seen: list[Tensor], counts: Mapping[str, int]
    ) -> dict[str, Any]:
        return {
            "extractor": self._extractor(run),
            "extractor settings": run.settings("features"),
            "reference": f"{self.params.reference} split of {run.settings('dataset')['name']}",
            "reference checksum": checksum(torch.cat(seen)) if self._reads_features() else "none",
            "reference images": counts["reference"],
            "images": str(self.params.images),
            "scored images": counts["images"],
            "sampler": run.settings("generator").get("sampler"),
            "seed": run.seed,
            "precision": "float32",
        }


def _read(path: Path) -> tuple[np.ndarray, Tensor]:
    """uint8 images `n 3 h w` and labels, -1 where not known."""
    if (path / ARRAY).exists():
        path = path / ARRAY
    if path.name == ARRAY:
        if not path.exists():
            raise sandbox.SandboxError(f"{path}: no samples yet; run the task `sample` before")
        images = np.load(path, mmap_mode="r", allow_pickle=False)
        return images, torch.from_numpy(np.load(path.with_name(LABELS), allow_pickle=False))
    if path.suffix == ".npz":
        tensors, labels = read_npz(path)
        return tensors.numpy(), torch.full((len(tensors),), -1) if labels is None else labels
    names = sorted(p for p in path.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if not names:
        raise sandbox.SandboxError(f"{path}: no .png or .jpg pictures there, and no .npz")
    pictures = [_picture(name) for name in names]
    for name, picture in zip(names, pictures, strict=True):
        if picture.shape != pictures[0].shape:
            raise sandbox.SandboxError(
                f"{path}: pictures of one set have one size, but {names[0].name} has "
                f"{pictures[0].shape[1:]} px and {name.name} {picture.shape[1:]} (height, width)"
            )
    return np.stack(pictures), torch.full((len(pictures),), -1)


def _picture(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(sandbox.to_rgb(image)).transpose(2, 0, 1)
    except (OSError, SyntaxError, ValueError) as error:
        raise sandbox.SandboxError(f"{path} cannot be read as an image ({error})") from None
