"""Whether samples are copies of training images: how near the nearest one is.

The one thing to hold in mind: "near" is measured by what held-out images do. They were never
trained on, so the share of samples that are nearer than all but a few of them is what a generator
that does not memorise keeps small.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

import sandbox

from .evidence import evidence, extractor, require_extractor
from .npz import from_uint8, to_uint8
from .sources import ARRAY, batches, read_images

PIXELS_AT = 32
"""Pixels are compared at this many a side at most."""
Vectors = dict[str, Float[Tensor, "n d"]]
"""What is compared, under the name of each space: `features` and `pixels`."""


class NearCopies:
    """Find each sample's nearest training image, in features and in pixels."""

    class Params(sandbox.Params):
        images: Literal["samples"] | Path = "samples"
        """Whose nearest images are sought: the run's samples, a folder of pictures of one size, an
        .npz with `arr_0`, or the folder of another run."""
        num_images: int | None = Field(1000, gt=1)
        """At most so many samples, and so many held-out images; all when absent."""
        quantile: float = Field(0.01, gt=0, lt=1)
        """Share of the held-out images by which "near" is defined."""
        mirror: bool = True
        """Compare with mirrored training images too."""
        batch_size: int = Field(250, gt=0)
        """Training images that are compared with all others at once."""
        columns: int = Field(10, gt=0)
        """Pairs in a row of the pictures."""

    def __init__(self, params: Params) -> None:
        self.params = params
        if isinstance(params.images, Path) and not params.images.exists():
            raise sandbox.SandboxError(
                f"near-copies: images: {params.images}: no such folder or .npz, nor is it samples"
            )

    def plan(self, run: sandbox.Run) -> Mapping[str, str]:
        size = run.dataset.size("validation")
        require_extractor(run)
        held_out, least = min(size, self.params.num_images or size), 1 / self.params.quantile
        if held_out < least:
            raise sandbox.SandboxError(
                f"{run.label}: quantile: {self.params.quantile} of {held_out} held-out images is "
                f"less than one of them: compare with at least {least:.0f}, or raise quantile"
            )
        return {
            "images": f"{self.params.images}, and {held_out:,} held-out images to compare with",
            "reference": f"{run.dataset.size('train'):,} training images of "
            f"{run.settings('dataset')['name']}{', mirrored too' * self.params.mirror}",
            "features": extractor(run),
        }

    def run(self, run: sandbox.Run) -> dict[str, Any]:
        samples, vectors = self._queries(run)
        nearest = {name: Nearest(rows, samples) for name, rows in vectors.items()}
        done, total = 0, run.dataset.size("train")
        for batch in sandbox.sweep(run.dataset, "train", self.params.batch_size):
            images = batch.images.to(run.device)
            for view in (images, images.flip(-1)) if self.params.mirror else (images,):
                for name, rows in _vectors(run, view).items():
                    nearest[name].compare(rows, to_uint8(view))
            done += len(images)
            run.report(done, total)
        rows = [self._row(name, found) for name, found in nearest.items()]
        for name, found in nearest.items():
            self._picture(run, name, found)
        names = {"features": extractor(run), "pixels": "pixels"}
        return {
            "scores": {
                f"near_copy_share[{names[row['space']]}]": row["near_copy_share"] for row in rows
            },
            "distances": rows,
            "num_images": len(samples),
        }

    def _queries(self, run: sandbox.Run) -> tuple[UInt8[Tensor, "n 3 h w"], Vectors]:
        """The samples, and the vectors of the samples and then the held-out images."""
        params, source = self.params, self.params.images
        array, labels = read_images(run.folder / ARRAY if source == "samples" else Path(source))
        if array.shape[2:] != tuple(run.dataset.image_size):
            raise sandbox.SandboxError(
                f"near-copies: the images have {array.shape[2]} x {array.shape[3]} px, those of "
                f"the data set {' x '.join(map(str, run.dataset.image_size))}: compare equal sizes"
            )
        samples: list[Tensor] = []
        found: list[Vectors] = []
        for images, _ in batches(array, labels, params.batch_size, params.num_images):
            samples.append(to_uint8(images.to(run.device)))
            found.append(_vectors(run, images))
        for images in self._held_out(run):
            found.append(_vectors(run, images))
        return torch.cat(samples), {
            name: torch.cat([each[name] for each in found]) for name in ("features", "pixels")
        }

    def _held_out(self, run: sandbox.Run) -> Iterator[Float[Tensor, "b 3 h w"]]:
        p = self.params
        for batch in sandbox.sweep(run.dataset, "validation", p.batch_size, limit=p.num_images):
            yield batch.images

    def _row(self, space: str, found: "Nearest") -> dict[str, Any]:
        samples, held_out = found.distances.double().split(found.sizes)
        near = held_out.quantile(self.params.quantile)
        return {
            "space": space,
            "samples_median": float(samples.median()),
            "validation_median": float(held_out.median()),
            "near": float(near),
            "near_copy_share": float((samples <= near).double().mean()),
        }

    def _picture(self, run: sandbox.Run, space: str, found: "Nearest") -> None:
        """Samples over their nearest training images: the nearest pairs, then random ones."""
        distances = found.distances[: found.sizes[0]]
        columns = min(self.params.columns, len(distances))
        chance = torch.randperm(len(distances), generator=run.rng("pairs"), device=run.device)
        rows = []
        for chosen in (distances.argsort()[:columns], chance[:columns]):
            rows += [found.samples[chosen], found.copies[chosen]]
        run.picture(f"nearest-in-{space}", from_uint8(torch.cat(rows)), columns=columns)


class Nearest:
    """The nearest training image seen so far of every vector, samples first."""

    def __init__(self, vectors: Float[Tensor, "n d"], samples: UInt8[Tensor, "p 3 h w"]) -> None:
        self.vectors, self.samples = vectors, samples
        self.sizes = [len(samples), len(vectors) - len(samples)]
        self.distances = vectors.new_full((len(vectors),), torch.inf)
        self.copies = torch.zeros_like(samples)

    def compare(self, rows: Float[Tensor, "b d"], images: UInt8[Tensor, "b 3 h w"]) -> None:
        """Take in training images and their vectors.

        Products find the nearest row quickly, but lose the digits of small distances; the distance
        to it is therefore taken from the difference, which vanishes for a copy.
        """
        with sandbox.exact_float32(rows.device):
            row = torch.cdist(self.vectors, rows).argmin(dim=1)
        distances = (self.vectors - rows[row]).norm(dim=1)
        closer = distances < self.distances
        self.distances = torch.where(closer, distances, self.distances)
        num_samples = self.sizes[0]
        shown = rearrange(closer[:num_samples], "n -> n 1 1 1")
        self.copies = torch.where(shown, images[row[:num_samples]], self.copies)


def _vectors(run: sandbox.Run, images: Float[Tensor, "b 3 h w"]) -> Vectors:
    """A batch in both spaces; a distance in pixels is their root mean square, in [0, 1]."""
    images = images.to(run.device)
    labels = torch.zeros(len(images), dtype=torch.long)
    size = [min(side, PIXELS_AT) for side in images.shape[-2:]]
    pixels = rearrange(F.adaptive_avg_pool2d((images + 1) / 2, size), "b c h w -> b (c h w)")
    return {
        "features": evidence(run, images, labels).features,
        "pixels": pixels / pixels.shape[1] ** 0.5,
    }
