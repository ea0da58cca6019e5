"""Which reference a score was measured against: a fingerprint of the reference features.

Two FIDs can be compared only if they were taken against the same statistics; a result therefore
records this checksum beside the score.
"""

import hashlib

import torch
from jaxtyping import Float
from torch import Tensor

STEPS_OF_SCALE = 2**12
"""Statistics are compared to one part in this many of their largest value."""


def checksum(features: Float[Tensor, "n d"]) -> str:
    """The sha256 of the count, mean and covariance of the features, as 64 hex digits.

    Mean and covariance are taken in float64 on the CPU and rounded to 1/4096 of (the power of two
    below) their largest entry, so that the order of summation does not show. Another set of images,
    another extractor or another preprocessing does. Features from other hardware, or from another
    batch size, may differ in the last bits of float32 and by that, rarely, in the checksum: equal
    checksums prove one reference, unequal ones only suggest two.
    Raises ValueError for fewer than two rows or values that are not finite.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"reference statistics need at least 2 rows, got {tuple(features.shape)}")
    features = features.detach().to("cpu", torch.float64)
    if not torch.isfinite(features).all():
        raise ValueError("reference features are not all finite")
    mean = features.mean(dim=0)
    centered = features - mean
    covariance = centered.T @ centered / (len(features) - 1)
    digest = hashlib.sha256(f"{features.shape[0]} x {features.shape[1]}".encode())
    for statistic in (mean, covariance):
        digest.update(_rounded(statistic).numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _rounded(values: Tensor) -> Tensor:
    """Integers that stand for the values, their common exponent first."""
    _, exponent = torch.frexp(values.abs().max())
    steps = torch.round(torch.ldexp(values, -exponent) * STEPS_OF_SCALE)
    return torch.cat([exponent.reshape(1).long(), steps.flatten().long()])
