"""What codes start from: k-means of as many vectors as are needed, and no more."""

import torch

from sandbox_plugins.codebooks import lookup


def test_of_many_vectors_an_even_sample_is_clustered(monkeypatch):
    vectors = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    whole = lookup.cluster(vectors, 20, "euclidean", 1)
    monkeypatch.setattr(lookup, "MAX_CLUSTERED", 50)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    sample = lookup.cluster(vectors, 20, "euclidean", 1)
    assert torch.equal(sample, lookup.cluster(vectors[order[:50]], 20, "euclidean", 1))
    assert not torch.equal(sample, whole)


def test_there_are_never_fewer_vectors_than_centers(monkeypatch):
    monkeypatch.setattr(lookup, "MAX_CLUSTERED", 10)
    vectors = torch.arange(40.0)[:, None]
    assert len(lookup.cluster(vectors, 30, "euclidean", 0).unique()) == 30
