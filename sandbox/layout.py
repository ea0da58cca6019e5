"""Which tokens an image has, and which of them are predicted together.

A layout is a sequence of steps. All tokens of one step are predicted at once, from every token of
the steps before it. Next-scale prediction (VAR) has a few steps of growing maps; raster-scan
prediction has one step a token. Nothing else in the sandbox may know which of the two it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Side = int | tuple[int, int]


@dataclass(frozen=True)
class Step:
    """The cells of a `height x width` token map that one step fills in."""

    height: int
    width: int
    cells: tuple[int, ...]
    """Row-major indices into the map, in the order in which the tokens are stored."""

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1 or not self.cells:
            raise ValueError(f"a step needs a map and at least one cell, got {self}")
        if len(set(self.cells)) < len(self.cells):
            raise ValueError("a step may fill each of its cells once")
        if min(self.cells) < 0 or max(self.cells) >= self.height * self.width:
            raise ValueError(f"cells must lie in 0..{self.height * self.width - 1}")


@dataclass(frozen=True)
class Layout:
    """The steps, first to last. Tokens are stored step after step."""

    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        if not self.steps:
            raise ValueError("a layout needs at least one step")

    @classmethod
    def pyramid(cls, *sides: Side) -> "Layout":
        """One full map per step, coarse to fine; a side is `n` cells square or `(height, width)`.

        Raises ValueError unless every map is at least as large as the one before it.
        """
        sizes = [(side, side) if isinstance(side, int) else side for side in sides]
        for before, after in pairwise(sizes):
            if after[0] < before[0] or after[1] < before[1] or after == before:
                raise ValueError(f"the maps of a pyramid must grow, but {after} follows {before}")
        return cls(tuple(Step(h, w, tuple(range(h * w))) for h, w in sizes))

    @classmethod
    def raster(cls, height: int, width: int, order: Sequence[int] | None = None) -> "Layout":
        """One token per step over a single map, row by row or in `order` (row-major indices)."""
        cells = range(height * width) if order is None else order
        if sorted(cells) != list(range(height * width)):
            raise ValueError(f"an order must name each of the {height * width} cells once")
        return cls(tuple(Step(height, width, (cell,)) for cell in cells))

    @cached_property
    def lens(self) -> tuple[int, ...]:
        """How many tokens each step has."""
        return tuple(len(step.cells) for step in self.steps)

    @cached_property
    def spans(self) -> tuple[slice, ...]:
        """Where each step's tokens stand in the sequence."""
        ends = list(accumulate(self.lens))
        return tuple(slice(end - length, end) for end, length in zip(ends, self.lens, strict=True))

    @cached_property
    def seq_len(self) -> int:
        return sum(self.lens)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the last map, in cells: the size of the latent."""
        return self.steps[-1].height, self.steps[-1].width

    @cached_property
    def level_of_step(self) -> tuple[int, ...]:
        """The map (scale) that each step belongs to: raster has one level, a pyramid K."""
        levels = [0]
        for before, after in pairwise(self.steps):
            moved = (before.height, before.width) != (after.height, after.width)
            levels.append(levels[-1] + moved)
        return tuple(levels)

    @property
    def num_levels(self) -> int:
        return self.level_of_step[-1] + 1

    def step_of(self) -> Int[Tensor, " l"]:
        """The step that predicts each token."""
        return torch.tensor([step for step, count in enumerate(self.lens) for _ in range(count)])

    def level_of(self) -> Int[Tensor, " l"]:
        """The level (scale) of each token."""
        pairs = zip(self.level_of_step, self.lens, strict=True)
        return torch.tensor([level for level, count in pairs for _ in range(count)])

    def mask(self) -> Bool[Tensor, "l l"]:
        """True where a query (row) may look at a key (column): same step or earlier."""
        step = self.step_of()
        return step[:, None] >= step[None, :]

    def centers(self) -> Float[Tensor, "l 2"]:
        """Each token's (row, column) center, with the image as the unit square."""
        return torch.tensor(
            [
                ((cell // step.width + 0.5) / step.height, (cell % step.width + 0.5) / step.width)
                for step in self.steps
                for cell in step.cells
            ]
        )


@dataclass(frozen=True)
class Mask:
    """A description of which keys a query may look at, for attention backends to honour.

    `step_lens` gives the number of tokens of each step: a query sees the keys of its own step and
    of all steps before it. None: every query sees every key. `dense` overrides both with an
    arbitrary pattern, `n` queries by `p` keys.
    """

    step_lens: tuple[int, ...] | None = None
    dense: Bool[Tensor, "n p"] | None = None

    @property
    def kind(self) -> str:
        """`full`, `causal` (every step one token), `steps` or `dense`."""
        if self.dense is not None:
            return "dense"
        if self.step_lens is None or len(self.step_lens) == 1:
            return "full"
        return "causal" if set(self.step_lens) == {1} else "steps"

    def to_tensor(self, device: torch.device | str = "cpu") -> Bool[Tensor, "n p"] | None:
        """The pattern as booleans, True where a query may look; None where nothing is hidden."""
        if self.dense is not None:
            return self.dense.to(device)
        if self.step_lens is None or self.kind == "full":
            return None
        lens = torch.tensor(self.step_lens, device=device)
        step = torch.repeat_interleave(torch.arange(len(lens), device=device), lens)
        return step[:, None] >= step[None, :]
