"""Batches of a data set, in an order that depends only on the seed and the position.

The clock is images seen: position `i` belongs to epoch `i // size`, whose permutation and whose
augmentation derive from the seed. So a loader started at any batch goes on exactly as one that came
from the beginning, with any number of worker processes, and wherever the images lie.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
    device: torch.device | None = None,
    share: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """Endless shuffled batches, from the one that begins at image number `start`.

    They lie on `device` where it is given: a GPU holds the whole data set where that offers it,
    else it is sent each batch while the one before is used. A share `(i, n)` is the i-th of n equal
    parts of every batch, for one of several processes; its augmentation is its own.
    """
    if dataset.size(split) < 1:
        raise SandboxError(f"the data set has no {split} images")
    if batch_size % share[1]:
        raise SandboxError(f"a batch of {batch_size} has no {share[1]} equal shares")
    held = dataset
    if device is not None and device.type == "cuda" and hasattr(dataset, "to"):
        held = dataset.to(device)
    batches = _Batches(held, split, batch_size, seed, start, share)
    if held is not dataset:
        return (batches[number] for number in _count())
    loaded = _loaded(batches, num_workers)
    if device is None or device.type == "cpu":
        return loaded
    return ahead(loaded, device)


def sweep(
    dataset: Dataset, split: Split, batch_size: int, *, limit: int | None = None, seed: int = 0
) -> Iterator[Batch]:
    """The first `limit` images of a split (all by default), each once, in order."""
    size = dataset.size(split) if limit is None else min(limit, dataset.size(split))
    for begin in range(0, size, batch_size):
        indices = torch.arange(begin, min(begin + batch_size, size))
        yield dataset.batch(split, indices, generator("cpu", seed, split, "sweep", begin))


def ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Endless `batches` on `device`; a thread loads each while the one before it is used.

    What goes wrong in the thread is raised here, at the batch that it concerns.
    """
    pool = ThreadPoolExecutor(1, "batches")
    try:
        coming = pool.submit(_pinned, batches, device)
        while True:
            batch = coming.result()
            coming = pool.submit(_pinned, batches, device)
            yield Batch(to_device(batch.images, device), to_device(batch.labels, device))
    finally:
        pool.shutdown(cancel_futures=True)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; where that is a GPU, the host does not wait for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _pinned(batches: Iterator[Batch], device: torch.device) -> Batch:
    batch = next(batches)
    if device.type != "cuda":
        return batch
    return Batch(batch.images.pin_memory(), batch.labels.pin_memory())


def _loaded(batches: "_Batches", num_workers: int) -> Iterator[Batch]:
    if num_workers == 0:
        return (batches[number] for number in _count())
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=_Count(),
        num_workers=num_workers,
        collate_fn=_as_is,
        generator=generator("cpu", batches.seed),  # else it draws from the stream of dropout
    )
    # Begun here, not at the first batch: processes are forked before there is a second thread.
    return _passed_on(iter(loader))


def _passed_on(batches: Iterator[Batch]) -> Iterator[Batch]:
    yield from batches  # a generator, which can be closed


class _Batches(TorchDataset[Batch]):
    def __init__(
        self,
        dataset: Dataset,
        split: Split,
        batch_size: int,
        seed: int,
        start: int,
        share: tuple[int, int],
    ) -> None:
        self.dataset, self.split, self.seed = dataset, split, seed
        self.batch_size, self.num = batch_size, batch_size // share[1]
        self.start = start + share[0] * self.num

    def __getitem__(self, number: int) -> Batch:
        begin = self.start + number * self.batch_size
        indices = _indices(self.dataset.size(self.split), self.seed, begin, self.num)
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


def _indices(size: int, seed: int, begin: int, num: int) -> Tensor:
    """Which images stand at the positions `begin` to `begin + num`."""
    pieces = []
    while num > 0:
        epoch, offset = divmod(begin, size)
        pieces.append(_permutation(size, seed, epoch)[offset : offset + num])
        begin, num = begin + len(pieces[-1]), num - len(pieces[-1])
    return torch.cat(pieces)


@lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(size, generator=generator("cpu", seed, "epoch", epoch))
