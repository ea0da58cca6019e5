"""The schedule `raster`: one token a step over a single map, in an order of one's choice."""

from collections.abc import Callable
from typing import Literal, Self

import torch
from pydantic import Field, model_validator

import sandbox
from sandbox import Layout


class Raster:
    """One token a step."""

    class Params(sandbox.Params):
        height: int = Field(16, ge=1)
        """Height of the map, in cells."""
        width: int = Field(16, ge=1)
        """Width of the map, in cells."""
        order: Literal["row", "snake", "spiral", "hilbert", "random"] = "row"
        """`row`: as one reads; `snake`: every other row backwards; `spiral`: clockwise from the
        top left corner inwards; `hilbert`: the Hilbert curve, for squares whose side is a power of
        two; `random`: one permutation, the same for every image."""
        seed: int = Field(0, ge=0)
        """Chooses the permutation of `order: random`."""

        @model_validator(mode="after")
        def _must_fit(self) -> Self:
            side = self.height
            if self.order == "hilbert" and (self.width != side or side & (side - 1)):
                raise ValueError(
                    "order: the Hilbert curve needs a square whose side is a power of two, got "
                    f"{self.height} x {self.width}; choose another size or `snake`"
                )
            return self

    def __init__(self, params: Params) -> None:
        self.params = params

    def layout(self) -> Layout:
        p = self.params
        if p.order == "random":
            rng = torch.Generator().manual_seed(p.seed)
            cells = torch.randperm(p.height * p.width, generator=rng).tolist()
        else:
            cells = [row * p.width + column for row, column in PATHS[p.order](p.height, p.width)]
        return Layout.raster(p.height, p.width, cells)


Path = list[tuple[int, int]]
"""Cells as (row, column), in the order in which they are visited."""


def _row(height: int, width: int) -> Path:
    return [(row, column) for row in range(height) for column in range(width)]


def _snake(height: int, width: int) -> Path:
    columns = range(width)
    return [(row, column) for row in range(height) for column in columns[:: (-1) ** row]]


def _spiral(height: int, width: int) -> Path:
    rows, path = _rows(height, width), []
    while rows:
        path += rows.pop(0)
        rows = [list(column) for column in zip(*rows, strict=True)][
            ::-1
        ]  # quarter turn to the left
    return path


def _rows(height: int, width: int) -> list[Path]:
    return [[(row, column) for column in range(width)] for row in range(height)]


def _hilbert(height: int, width: int) -> Path:
    """Four smaller curves, the first and the last of them mirrored so that their ends meet."""
    if height == 1:
        return [(0, 0)]
    half = height // 2
    path = _hilbert(half, half)
    return [
        *((column, row) for row, column in path),
        *((row, column + half) for row, column in path),
        *((row + half, column + half) for row, column in path),
        *((height - 1 - column, half - 1 - row) for row, column in path),
    ]


PATHS: dict[str, Callable[[int, int], Path]] = {
    "row": _row,
    "snake": _snake,
    "spiral": _spiral,
    "hilbert": _hilbert,
}
