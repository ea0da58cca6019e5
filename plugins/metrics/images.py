"""Scores that are taken image by image and averaged: PSNR, SSIM, whether the class is right."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

import sandbox
from sandbox import Evidence


class _PerImage(ABC):
    """The mean, in float64, of a score that is taken image by image."""

    paired = True
    reads_features = False
    higher_is_better = True
    score: str

    def __init__(self, params: sandbox.Params) -> None:
        self.params = params
        self._count = 0
        self._sum: Tensor | None = None

    @abstractmethod
    def per_image(
        self, real: Float[Tensor, "b 3 h w"], fake: Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, " b"]:
        """The score of every pair, images in [0, 1]."""

    def update(self, real: Evidence | None, fake: Evidence | None) -> None:
        """Raises ValueError unless both sides are there and of one shape."""
        if real is None or fake is None or real.images.shape != fake.images.shape:
            raise ValueError(f"{self.score} compares image by image: it needs as many of each")
        scores = self.per_image(real.images.detach(), fake.images.detach())
        total = scores.double().sum()
        self._sum = total if self._sum is None else self._sum + total
        self._count += len(scores)

    def compute(self) -> Mapping[str, float]:
        """Raises SandboxError where no image was seen."""
        if self._sum is None or not self._count:
            raise sandbox.SandboxError(f"{self.score}: no images: evaluate at least 1")
        return {self.score: float(self._sum) / self._count}


class Psnr(_PerImage):
    """Peak signal-to-noise ratio in dB, 10 log10(1 / MSE): the mean of the images' own ratios.

    Infinite as soon as one reconstruction is exact.
    """

    score = "psnr"

    class Params(sandbox.Params):
        """No settings."""

    def per_image(
        self, real: Float[Tensor, "b 3 h w"], fake: Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, " b"]:
        real, fake = real.double(), fake.double()
        return peak_signal_noise_ratio(fake, real, data_range=1.0, dim=(1, 2, 3), reduction="none")


class Ssim(_PerImage):
    """Structural similarity (Wang et al. 2004), the mean over images.

    Gaussian window of 11 pixels with sigma 1.5, each color channel for itself, edges reflected.
    """

    score = "ssim"

    class Params(sandbox.Params):
        """No settings."""

    def per_image(
        self, real: Float[Tensor, "b 3 h w"], fake: Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, " b"]:
        if min(real.shape[2:]) < 6:
            raise sandbox.SandboxError(
                f"ssim: images of {real.shape[2]} x {real.shape[3]} px are smaller than half its "
                "window: evaluate images of at least 6 px a side, or leave ssim out"
            )
        # On a CPU float32 is good to 1e-6 and ten times as fast; on a GPU it could become TF32.
        precision = torch.float32 if real.device.type == "cpu" else torch.float64
        real, fake = real.to(precision), fake.to(precision)
        return structural_similarity_index_measure(fake, real, data_range=1.0, reduction="none")


class ClassAccuracy:
    """The share of generated images in which the extractor sees the class that was asked for.

    Means something only of an extractor that was trained on the data set's own classes.
    """

    paired = False
    reads_features = True
    higher_is_better = True

    class Params(sandbox.Params):
        """No settings."""

    def __init__(self, params: Params) -> None:
        self.params = params
        self._seen = 0
        self._counts: Tensor | None = None

    def update(self, real: Evidence | None, fake: Evidence | None) -> None:
        if fake is None:
            return
        right = fake.logits.argmax(dim=1) == fake.labels
        counts = torch.stack([right, fake.labels >= 0]).sum(dim=1)
        self._counts = counts if self._counts is None else self._counts + counts
        self._seen += len(fake.labels)

    def compute(self) -> Mapping[str, float]:
        """`class_accuracy` in [0, 1].

        Raises SandboxError where nothing was generated, or an image's class (-1) is not known.
        """
        right, labelled = (0, 0) if self._counts is None else self._counts.tolist()
        if not self._seen:
            raise sandbox.SandboxError("class-accuracy: no generated images: evaluate at least 1")
        if labelled < self._seen:
            raise sandbox.SandboxError(
                f"class-accuracy: {self._seen - labelled} of {self._seen} images have no label: "
                "score images whose classes are known, or leave class-accuracy out"
            )
        return {"class_accuracy": right / self._seen}
