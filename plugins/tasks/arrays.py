"""Large arrays on disk, written piece by piece, whose space is claimed before the first piece."""

import os
from pathlib import Path

import numpy as np

import sandbox


def new_array(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
    """A writable .npy array. Raises RunError where the disk cannot hold all of it.

    A sparse file would be found too large only when a page is written, and that kills the process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    try:
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        path.unlink()
        raise sandbox.RunError(
            f"{path}: {error.strerror} (it needs {array.nbytes / 2**20:.0f} MiB); make room, then "
            "run the same command again"
        ) from error
    return array
