"""Batches of a data set, in an order that depends only on the seed and the position.

The clock is images seen: position `i` belongs to epoch `i // size`, whose permutation and whose
augmentation derive from the seed. So a loader started at any batch goes on exactly as one that came
from the beginning, with any number of worker processes, and wherever the images lie.
"""

import sys
import traceback
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from sandbox.errors import RunError, SandboxError
from sandbox.interfaces import Dataset
from sandbox.seeds import generator
from sandbox.values import Batch, Split

NUM_AHEAD = 4
"""Batches on their way while one is used: a slow read among fast ones stalls nothing."""


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
    else it is sent each batch while others are used. A share `(i, n)` is the i-th of n equal
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
    loaded = _loaded(batches, _Count(), num_workers, seed)
    if device is None or device.type == "cpu":
        return loaded
    return ahead(loaded, device)


def sweep(
    dataset: Dataset,
    split: Split,
    batch_size: int,
    *,
    limit: int | None = None,
    seed: int = 0,
    num_workers: int = 0,
) -> Iterator[Batch]:
    """The first `limit` images of a split (all by default), each once, in order.

    So many processes load them; the images do not depend on it.
    """
    size = dataset.size(split) if limit is None else min(limit, dataset.size(split))
    batches = _Sweep(dataset, split, batch_size, size, seed)
    return _loaded(batches, range(-(-size // batch_size)), num_workers, seed)


def ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches on `device`; a thread loads a few while the one before them is used.

    A GPU gets them on a stream of their own, through pinned memory, beside what it computes.
    What goes wrong in the thread is raised here, at the batch that it concerns.
    """
    pool = ThreadPoolExecutor(1, "batches")
    cuda: Any = torch.cuda  # torch leaves its streams untyped
    beside = cuda.Stream(device) if device.type == "cuda" else None
    try:
        coming = deque(pool.submit(_sent, batches, device, beside) for _ in range(NUM_AHEAD))
        while (sent := coming.popleft().result()) is not None:
            coming.append(pool.submit(_sent, batches, device, beside))
            yield _received(*sent)
    finally:
        pool.shutdown(cancel_futures=True)


def _sent(
    batches: Iterator[Batch], device: torch.device, beside: torch.cuda.Stream | None
) -> tuple[Batch, torch.cuda.Event | None] | None:
    """The next batch on its way to `device` and what tells its arrival; None after the last."""
    if (batch := next(batches, None)) is None:
        return None
    with torch.cuda.stream(beside):
        sent = Batch(to_device(batch.images, device), to_device(batch.labels, device))
        return sent, beside.record_event() if beside else None


def _received(batch: Batch, arrival: torch.cuda.Event | None) -> Batch:
    """The batch, which the GPU's work (but not its host) waits for."""
    if arrival is not None:
        stream = torch.cuda.current_stream(batch.labels.device)
        stream.wait_event(arrival)
        for tensor in (batch.images, batch.labels):
            tensor.record_stream(stream)  # else its memory were free when the loader thinks so
    return batch


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; where that is a GPU, the host does not wait for the copy."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _loaded(
    batches: TorchDataset[Batch], numbers: "_Count | range", num_workers: int, seed: int
) -> Iterator[Batch]:
    if num_workers == 0:
        return (batches[number] for number in numbers)
    loader = DataLoader(
        _Answering(batches),
        batch_size=None,
        sampler=numbers,
        num_workers=num_workers,
        collate_fn=_as_is,
        generator=generator("cpu", seed),  # else it draws from the stream of dropout
    )
    # Begun here, not at the first batch: processes are forked before there is a second thread.
    return _passed_on(iter(loader))


_TOLD = SandboxError, RunError, ValueError, OSError
"""What a run tells in one line."""


class _Answer(NamedTuple):
    """A batch, or what is wrong with it, and what was warned of meanwhile, as text: an exception
    may not survive the way between processes, and a loader would add where in its code."""

    batch: Batch | None
    wrong: tuple[type[Exception], str, str] | None
    """Its kind, one of `_TOLD`, what it says, and where it arose."""
    warned: list[tuple[str, type[Warning]]]


class _Answering(TorchDataset[_Answer]):
    def __init__(self, batches: TorchDataset[Batch]) -> None:
        self.batches = batches

    def __getitem__(self, number: int) -> _Answer:
        batch = wrong = None
        with warnings.catch_warnings(record=True) as caught:
            try:
                batch = self.batches[number]
            except _TOLD as error:
                kind = next(kind for kind in _TOLD if isinstance(error, kind))
                wrong = kind, str(error), traceback.format_exc()
        warned = [(str(each.message), _known(each.category)) for each in caught]
        return _Answer(batch, wrong, warned)


def _known(category: type[Warning]) -> type[Warning]:
    """The category itself, if another process finds it by its name."""
    found: Any = sys.modules.get(category.__module__)
    for name in category.__qualname__.split("."):
        found = getattr(found, name, None)
    return category if found is category else UserWarning


def _passed_on(answers: Iterator[_Answer]) -> Iterator[Batch]:
    told, wrong = set[str](), None
    for answer in answers:
        for text, category in answer.warned:
            if text not in told:  # each process warns of what it meets
                told.add(text)
                warnings.warn(text, category, stacklevel=2)
        if wrong := answer.wrong:
            break
        if answer.batch is not None:
            yield answer.batch
    del answers  # ends the processes, which else lasted as long as the traceback is held
    if wrong:
        kind, text, where = wrong
        error = kind(text)
        error.add_note(f"in a process that loads:\n{where}")
        raise error


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


class _Sweep(TorchDataset[Batch]):
    def __init__(
        self, dataset: Dataset, split: Split, batch_size: int, size: int, seed: int
    ) -> None:
        self.dataset, self.split, self.seed = dataset, split, seed
        self.batch_size, self.size = batch_size, size

    def __getitem__(self, number: int) -> Batch:
        begin = number * self.batch_size
        indices = torch.arange(begin, min(begin + self.batch_size, self.size))
        return self.dataset.batch(
            self.split, indices, generator("cpu", self.seed, self.split, "sweep", begin)
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
