"""Scale schedules of next-scale prediction: which token maps, coarse to fine, an image is made of.

Every one gives a pyramid of full maps whose last is the size of the latent. `published` is what the
VAR checkpoints use; the others are for one's own models, non-square ones included.
"""

from collections.abc import Callable
from typing import Literal, Self

from pydantic import Field, model_validator

import sandbox
from sandbox import Layout

PUBLISHED_SIDES = {
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    1024: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}
"""Image side in pixels to map sides in cells of 16 pixels (VAR, arXiv 2404.02905)."""


class Published:
    """The pyramids of the published models."""

    class Params(sandbox.Params):
        resolution: Literal[256, 512, 1024] = 256
        """Side of the image in pixels, for a tokenizer that shrinks 16 times."""

    def __init__(self, params: Params) -> None:
        self.params = params

    def layout(self) -> Layout:
        return Layout.pyramid(*PUBLISHED_SIDES[self.params.resolution])


class Sides:
    """A list of one's own."""

    class Params(sandbox.Params):
        sides: tuple[int | tuple[int, int], ...] = Field(min_length=1)
        """The maps, coarse to fine: `n` for n x n cells, `[height, width]` otherwise."""

        @model_validator(mode="after")
        def _must_grow(self) -> Self:
            Layout.pyramid(*self.sides)
            return self

    def __init__(self, params: Params) -> None:
        self.params = params

    def layout(self) -> Layout:
        return Layout.pyramid(*self.params.sides)


class SizeParams(sandbox.Params):
    """What the computed schedules are set by."""

    height: int = Field(16, ge=1)
    """Height of the last map, in cells."""
    width: int = Field(16, ge=1)
    """Width of the last map, in cells."""
    num_scales: int = Field(10, ge=1)
    """How many maps, the last included; at most as many as the longer side has cells."""

    @model_validator(mode="after")
    def _must_fit(self) -> Self:
        longer = max(self.height, self.width)
        if self.num_scales > longer:
            raise ValueError(
                f"num_scales: {self.num_scales} growing maps do not fit into {self.height} x "
                f"{self.width} cells; at most {longer} do"
            )
        return self


class Linear:
    """The longer side grows by the same number of cells from map to map."""

    class Params(SizeParams):
        pass

    def __init__(self, params: Params) -> None:
        self.params = params

    def layout(self) -> Layout:
        return _pyramid(self.params, lambda longer, progress: 1 + (longer - 1) * progress)


class Geometric:
    """The longer side grows by the same factor from map to map, and by one cell at least."""

    class Params(SizeParams):
        pass

    def __init__(self, params: Params) -> None:
        self.params = params

    def layout(self) -> Layout:
        return _pyramid(self.params, lambda longer, progress: longer**progress)


def _pyramid(params: SizeParams, grow: Callable[[int, float], float]) -> Layout:
    """Maps whose longer side follows `grow(longer, progress)` and whose shorter keeps the shape."""
    longer, shorter = max(params.height, params.width), min(params.height, params.width)
    last = params.num_scales - 1
    sizes, side = [], 0
    for step in range(params.num_scales):
        # A convex curve rounds to one side more than once where it is flat, so it is pushed on; it
        # stays below the straight line, which leaves room for every push.
        side = longer if step == last else max(side + 1, int(grow(longer, step / last) + 0.5))
        other = max(1, int(shorter * side / longer + 0.5))
        sizes.append((side, other) if params.height == longer else (other, side))
    return Layout.pyramid(*sizes)


@sandbox.hookimpl
def sandbox_register(register: Callable[..., None]) -> None:
    register(sandbox.ScaleSchedule, "published", Published)
    register(sandbox.ScaleSchedule, "sides", Sides)
    register(sandbox.ScaleSchedule, "linear", Linear)
    register(sandbox.ScaleSchedule, "geometric", Geometric)
