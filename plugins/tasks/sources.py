"""Images that were made before: a run's samples, a folder of pictures, an .npz.

The one thing to hold in mind: they are 8-bit from here on, as they lie on the disk.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

import sandbox

from .npz import from_uint8, read_npz

ARRAY, LABELS, FACTS = "samples.npy", "samples-labels.npy", "samples.json"
"""What the task `sample` leaves in the run folder: images, classes, and how they were drawn."""


def read_images(path: Path) -> tuple[np.ndarray, Int[Tensor, " n"]]:
    """uint8 images `n 3 h w` and labels, -1 where not known.

    `path`: a run folder, its samples.npy, an .npz, or a folder of pictures of one size.
    Raises SandboxError where there are none, or they cannot be read.
    """
    if (path / ARRAY).exists():
        path = path / ARRAY
    if path.name == ARRAY:
        if not path.exists():
            raise sandbox.SandboxError(f"{path}: no samples yet; run the task `sample` before")
        images = np.load(path, mmap_mode="r", allow_pickle=False)
        return images, torch.from_numpy(np.load(path.with_name(LABELS), allow_pickle=False))
    if path.suffix == ".npz":
        tensors, labels = read_npz(path)
        return tensors.numpy(), torch.full((len(tensors),), -1) if labels is None else labels
    names = sorted(p for p in path.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if not names:
        raise sandbox.SandboxError(f"{path}: no .png or .jpg pictures there, and no .npz")
    pictures = [_picture(name) for name in names]
    for name, picture in zip(names, pictures, strict=True):
        if picture.shape != pictures[0].shape:
            raise sandbox.SandboxError(
                f"{path}: pictures of one set have one size, but {names[0].name} has "
                f"{pictures[0].shape[1:]} px and {name.name} {picture.shape[1:]} (height, width)"
            )
    return np.stack(pictures), torch.full((len(pictures),), -1)


def batches(
    images: np.ndarray, labels: Int[Tensor, " n"], batch_size: int, limit: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """The first `limit` images in [-1, 1] with their labels; all of them by default."""
    size = len(images) if limit is None else min(limit, len(images))
    for begin in range(0, size, batch_size):
        end = min(begin + batch_size, size)
        yield from_uint8(torch.from_numpy(np.array(images[begin:end]))), labels[begin:end]


def how_drawn(folder: Path) -> Mapping[str, Any]:
    """What the task `sample` noted of its samples; nothing where it did not draw them."""
    path = folder.parent / FACTS if folder.name == ARRAY else folder / FACTS
    return json.loads(path.read_text()) if path.exists() else {}


def _picture(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(sandbox.to_rgb(image)).transpose(2, 0, 1)
    except (OSError, SyntaxError, ValueError) as error:
        raise sandbox.SandboxError(f"{path} cannot be read as an image ({error})") from None
