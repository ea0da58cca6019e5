"""Image files in class folders, as in ImageNet, decoded when they are asked for."""

import os
import struct
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from PIL import Image
from pydantic import Field
from torch import Tensor
from torch.utils.data import get_worker_info

import sandbox

from .class_folders import splits
from .images import (
    ImageSize,
    check_indices,
    drawn_to_flip,
    from_bytes,
    randomly_flipped,
    write_floats,
)

# What Pillow's decoders let through when a file is cut or damaged.
_DAMAGE = (
    *(OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error),
    Image.DecompressionBombError,
)


class ImageFolder:
    """Photographs under class folders, resized and cropped as published for VAR.

    The shorter side is resized to 1.125 times the crop (Lanczos); training crops at random,
    validation in the middle. EXIF orientation is ignored, as published. Files that could not be
    read and were skipped stand in `skipped`, of each process that loads its own.
    """

    class Params(sandbox.Params):
        root: Path
        """Folder with train/CLASS/* and val/CLASS/*, with CLASS/*, or with images and no classes.
        Suffixes: jpg, jpeg, png, webp."""
        image_size: ImageSize = (256, 256)
        """Height and width in pixels, or one number for a square."""
        augment: Literal["random-crop", "center-crop"] = "random-crop"
        """How training images are cropped."""
        flip: bool = False
        """Mirror training images left to right at even odds."""
        on_corrupt: Literal["fail", "skip"] = "fail"
        """What an unreadable file does: stop the run, or be reported and replaced by the next
        readable image."""
        validation_share: float = Field(default=0.05, gt=0, lt=1)
        """Share of the images that is held out where there are no folders train and val."""
        seed: int = Field(default=0, ge=0)
        """Which images are held out."""
        num_workers: Annotated[int | None, sandbox.INCIDENTAL] = Field(default=None, ge=1, le=256)
        """Threads that decode; they change the speed and never the images. When absent one for
        every core that the process may use, 16 at most; processes share them."""
        in_memory: bool = False
        """Decode every image once and keep it as bytes, on the GPU where the training is there: 1.3
        times the bytes of the crops. Of long images only the middle is kept."""

    def __init__(self, params: "ImageFolder.Params") -> None:
        """List the files. Raises SandboxError where the folder is missing, empty or ambiguous."""
        self._params = params
        self.image_size = params.image_size
        self.class_names, self._files = splits(
            params.root.expanduser(), params.validation_share, params.seed
        )
        self.num_classes = len(self.class_names)
        self.skipped: list[str] = []
        self._held: dict[sandbox.Split, tuple[Tensor, Tensor]] = {}

    def size(self, split: sandbox.Split) -> int:
        return len(self._files[split].paths)

    def batch(
        self, split: sandbox.Split, indices: Int[Tensor, " b"], rng: torch.Generator
    ) -> sandbox.Batch:
        """The images at `indices`. Raises RunError for an unreadable file, unless it is skipped."""
        check_indices(indices, self.size(split))
        train = split == "train"
        # All random numbers are drawn before the threads start.
        places: Tensor | None = None
        if train and self._params.augment == "random-crop":
            places = torch.rand(len(indices), 2, generator=rng)
        flips = train and self._params.flip
        if self._params.in_memory:
            picked, labels = self._picked(split, indices, places)
            picked = randomly_flipped(picked, rng) if flips else picked
            return sandbox.Batch(from_bytes(picked), labels)
        where = [None] * len(indices) if places is None else places.tolist()
        mirrored = drawn_to_flip(len(indices), rng) if flips else torch.zeros(len(indices))
        images = torch.empty(len(indices), 3, *self.image_size)

        def put(row: int, pixels: UInt8[np.ndarray, "h w 3"]) -> None:
            write_floats(pixels[:, ::-1] if mirrored[row] else pixels, images[row].numpy())

        return sandbox.Batch(
            images, self._decoded(split, indices.tolist(), where, self.image_size, put)
        )

    def to(self, device: torch.device) -> "ImageFolder":
        """The same with its images on `device`, if they are kept in memory; else itself."""
        if not self._params.in_memory:
            return self
        moved = copy(self)
        moved._held = {
            split: (images.to(device), labels.to(device))
            for split, (images, labels) in ((s, self._all(s)) for s in self._files)
        }
        return moved

    def _all(self, split: sandbox.Split) -> tuple[UInt8[Tensor, "n 3 H W"], Int[Tensor, " n"]]:
        """Every image of a split with the margin that crops move in, decoded on first use."""
        if split not in self._held:
            indices, cover = list(range(self.size(split))), _cover(self.image_size)
            images = torch.empty(len(indices), 3, *cover, dtype=torch.uint8)

            def put(row: int, pixels: UInt8[np.ndarray, "h w 3"]) -> None:
                images[row] = rearrange(torch.from_numpy(pixels), "h w c -> c h w")

            labels = self._decoded(split, indices, [None] * len(indices), cover, put)
            self._held[split] = images, labels
        return self._held[split]

    def _picked(
        self, split: sandbox.Split, indices: Int[Tensor, " b"], places: Float[Tensor, "b 2"] | None
    ) -> tuple[UInt8[Tensor, "b 3 h w"], Int[Tensor, " b"]]:
        images, labels = self._all(split)
        rows = sandbox.to_device(indices, labels.device)
        cover = torch.tensor(images.shape[2:])
        margin = cover - torch.tensor(self.image_size)
        corner = (
            (margin / 2).round() if places is None else (places.double() * (margin + 1)).floor()
        )
        top, left = corner.long().expand(len(indices), 2).split(1, dim=1)
        height, width = self.image_size
        down = sandbox.to_device(top + torch.arange(height), labels.device)
        across = sandbox.to_device(left + torch.arange(width), labels.device)
        channels = torch.arange(3, device=labels.device)[:, None, None]
        # One gather: row, channel, line and column of every pixel, broadcast against each other.
        picked = images[
            rearrange(rows, "b -> b 1 1 1"),
            channels,
            rearrange(down, "b h -> b 1 h 1"),
            rearrange(across, "b w -> b 1 1 w"),
        ]
        return picked, labels[rows]

    def _decoded(
        self,
        split: sandbox.Split,
        indices: list[int],
        places: list[list[float] | None],
        size: tuple[int, int],
        put: Callable[[int, UInt8[np.ndarray, "h w 3"]], None],
    ) -> Int[Tensor, " b"]:
        """The images' labels, after `put` was handed each with its row, in threads."""

        def load(row: int) -> tuple[int, dict[str, str]]:
            pixels, label, damaged = self._load(split, indices[row], places[row], size)
            put(row, pixels)
            return label, damaged

        labels = torch.empty(len(indices), dtype=torch.long)
        with ThreadPoolExecutor(self._params.num_workers or _cores()) as pool:
            for row, (label, damaged) in enumerate(pool.map(load, range(len(indices)))):
                labels[row] = label
                self._report(damaged)
        return labels

    def _load(
        self,
        split: sandbox.Split,
        index: int,
        place: list[float] | None,
        size: tuple[int, int],
    ) -> tuple[UInt8[np.ndarray, "h w 3"], int, dict[str, str]]:
        """An image, its label, and the unreadable files passed over on the way, with reasons."""
        files, damaged = self._files[split], {}
        for ahead in range(len(files.paths)):
            i = (index + ahead) % len(files.paths)
            path = files.paths[i]
            try:
                with Image.open(path) as image:
                    pixels = _cropped(sandbox.to_rgb(image), _cover(self.image_size), size, place)
            except _DAMAGE as error:
                if self._params.on_corrupt == "fail":
                    raise sandbox.RunError(
                        f"image-folder: {path} cannot be read as an image ({error}): replace or "
                        f"remove it, or set on_corrupt: skip"
                    ) from error
                damaged[path] = str(error)
            else:
                return pixels, files.labels[i], damaged
        raise sandbox.RunError(
            f"image-folder: no {split} image below {self._params.root} can be read, the last for "
            f"this reason: {damaged[path]}"
        )

    def _report(self, damaged: dict[str, str]) -> None:
        for path, reason in damaged.items():
            if path not in self.skipped:
                self.skipped.append(path)
                warnings.warn(
                    f"image-folder: skipped {path}, which cannot be read as an image ({reason})",
                    stacklevel=3,
                )


