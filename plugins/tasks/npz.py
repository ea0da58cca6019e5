"""Images as one .npz, in the form that ADM's evaluation (Dhariwal and Nichol 2021) reads.

`arr_0` holds uint8 images, height x width x RGB, `arr_1` (where there are labels) their classes.
Published evaluators score the first images of a file, so samples that were made class by class have
to be shuffled before they are written.
"""

import os
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor

import sandbox


def to_uint8(images: Float[Tensor, "b 3 h w"]) -> UInt8[Tensor, "b 3 h w"]:
    """[-1, 1] to 0..255, rounded to the nearest; values outside are clamped.

    Undoes `from_uint8` exactly. (ADM's own script cuts decimals off instead: half a grey level
    darker on average.) Raises ValueError for NaN.
    """
    if images.isnan().any():
        raise ValueError("images hold NaN")
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_uint8(images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """0..255 to [-1, 1]."""
    return images.float() / 127.5 - 1


def write_npz(
    path: Path,
    images: Iterable[Float[Tensor, "b 3 h w"]],
    labels: Int[Tensor, " n"] | None,
    seed: int,
) -> None:
    """Write batches of images in [-1, 1], shuffled by `seed`; the file appears whole or not at all.

    Raises ValueError where there are no images, sizes differ, labels are too many or too few, or an
    image holds NaN.
    """
    batches = [rearrange(to_uint8(b), "b c h w -> b h w c").cpu().numpy() for b in images]
    sizes = {batch.shape[1:] for batch in batches}
    num_images = sum(len(batch) for batch in batches)
    if not num_images:
        raise ValueError(f"{path}: there are no images to write")
    if len(sizes) > 1:
        raise ValueError(f"{path}: images of one file have one size, got {sorted(sizes)}")
    if labels is not None and len(labels) != num_images:
        raise ValueError(f"{path}: {len(labels)} labels for {num_images} images")
    order = np.random.default_rng(seed).permutation(num_images)
    arrays = {"arr_0": np.concatenate(batches)[order]}
    if labels is not None:
        arrays["arr_1"] = labels.cpu().numpy().astype(np.int64)[order]
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            np.savez(file, **arrays)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_npz(path: Path) -> tuple[UInt8[Tensor, "n 3 h w"], Int[Tensor, " n"] | None]:
    """The images of a file, and their labels where it has any; see `from_uint8`.

    Raises SandboxError where the file is missing, damaged or of another form.
    """
    try:
        with path.open("rb") as file:  # np.load would leave a damaged file open
            arrays = np.load(file, allow_pickle=False)
            if not isinstance(arrays, np.lib.npyio.NpzFile):
                raise sandbox.SandboxError(f"{path}: a single array, expected an .npz with 'arr_0'")
            if "arr_0" not in arrays:
                found = ", ".join(arrays) or "nothing"
                raise sandbox.SandboxError(f"{path}: no 'arr_0' (images); it holds {found}")
            images, labels = arrays["arr_0"], arrays.get("arr_1")
    except FileNotFoundError:
        raise sandbox.SandboxError(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        message = f"{path}: not an .npz, or a truncated or damaged one: {error}"
        raise sandbox.SandboxError(message) from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
        raise sandbox.SandboxError(
            f"{path}: 'arr_0' is {images.dtype} {images.shape}, expected uint8 "
            "(images, height, width, 3)"
        )
    if labels is None:
        return _to_tensor(images), None
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise sandbox.SandboxError(
            f"{path}: 'arr_1' is {labels.dtype} {labels.shape}, expected {len(images)} integers"
        )
    return _to_tensor(images), torch.from_numpy(labels.astype(np.int64))


def _to_tensor(images: np.ndarray) -> UInt8[Tensor, "n 3 h w"]:
    return rearrange(torch.from_numpy(images), "b h w c -> b c h w")
