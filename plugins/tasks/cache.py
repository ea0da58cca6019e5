"""What a generator reads of a data set, computed once and kept on disk.

The file is a plain .npy array beside its labels, read through a memory map; its name carries a
checksum of everything it depends on, so that another tokenizer or data set makes another file, and
the precision that the images were encoded in, which decides some of the ids.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import sandbox

from .arrays import new_array
from .encoding import CodingPrecision, coding, coding_precision, in_bulk

_RESIDENT_BYTES = 4 * 2**30
"""What takes no more is moved to a GPU as a whole."""
_BATCH_SIZE = 128
"""Images encoded at once, at most."""
_NUM_COMPILED = 40_000
"""From so many images on, a GPU saves more time by compiling than compiling takes."""


class Prepared:
    """A `sandbox.Dataset` whose images are what `Generator.prepare` made of the real ones."""

    def __init__(self, examples: Tensor, labels: Tensor, source: sandbox.Dataset) -> None:
        self.examples, self.labels = examples, labels
        self.num_classes, self.class_names = source.num_classes, source.class_names
        self.image_size = source.image_size

    def size(self, split: sandbox.Split) -> int:
        return len(self.labels)

    def batch(self, split: sandbox.Split, indices: Tensor, rng: torch.Generator) -> sandbox.Batch:
        rows = sandbox.to_device(indices, self.labels.device)
        examples = self.examples[rows]
        if not examples.is_floating_point():
            examples = examples.long()
        return sandbox.Batch(examples, self.labels[rows])

    def to(self, device: torch.device) -> "Prepared":
        """The same on `device`; itself, left where it is, from 4 GiB on."""
        if self.examples.nbytes >= _RESIDENT_BYTES:
            return self
        return Prepared(self.examples.to(device), self.labels.to(device), self)


@torch.no_grad()
def cached(
    run: sandbox.Run,
    split: sandbox.Split,
    batch_size: int,
    passes: int,
    limit: int | None,
    precision: CodingPrecision = "tf32",
    *,
    compile: bool = True,
    num_workers: int = 0,
) -> Prepared:
    """The prepared data set of a split, from its file if there is one.

    On a GPU the encoder of many images runs by kernels of its own, or is compiled, unless `compile`
    is False. `num_workers` processes load the images, unless these are in memory. Of several
    processes the first one names and writes the file, and the others wait.
    """
    # Agreed on: a last bit of the tokenizer's weights that differs must not make another name.
    key = sandbox.agree(_key(run, split, passes, limit) if sandbox.rank() == 0 else "")
    precision = coding_precision(run.device, precision)
    folder = run.folder / "cache" / f"{split}-{precision}-{key}"
    size = run.dataset.size(split) if limit is None else min(limit, run.dataset.size(split))
    if sandbox.rank() == 0 and not (folder / "labels.npy").exists():
        run.say(f"encoding {passes * size:,} {split} images once, for {folder.name}")
        size_at_once = min(batch_size, _BATCH_SIZE)
        compiled = compile and run.device.type == "cuda" and passes * size >= _NUM_COMPILED
        with _encoder(run, size_at_once, compiled) as encode, coding(run.device, precision):
            _write(run, split, encode, size_at_once, passes, size, folder, num_workers)
    sandbox.barrier()
    # Mapped for copy on write, since torch takes no read-only array; nothing is written.
    examples = np.load(folder / "examples.npy", mmap_mode="c", allow_pickle=False)
    labels = np.load(folder / "labels.npy", allow_pickle=False)
    return Prepared(torch.from_numpy(examples), torch.from_numpy(labels), run.dataset)


def _write(
    run: sandbox.Run,
    split: sandbox.Split,
    encode: Callable[[Tensor], Tensor],
    batch_size: int,
    passes: int,
    size: int,
    folder: Path,
    num_workers: int,
) -> None:
    target, labels, row = None, [], 0
    draft = folder / "examples.draft.npy"
    if num_workers and hasattr(run.dataset, "to"):
        held = run.dataset.to(torch.device("cpu")) is not run.dataset
        num_workers = 0 if held else num_workers  # of what is in memory each would read it all
    for number in range(passes):
        images = sandbox.sweep(
            *(run.dataset, split, batch_size), limit=size, seed=number, num_workers=num_workers
        )
        for batch in sandbox.ahead(images, run.device):
            examples = _compact(run, encode(batch.images).cpu())
            if target is None:
                target = new_array(draft, examples.dtype, (passes * size, *examples.shape[1:]))
            target[row : row + len(examples)] = examples
            labels.append(batch.labels.cpu())
            row += len(examples)
    if target is None:
        raise sandbox.SandboxError(f"the data set has no {split} images")
    target.flush()
    draft.replace(folder / "examples.npy")
    with sandbox.atomic(folder / "labels.npy") as path, path.open("wb") as file:
        np.save(file, torch.cat(labels).numpy())


@contextmanager
def _encoder(
    run: sandbox.Run, batch_size: int, compiled: bool
) -> Iterator[Callable[[Tensor], Tensor]]:
    """What prepares batches of one size, the last of which may be smaller."""
    tokenizer = run.tokenizer if run.settings("tokenizer") else None

    def encode(images: Tensor) -> Tensor:
        missing = batch_size - len(images) if compiled else 0  # compiled for one size
        filled = torch.cat([images, images[-1:].expand(missing, -1, -1, -1)]) if missing else images
        return run.generator.prepare(filled)[: len(images)]

    with in_bulk(tokenizer, run.device, compiled=compiled):
        yield encode


def _compact(run: sandbox.Run, examples: Tensor) -> np.ndarray:
    """Ids in 16 bits where the vocabulary fits, else in 32; what is no id as it is."""
    array = examples.numpy()
    if array.dtype.kind != "i":
        return array
    fits = bool(run.settings("tokenizer")) and run.tokenizer.vocab_size <= 2**15
    return array.astype(np.int16 if fits else np.int32)


def _key(run: sandbox.Run, split: sandbox.Split, passes: int, limit: int | None) -> str:
    blank = run.generator.prepare(torch.zeros(1, 3, *run.dataset.image_size, device=run.device))
    facts = {
        "examples": [str(blank.dtype), list(blank.shape)],
        "dataset": run.settings("dataset", deciding=True),
        "tokenizer": run.settings("tokenizer", deciding=True),
        "generator": run.settings("generator").get("name"),
        "state": _state(run),
        "of": [split, passes, limit],
    }
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:16]


def _state(run: sandbox.Run) -> str:
    """A checksum of the tokenizer's weights, which decide the ids."""
    digest = hashlib.sha256()
    module = run.tokenizer if run.settings("tokenizer") else None
    if isinstance(module, torch.nn.Module):
        for name, tensor in module.state_dict().items():
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
