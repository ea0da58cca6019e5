"""Fidelity and variety, told apart: precision and recall of one set of images against another.

torchmetrics has no such metric. Distances are taken in float64, a slice of the matrix at a time.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

import sandbox
from sandbox import Evidence

from .collected import Collected

DISTANCES_AT_ONCE = 2**25
"""How many pairwise distances are held at a time: 256 MiB in float64."""


class PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv 1904.06991).

    Precision is the share of generated images that lie in the manifold of the real ones, recall the
    share of real images that lie in that of the generated ones. A manifold is the union of a ball
    around each image that reaches to its k-th nearest neighbour (equation 1).
    """

    paired = False
    reads_features = True
    higher_is_better = True

    class Params(sandbox.Params):
        neighbours: int = Field(default=3, ge=1)
        """k: which neighbour a ball reaches to; the paper's is 3."""

    def __init__(self, params: Params) -> None:
        self.params = params
        self._real = Collected("precision-recall", "real")
        self._fake = Collected("precision-recall", "fake")

    def update(self, real: Evidence | None, fake: Evidence | None) -> None:
        for evidence, side in ((real, self._real), (fake, self._fake)):
            if evidence is not None:
                side.add(evidence.features)

    def compute(self) -> Mapping[str, float]:
        """`precision` and `recall`. Raises SandboxError unless each side has more than k images."""
        k = self.params.neighbours
        real, fake = (
            side.all(at_least=k + 1, why=f"neighbours: {k}") for side in (self._real, self._fake)
        )
        inside_real = _inside(fake, real, _radii(real, k))
        inside_fake = _inside(real, fake, _radii(fake, k))
        return {
            "precision": float(inside_real.double().mean()),
            "recall": float(inside_fake.double().mean()),
        }


def _in_chunks(points: Float[Tensor, "n d"], num_others: int) -> tuple[Tensor, ...]:
    return points.split(max(1, DISTANCES_AT_ONCE // num_others))


def _radii(points: Float[Tensor, "n d"], k: int) -> Float[Tensor, " n"]:
    """Each point's distance to its k-th nearest neighbour; the nearest of all is itself."""
    chunks = _in_chunks(points, len(points))
    return torch.cat([torch.cdist(chunk, points).kthvalue(k + 1).values for chunk in chunks])


def _inside(
    points: Float[Tensor, "n d"], centers: Float[Tensor, "p d"], radii: Float[Tensor, " p"]
) -> Bool[Tensor, " n"]:
    """Whether each point lies in any ball."""
    chunks = _in_chunks(points, len(centers))
    return torch.cat([(torch.cdist(chunk, centers) <= radii).any(dim=1) for chunk in chunks])
