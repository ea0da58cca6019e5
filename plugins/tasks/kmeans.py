"""How evenly k-means would use as many codes on the same vectors: a yardstick for a codebook.

A codebook that learns while the features move ends up with fewer codes in use than the features
call for; k-means on the finished features shows how many that is.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

import sandbox

MAX_VECTORS = 100_000
"""Vectors of one scale that are clustered, at most."""
NUM_STEPS = 20
_MAX_DISTANCES = 2**25
_NUM_ROUNDS = 32


def kmeans_perplexity(
    vectors: Sequence[Float[Tensor, "n c"]],
    vocab_size: int,
    *,
    cosine: bool = False,
    seed: int = 0,
    max_vectors: int = MAX_VECTORS,
    num_steps: int = NUM_STEPS,
) -> tuple[list[float], list[float]]:
    """Perplexities in [1, vocab_size] of k-means codes, one a scale.

    First with `vocab_size` codes for each scale by itself, then with as many for all scales
    together, which weigh the same however many vectors they have. `vectors` are what each scale's
    lookup sees; at most `max_vectors` of each, drawn by `seed`, are used. `cosine`: by direction
    alone (spherical k-means). Raises ValueError for a scale without vectors.
    """
    if not vectors or not all(map(len, vectors)):
        raise ValueError("k-means needs at least one vector of every scale")
    rng = torch.Generator().manual_seed(seed)
    scales = []
    for each in vectors:
        rows = each if len(each) <= max_vectors else each[_some(len(each), max_vectors, rng, each)]
        scales.append(F.normalize(rows.float(), dim=1) if cosine else rows.float())
    with sandbox.exact_float32(scales[0].device):
        alone = []
        for rows in scales:
            even = torch.ones(len(rows), device=rows.device, dtype=torch.float64)
            centers = _centers(rows, even, vocab_size, cosine, rng, num_steps)
            alone.append(_perplexity(rows, centers))
        weights = torch.cat([rows.new_full((len(rows),), 1 / len(rows)) for rows in scales])
        shared = _centers(torch.cat(scales), weights.double(), vocab_size, cosine, rng, num_steps)
        return alone, [_perplexity(rows, shared) for rows in scales]


def _some(size: int, count: int, rng: torch.Generator, like: Tensor) -> Int[Tensor, " count"]:
    return torch.randperm(size, generator=rng)[:count].to(like.device)


def _centers(
    vectors: Float[Tensor, "n c"],
    weights: Float[Tensor, " n"],
    num: int,
    cosine: bool,
    rng: torch.Generator,
    num_steps: int,
) -> Float[Tensor, "k c"]:
    """At most `num` centers of weighted vectors (Lloyd); one that is empty moves to where codes
    are far. Sums are in float64, so that their order does not matter."""
    if len(vectors) <= num:
        return vectors.unique(dim=0)
    centers = _spread(vectors, weights, num, rng)
    weighted = vectors.double() * weights[:, None]
    for _ in range(num_steps):
        ids, distances = _nearest(vectors, centers)
        mass = weights.new_zeros(num).index_add_(0, ids, weights)
        sums = weighted.new_zeros(num, vectors.shape[1]).index_add_(0, ids, weighted)
        means = (sums / mass.clamp_min(1e-300)[:, None]).float()
        means = F.normalize(means, dim=1) if cosine else means
        elsewhere = vectors[_draw(weights * distances, num, rng)]
        centers = torch.where(mass[:, None] > 0, means, elsewhere)
    return centers


def _spread(
    vectors: Float[Tensor, "n c"], weights: Float[Tensor, " n"], num: int, rng: torch.Generator
) -> Float[Tensor, "num c"]:
    """First centers: drawn where those before are far (k-means++), a few at a time."""
    centers = vectors[_draw(weights, 1, rng)]
    distances = _nearest(vectors, centers)[1]
    while len(centers) < num:
        count = min(max(1, num // _NUM_ROUNDS), num - len(centers))
        more = vectors[_draw(weights * distances, count, rng)]
        distances = torch.minimum(distances, _nearest(vectors, more)[1])
        centers = torch.cat([centers, more])
    return centers


def _draw(weights: Float[Tensor, " n"], count: int, rng: torch.Generator) -> Int[Tensor, " count"]:
    """`count` indices with these chances, the same on every device; any where all are zero."""
    ends = weights.cumsum(0)
    marks = torch.rand(count, generator=rng, dtype=torch.float64).to(weights.device)
    return torch.searchsorted(ends, marks * ends[-1], right=True).clamp_max(len(weights) - 1)


def _nearest(
    vectors: Float[Tensor, "n c"], centers: Float[Tensor, "k c"]
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """The nearest center of each vector, and its squared distance."""
    ids = [
        (centers.square().sum(1) - 2 * rows @ centers.T).argmin(1)
        for rows in vectors.split(max(1, _MAX_DISTANCES // len(centers)))
    ]
    nearest = torch.cat(ids)
    return nearest, (vectors - centers[nearest]).square().sum(1).double()


def _perplexity(vectors: Float[Tensor, "n c"], centers: Float[Tensor, "k c"]) -> float:
    counts = torch.bincount(_nearest(vectors, centers)[0], minlength=len(centers)).double()
    share = counts / counts.sum()
    return float((-torch.special.xlogy(share, share).sum()).exp())