def _cores() -> int:
    """Threads of a process that loads, by itself or beside others of its kind."""
    allowed = getattr(os, "sched_getaffinity", None)  # not on every system
    cores = len(allowed(0)) if allowed else os.cpu_count() or 1
    beside = get_worker_info()
    sharing = sandbox.world_size() * (beside.num_workers if beside else 1)
    return max(1, min(16, cores // sharing))


def _cover(size: tuple[int, int]) -> tuple[int, int]:
    """What images are resized to cover before a crop of `size` is taken, as published."""
    return round(1.125 * size[0]), round(1.125 * size[1])


def _cropped(
    image: Image.Image,
    cover: tuple[int, int],
    size: tuple[int, int],
    place: list[float] | None,
) -> UInt8[np.ndarray, "h w 3"]:
    """Resize to cover `cover`, then crop `size`.

    `place` says where, down and right, in [0, 1); None is the middle.
    """
    (height, width), (cover_h, cover_w) = size, cover
    if image.width * cover_h <= image.height * cover_w:
        new_w, new_h = cover_w, max(cover_h, cover_w * image.height // image.width)
    else:
        new_w, new_h = max(cover_w, cover_h * image.width // image.height), cover_h
    if place is None:
        top, left = round((new_h - height) / 2), round((new_w - width) / 2)
    else:
        top, left = int(place[0] * (new_h - height + 1)), int(place[1] * (new_w - width + 1))
    resized = image.resize((new_w, new_h), Image.Resampling.LANCZOS)
    return np.array(resized.crop((left, top, left + width, top + height)))
