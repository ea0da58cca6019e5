"""The MNIST family: grey images in idx files, held in memory as bytes."""

import gzip
import zlib
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from einops import repeat
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

import sandbox

from .images import ImageSize, check_indices, from_bytes, moved

_FILES: dict[sandbox.Split, str] = {"train": "train", "validation": "t10k"}
_UNSIGNED_BYTE = 0x08
_SOURCE = (
    "download train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz and their t10k- twins from "
    "https://ossci-datasets.s3.amazonaws.com/mnist/ (or those of Fashion-MNIST, KMNIST, ...) into "
    "one folder and set root to it"
)


class Idx:
    """Grey images of one size as three equal channels; the t10k files are the validation split.

    Source of the format: LeCun, Cortes and Burges, The MNIST database of handwritten digits.
    """

    class Params(sandbox.Params):
        root: Path
        """The folder with train-images-idx3-ubyte, train-labels-idx1-ubyte and their t10k- twins,
        each as it is or with .gz."""
        image_size: ImageSize = (32, 32)
        """Height and width in pixels, or one number for a square."""
        fit: Literal["pad", "resize"] = "pad"
        """How 28 px become `image_size`: a black frame, or interpolation (to smaller sizes too)."""
        class_names: tuple[str, ...] = ()
        """What the labels 0, 1, ... are called; left out, they are called by their number."""

    def __init__(self, params: "Idx.Params") -> None:
        """Read all files. Raises SandboxError for missing, cut or foreign ones."""
        self._fit = params.fit
        self.image_size = params.image_size
        root = params.root.expanduser()
        self._images, self._labels = {}, {}
        for split, prefix in _FILES.items():
            images = _read(_find(root, f"{prefix}-images-idx3-ubyte"), num_axes=3)
            labels = _read(_find(root, f"{prefix}-labels-idx1-ubyte"), num_axes=1)
            if len(images) != len(labels) or len(images) == 0:
                raise sandbox.SandboxError(
                    f"idx: {root} has {len(images)} {prefix} images and {len(labels)} labels: "
                    f"the files do not belong together; {_SOURCE}"
                )
            self._check_size(images.shape[1:], root)
            self._images[split], self._labels[split] = images, labels.long()
        self.num_classes = 1 + max(int(labels.max()) for labels in self._labels.values())
        self.class_names = params.class_names or tuple(map(str, range(self.num_classes)))
        if len(self.class_names) < self.num_classes:
            raise sandbox.SandboxError(
                f"idx: class_names has {len(self.class_names)} names, but the labels of {root} "
                f"reach {self.num_classes - 1}: give {self.num_classes}"
            )
        self.num_classes = len(self.class_names)

    def size(self, split: sandbox.Split) -> int:
        return len(self._labels[split])

    def to(self, device: torch.device) -> "Idx":
        """The same with its images on `device`, as bytes; itself where they have to be resized.

        (Interpolation rounds otherwise on a GPU.)
        """
        return self if self._fit == "resize" else moved(self, device)

    def batch(
        self, split: sandbox.Split, indices: Int[Tensor, " b"], rng: torch.Generator
    ) -> sandbox.Batch:
        """The images at `indices`, in file order; `rng` is not drawn from."""
        check_indices(indices, self.size(split))
        rows = sandbox.to_device(indices, self._labels[split].device)
        grey = self._fitted(from_bytes(self._images[split][rows]))
        return sandbox.Batch(
            repeat(grey, "b h w -> b c h w", c=3).contiguous(), self._labels[split][rows]
        )

    def _check_size(self, stored: torch.Size, root: Path) -> None:
        fits = all(have <= want for have, want in zip(stored, self.image_size, strict=True))
        if self._fit == "pad" and not fits:
            raise sandbox.SandboxError(
                f"idx: image_size {list(self.image_size)} is smaller than the images of {root}, "
                f"{list(stored)}: raise it or set fit: resize"
            )

    def _fitted(self, grey: Float[Tensor, "b y x"]) -> Float[Tensor, "b h w"]:
        """Images of the size that was asked for, in [-1, 1]."""
        if self._fit == "resize":
            return functional.interpolate(
                grey[:, None], self.image_size, mode="bilinear", antialias=True
            )[:, 0].clamp_(-1, 1)
        more_h, more_w = (w - h for w, h in zip(self.image_size, grey.shape[1:], strict=True))
        frame = [more_w // 2, more_w - more_w // 2, more_h // 2, more_h - more_h // 2]
        return functional.pad(grey, frame, value=-1.0)


def _find(root: Path, name: str) -> Path:
    for path in (root / name, root / f"{name}.gz"):
        if path.is_file():
            return path
    raise sandbox.SandboxError(f"idx: no file {root / name} (or with .gz); {_SOURCE}")


def _read(path: Path, num_axes: int) -> Tensor:
    """The array in an idx file: two zeros, type, number of axes, big-endian sizes, the values."""
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise sandbox.SandboxError(
            f"idx: {path} cannot be unpacked ({error}): it is cut short or damaged; {_SOURCE}"
        ) from error
    if content[:4] != (magic := bytes([0, 0, _UNSIGNED_BYTE, num_axes])):
        raise sandbox.SandboxError(
            f"idx: {path} begins with {content[:4].hex() or 'nothing'} in place of {magic.hex()}, "
            f"so it is no idx file of bytes with {num_axes} axes; {_SOURCE}"
        )
    start = 4 + 4 * num_axes
    sizes = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    values = np.frombuffer(content, np.uint8)[start:]
    if len(values) != np.prod(sizes, dtype=np.int64):
        raise sandbox.SandboxError(
            f"idx: {path} promises {' x '.join(map(str, sizes))} values and holds {len(values)}: "
            f"it is cut short or damaged; {_SOURCE}"
        )
    return torch.from_numpy(values.reshape(sizes).copy())
