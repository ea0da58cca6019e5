"""Batches of a data set, in an order that depends only on the seed and the position.

The clock is images seen: position `i` belongs to epoch `i // size`, whose permutation and whose
augmentation derive from the seed. So a loader started at any batch goes on exactly as one that came
from the beginning, with any number of worker processes.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from sandbox.errors import SandboxError
from sandbox.interfaces import Dataset
from sandbox.seeds import generator
from sandbox.values import Batch, Split


def stream(
    dataset: Dataset,
    split: Split,
    batch_size: int,
    *,
    seed: int,
    start: int = 0,
    num_workers: int = 0,
) -> Iterator[Batch]:
    """Endless shuffled batches, from the one that begins at image number `start`."""
    if dataset.size(split) < 1:
        raise SandboxError(f"the data set has no {split} images")
    batches = _Batches(dataset, split, batch_size, seed, start)
    if num_workers == 0:
        return (batches[number] for number in _count())
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=_Count(),
        num_workers=num_workers,
        collate_fn=_as_is,
        generator=generator("cpu", seed),  # or it would draw from the global stream, as dropout
    )
    return iter(loader)


def sweep(
    dataset: Dataset, split: Split, batch_size: int, *, limit: int | None = None, seed: int = 0
) -> Iterator[Batch]:
    """The first `limit` images of a split (all by default), each once, in order."""
    size = dataset.size(split) if limit is None else min(limit, dataset.size(split))
    for begin in range(0, size, batch_size):
        indices = torch.arange(begin, min(begin + batch_size, size))
        yield dataset.batch(split, indices, generator("cpu", seed, split, "sweep", begin))


class _Batches(TorchDataset[Batch]):
    def __init__(
        self, dataset: Dataset, split: Split, batch_size: int, seed: int, start: int
    ) -> None:
        self.dataset, self.split, self.batch_size = dataset, split, batch_size
        self.seed, self.start = seed, start

    def __getitem__(self, number: int) -> Batch:
        begin = self.start + number * self.batch_size
        size = self.dataset.size(self.split)
        positions = range(begin, begin + self.batch_size)
        indices = torch.stack(
            [_permutation(size, self.seed, i // size)[i % size] for i in positions]
        )
        return self.dataset.batch(
            self.split, indices, generator("cpu", self.seed, self.split, begin)
        )


class _Count:
    def __iter__(self) -> Iterator[int]:
        return _count()

    def __len__(self) -> int:
        return 2**62


def _count() -> Iterator[int]:
    number = 0
    while True:
        yield number
        number += 1


def _as_is(batch: Any) -> Any:
    return batch


@lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(size, generator=generator("cpu", seed, "epoch", epoch))
