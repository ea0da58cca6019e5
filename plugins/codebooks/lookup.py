"""The nearest of many codes, and k-means, which is the same question asked again.

The one thing to hold: distances are needed for a moment only, so they are made a piece at a time.
Callers stand within `sandbox.exact_float32`.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

Lookup = Literal["euclidean", "cosine"]

MAX_DISTANCES = 2**24
"""How many distances are held at once: 64 MiB of them."""
NUM_LLOYD_STEPS = 5
MAX_CLUSTERED = 2**17
"""Vectors that are clustered, at most (unless there are to be more centers)."""


def nearest_codes(
    vectors: Float[Tensor, "n c"], codes: Float[Tensor, "v c"], lookup: Lookup = "euclidean"
) -> Int[Tensor, " n"]:
    """Ids by squared Euclidean distance; `cosine`: between what is left at length one."""
    if lookup == "cosine":
        vectors, codes = F.normalize(vectors, dim=1), F.normalize(codes, dim=1)
    norms = codes.square().sum(1)
    ids = []
    for rows in vectors.split(max(1, MAX_DISTANCES // len(codes))):
        squares = rows.square().sum(1, keepdim=True) + norms
        ids.append(torch.addmm(squares, rows, codes.T, alpha=-2).argmin(1))
    return torch.cat(ids)


def cluster(
    vectors: Float[Tensor, "n c"], num: int, lookup: Lookup, salt: int
) -> Float[Tensor, "num c"]:
    """`num` centers of at least as many vectors: evenly drawn, then a few k-means (Lloyd) steps.

    Of many vectors `MAX_CLUSTERED` are enough, again evenly drawn.

    A center is the mean of the raw vectors whose nearest it is, whatever `nearest` means: no other
    code has a smaller squared error on them.
    """
    if len(vectors) > (most := max(MAX_CLUSTERED, num)):
        vectors = vectors[_order(len(vectors), 0)[:most].to(vectors.device)]
    centers = vectors[_order(len(vectors), salt)[:num].to(vectors.device)]
    for _ in range(NUM_LLOYD_STEPS):
        ids = nearest_codes(vectors, centers, lookup)
        counts = vectors.new_zeros(num).index_add_(0, ids, vectors.new_ones(len(ids)))
        sums = torch.zeros_like(centers).index_add_(0, ids, vectors)
        means = sums / counts.clamp(min=1)[:, None]
        centers = torch.where(counts[:, None] > 0, means, centers)
    return centers


def _order(size: int, seed: int) -> Int[Tensor, " size"]:
    """A permutation, the same on every device."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))
