"""CIFAR-10 in its standard binary version, held in memory as bytes."""

from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Int, UInt8
from pydantic import Field
from torch import Tensor

import sandbox

from .images import check_indices, from_bytes, moved, randomly_flipped, randomly_shifted

_TRAIN = [f"data_batch_{i}.bin" for i in range(1, 6)]
_TEST = "test_batch.bin"
_NUM_RECORDS = 10_000
_RECORD_BYTES = 1 + 3 * 32 * 32
_SOURCE = (
    "download https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz, unpack it and set root to "
    "its folder cifar-10-batches-bin"
)


class Cifar10:
    """60,000 photographs of 32 px in ten classes; the test batch is the validation split.

    Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
    """

    class Params(sandbox.Params):
        root: Path
        """The folder cifar-10-batches-bin, with data_batch_1.bin to 5 and test_batch.bin."""
        flip: bool = False
        """Mirror training images left to right at even odds."""
        pad_crop_px: int = Field(default=0, ge=0, le=16)
        """Move training images by up to this many pixels each way, with black at the edge."""
        allow_partial: bool = False
        """Accept that training batches after the first are missing, and batches of any length."""

    num_classes = 10
    class_names = (
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    )
    image_size = (32, 32)

    def __init__(self, params: "Cifar10.Params") -> None:
        """Read all records. Raises SandboxError for missing, cut or foreign files."""
        self._params = params
        root = params.root.expanduser()
        optional = _TRAIN[1:] if params.allow_partial else []
        train = [name for name in _TRAIN if name not in optional or (root / name).exists()]
        self._images, self._labels = {}, {}
        for split, names in (("train", train), ("validation", [_TEST])):
            records = torch.from_numpy(np.concatenate([self._read(root / name) for name in names]))
            images = rearrange(records[:, 1:], "n (c h w) -> n c h w", c=3, h=32)
            self._images[split] = images.contiguous()
            self._labels[split] = records[:, 0].long()

    def size(self, split: sandbox.Split) -> int:
        return len(self._labels[split])

    def to(self, device: torch.device) -> "Cifar10":
        """The same with its images on `device`, as bytes (176 MiB)."""
        return moved(self, device)

    def batch(
        self, split: sandbox.Split, indices: Int[Tensor, " b"], rng: torch.Generator
    ) -> sandbox.Batch:
        """The images at `indices`, in file order; only training images are augmented."""
        check_indices(indices, self.size(split))
        rows = sandbox.to_device(indices, self._labels[split].device)
        images: UInt8[Tensor, "b 3 h w"] = self._images[split][rows]
        if split == "train" and self._params.pad_crop_px:
            images = randomly_shifted(images, self._params.pad_crop_px, rng)
        if split == "train" and self._params.flip:
            images = randomly_flipped(images, rng)
        return sandbox.Batch(from_bytes(images), self._labels[split][rows])

    def _read(self, path: Path) -> np.ndarray:
        """The records of one file, `n 3073`: a label, then the red, green and blue planes."""
        if not path.is_file():
            raise sandbox.SandboxError(f"cifar10: no file {path}; {_SOURCE}")
        num_bytes, whole = path.stat().st_size, _NUM_RECORDS * _RECORD_BYTES
        if self._params.allow_partial:
            if num_bytes == 0 or num_bytes % _RECORD_BYTES:
                raise sandbox.SandboxError(
                    f"cifar10: {path} has {num_bytes} bytes, which is no multiple of the "
                    f"{_RECORD_BYTES} of a record: the file is cut short; {_SOURCE}"
                )
        elif num_bytes != whole:
            raise sandbox.SandboxError(
                f"cifar10: {path} has {num_bytes} bytes in place of {whole}; {_SOURCE} (or set "
                f"allow_partial: true for shortened batches)"
            )
        records = np.fromfile(path, dtype=np.uint8).reshape(-1, _RECORD_BYTES)
        if (largest := records[:, 0].max()) >= self.num_classes:
            raise sandbox.SandboxError(
                f"cifar10: {path} has a label {largest}, so it is not CIFAR-10's binary version; "
                f"{_SOURCE}"
            )
        return records
