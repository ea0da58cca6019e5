"""Scores of torchmetrics (FID, KID, IS) from features that were extracted once for all of them.

torchmetrics expects a network inside each metric; here that network is the identity, because what
it is fed are features already. Sums, covariances and kernels are kept in float64, in which float32
features add no error of their own. A metric sees all the evidence in one process: torchmetrics'
own gathering across processes is off.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

import sandbox
from sandbox import Evidence

from .collected import Collected, refuse_nan


class _Precomputed(nn.Module):
    """Stands where torchmetrics has a network: features in, the same features out."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        return features


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Let torchmetrics shuffle from `seed`; afterwards the global random state is as it was.

    torchmetrics shuffles on the CPU. `torch.manual_seed` would reseed the GPUs as well.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Without two of its warnings: that features are kept, and that one split has no deviation."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer")
        warnings.filterwarnings("ignore", message=".*degrees of freedom is <= 0")
        yield


class Fid:
    """Frechet Inception distance (Heusel et al. 2017, arXiv 1706.08500), of any extractor.

    |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)) with means and unbiased covariances in float64, from
    running sums. It is biased upwards by few images: compare scores of equal image counts only.
    """

    paired = False
    reads_features = True
    score = "fid"

    class Params(sandbox.Params):
        """No settings."""

    def __init__(self, params: Params) -> None:
        self.params = params
        self._distance: FrechetInceptionDistance | None = None

    def update(self, real: Evidence | None, fake: Evidence | None) -> None:
        for evidence, is_real in ((real, True), (fake, False)):
            if evidence is None:
                continue
            features = evidence.features.detach().double()
            if self._distance is None:
                network = _Precomputed(features.shape[1])
                distance = FrechetInceptionDistance(network, sync_on_compute=False)
                self._distance = distance.to(features.device)
            self._distance.update(features, real=is_real)

    def compute(self) -> Mapping[str, float]:
        """`fid`. Raises SandboxError below two images a side."""
        for side in ("real", "fake"):
            count = 0
            if self._distance is not None:
                count = int(getattr(self._distance, f"{side}_features_num_samples"))
                refuse_nan(self.score, side, getattr(self._distance, f"{side}_features_sum"))
            if count < 2:
                raise sandbox.SandboxError(
                    f"{self.score}: {count} {side} images are too few for a covariance: "
                    "evaluate at least 2"
                )
        return {self.score: float(self._distance.compute())}


class Rfid(Fid):
    """FID between images and their reconstructions: how well a tokenizer keeps the distribution."""

    paired = True
    reads_features = True
    score = "rfid"


class Kid:
    """Kernel Inception distance (Binkowski et al. 2018, arXiv 1801.01401), unbiased.

    Squared maximum mean discrepancy with the kernel (x.y / d + 1)^3, as mean and standard deviation
    over random subsets.
    """

    paired = False
    reads_features = True

    class Params(sandbox.Params):
        num_subsets: int = Field(default=100, ge=1)
        """How many random subsets are drawn."""
        subset_size: int = Field(default=1000, ge=2)
        """Images in a subset, of each side; at most as many as are evaluated."""
        seed: int = Field(default=0, ge=0)
        """Which subsets are drawn."""

    def __init__(self, params: Params) -> None:
        self.params = params
        self._real, self._fake = Collected("kid", "real"), Collected("kid", "fake")

    def update(self, real: Evidence | None, fake: Evidence | None) -> None:
        for evidence, side in ((real, self._real), (fake, self._fake)):
            if evidence is not None:
                side.add(evidence.features)

    def compute(self) -> Mapping[str, float]:
        """`kid`, `kid_std`. Raises SandboxError where a side has fewer images than a subset."""
        size = self.params.subset_size
        real, fake = (
            side.all(at_least=size, why=f"subset_size: {size} (lower it, or add images)")
            for side in (self._real, self._fake)
        )
        with _quiet():
            distance = KernelInceptionDistance(
                _Precomputed(real.shape[1]),
                subsets=self.params.num_subsets,
                subset_size=size,
                sync_on_compute=False,
            )
        distance.update(real, real=True)
        distance.update(fake, real=False)
        with _seeded(self.params.seed):
            mean, std = distance.compute()
        return {"kid": float(mean), "kid_std": float(std)}


class Inception:
    """Inception score (Salimans et al. 2016, arXiv 1606.03498) from the extractor's logits.

    exp E KL(p(y|x) || p(y)) over the generated images, as mean and population standard deviation
    over random splits of equal size. Images left over by the division are dropped after shuffling.
    """

    paired = False
    reads_features = True
    higher_is_better = True

    class Params(sandbox.Params):
        splits: int = Field(default=10, ge=1)
        """Into how many parts the images are split; the published score has 10."""
        seed: int = Field(default=0, ge=0)
        """Which image falls into which split."""

    def __init__(self, params: Params) -> None:
        self.params = params
        self._fake = Collected("inception-score", "fake")

    def update(self, real: Evidence | None, fake: Evidence | None) -> None:
        if fake is not None:
            self._fake.add(fake.logits)

    def compute(self) -> Mapping[str, float]:
        """`inception_score` and, of more than one split, `inception_score_std`.

        Raises SandboxError where there are fewer than two images a split.
        """
        splits = self.params.splits
        logits = self._fake.all(at_least=2 * splits, why=f"splits: {splits}")
        network = _Precomputed(logits.shape[1])
        with _quiet():
            score = InceptionScore(network, splits=splits, sync_on_compute=False)
            with _seeded(self.params.seed):
                equal = len(logits) // splits * splits
                score.update(logits[torch.randperm(len(logits))[:equal]])
                mean, std = score.compute()
        if splits == 1:
            return {"inception_score": float(mean)}
        population = float(std) * ((splits - 1) / splits) ** 0.5  # torchmetrics divides by n - 1
        return {"inception_score": float(mean), "inception_score_std": population}
