"""Shapes on a background, drawn on demand: a data set that needs no data.

The label is the form (circle, square, ...) and whether it is filled or hollow; place, size, turn,
colours, background and a faint distractor are nuisance. An image is a pure function of seed, split
and index: its random numbers are a hash of the three, never a stream shared with its neighbours,
and pixels are reckoned in sums, products and square roots alone, which round the same way in a
batch of any size; vectorised sines and exponentials do not.
"""

import math
from itertools import pairwise

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from numpy.typing import NDArray
from pydantic import Field, field_validator
from torch import Tensor

import sandbox

from .images import ImageSize, check_indices

_HALF_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "circle": [],
    "square": [(0.0, -0.8), (0.8, -0.8), (0.8, 0.8), (0.0, 0.8)],
    "triangle": [(0.0, -1.1), (0.95, 0.55), (0.0, 0.55)],
    "cross": [
        *((0.0, -1.0), (0.36, -1.0), (0.36, -0.36), (1.0, -0.36)),
        *((1.0, 0.36), (0.36, 0.36), (0.36, 1.0), (0.0, 1.0)),
    ],
    "diamond": [(0.0, -1.1), (0.62, 0.0), (0.0, 1.1)],
    "star": [
        (radius * math.sin(turn * math.pi / 5), -radius * math.cos(turn * math.pi / 5))
        for turn, radius in enumerate([1.1, 0.48] * 3)
    ],
    "arrow": [(0.0, -1.0), (0.9, -0.05), (0.34, -0.05), (0.34, 0.95), (0.0, 0.95)],
    "hourglass": [(0.0, -0.95), (0.75, -0.95), (0.0, 0.0), (0.75, 0.95), (0.0, 0.95)],
}
"""Every form is its own mirror image, so its right half says it all: corners from top to bottom, in
units of the radius, y down. The circle has none. The diamond is narrow, so that no turn makes it a
square."""

_NUM_CORNERS = max(len(corners) for corners in _HALF_OUTLINES.values())
_CORNERS: Float[Tensor, "form corner 2"] = torch.tensor(
    [
        corners + [corners[-1] if corners else (0.0, 0.0)] * (_NUM_CORNERS - len(corners))
        for corners in _HALF_OUTLINES.values()
    ]
)
_CLASS_NAMES = [f"{fill} {form}" for form in _HALF_OUTLINES for fill in ("filled", "hollow")]


class Shapes:
    """Procedural images of simple shapes, at random access and of any size."""

    class Params(sandbox.Params):
        image_size: ImageSize = (16, 16)
        """Height and width in pixels, or one number for a square. Below 16 px hollow forms blur."""
        num_classes: int = Field(default=10, ge=2, le=len(_CLASS_NAMES))
        """How many classes: filled and hollow circle, square, triangle, cross, diamond, star,
        arrow, hourglass, in this order."""
        num_images: int = Field(default=8192, ge=1)
        """Size of the training split."""
        num_validation: int = Field(default=1024, ge=1)
        """Size of the validation split."""
        clutter: float = Field(default=0.3, ge=0, le=1)
        """How hard it is: strength of gradients and textures behind, of a distractor that may
        overlap, and the range of turns. 0 gives nearly upright shapes on a plain background."""
        radius: tuple[float, float] = (0.5, 0.85)
        """Smallest and largest radius, as a share of half the image's shorter side."""
        stroke: float = Field(default=0.12, gt=0, lt=0.5)
        """Half the line width of hollow shapes, as a share of the radius; at least 0.65 px."""
        edge_px: float = Field(default=1.0, ge=1)
        """Width of the blur along edges, in pixels; 1 is plain anti-aliasing."""
        seed: int = Field(default=0, ge=0, lt=2**32)
        """Another seed gives other images."""

        @field_validator("radius")
        @classmethod
        def _in_order(cls, radius: tuple[float, float]) -> tuple[float, float]:
            if not 0 < radius[0] <= radius[1] <= 1:
                raise ValueError("expected [smallest, largest] with 0 < smallest <= largest <= 1")
            return radius

    def __init__(self, params: "Shapes.Params") -> None:
        self._params = params
        self.image_size = params.image_size
        self.num_classes = params.num_classes
        self.class_names = _CLASS_NAMES[: params.num_classes]

    def size(self, split: sandbox.Split) -> int:
        return self._params.num_images if split == "train" else self._params.num_validation

    def batch(
        self, split: sandbox.Split, indices: Int[Tensor, " b"], rng: torch.Generator
    ) -> sandbox.Batch:
        """The images at `indices`; `rng` is not drawn from, as nothing is augmented.

        Labels follow the index round robin, so any run of indices is balanced.
        """
        check_indices(indices, self.size(split))
        dice = _Dice(self._params.seed, split, indices)
        labels = indices % self.num_classes
        return sandbox.Batch(self._draw(dice, labels) * 2 - 1, labels)

    def _draw(self, dice: "_Dice", labels: Int[Tensor, " b"]) -> Float[Tensor, "b 3 h w"]:
        """Paint background, distractor and shape over one another, in [0, 1]."""
        clutter = self._params.clutter
        half = min(self.image_size) / 2
        colour = dice.roll(3)
        # Every channel is 0.3 to 0.7 away from the shape's, so that no shape drowns.
        behind = (colour + dice.between(0.3, 0.7, 3)) % 1
        shape = self._coverage(
            labels,
            dice,
            radius=half * dice.between(*self._params.radius),
            turn=0.15 + 0.35 * clutter,
        )
        images = rearrange(behind, "b c -> b c 1 1").expand(-1, -1, *self.image_size)
        if clutter == 0:
            return _over(images, shape, colour)
        tint = 0.5 * clutter * (2 * dice.roll(3) - 1)
        shade = rearrange(self._shade(dice), "b h w -> b 1 h w")
        images = (images + shade * rearrange(tint, "b c -> b c 1 1")).clamp(0, 1)
        kind = (dice.roll() * len(_CLASS_NAMES)).long()
        distractor = self._coverage(kind, dice, radius=half * dice.between(0.25, 0.45), turn=3.2)
        # Half of the images have one; it lies in front of or behind the shape.
        strength = clutter * dice.between(0.3, 0.9) * (dice.roll() < 0.5)
        distractor = distractor * rearrange(strength, "b -> b 1 1")
        faint, in_front = dice.roll(3), rearrange(dice.roll() < 0.5, "b -> b 1 1 1")
        return torch.where(
            in_front,
            _over(_over(images, shape, colour), distractor, faint),
            _over(_over(images, distractor, faint), shape, colour),
        )

    def _shade(self, dice: "_Dice") -> Float[Tensor, "b h w"]:
        """What is added to a plain background, in [-1, 1]: nothing, a gradient or a weave."""
        h, w = self.image_size
        angle, period = 2 * math.pi * dice.roll(), dice.between(0.25, 0.7) * min(h, w)
        x, y = self._grid(torch.tensor([w / 2, h / 2]).expand(len(angle), 2), angle)
        frequency, phase = rearrange(1 / period, "b -> b 1 1"), dice.roll(2)
        weave = _zigzag(x * frequency + rearrange(phase[:, 0], "b -> b 1 1"))
        weave = weave * _zigzag(y * frequency + rearrange(phase[:, 1], "b -> b 1 1"))
        kind = rearrange((dice.roll() * 3).long(), "b -> b 1 1")
        return torch.where(kind == 1, x / math.hypot(h / 2, w / 2), weave) * (kind > 0)

    def _coverage(
        self, labels: Int[Tensor, " b"], dice: "_Dice", radius: Float[Tensor, " b"], turn: float
    ) -> Float[Tensor, "b h w"]:
        """How much of each pixel a shape covers, its centre and angle (up to `turn`) rolled."""
        extent = torch.tensor(self.image_size[::-1]) / 2
        room = (extent - rearrange(radius, "b -> b 1")).clamp(min=0)
        centre = extent + room * (2 * dice.roll(2) - 1)
        x, y = self._grid(centre, turn * (2 * dice.roll() - 1))
        unit = rearrange(radius, "b -> b 1 1")
        distance = _signed_distance(x / unit, y / unit, labels // 2) * unit
        stroke = (self._params.stroke * unit).clamp(min=0.65)
        hollow = rearrange(labels % 2 == 1, "b -> b 1 1")
        distance = torch.where(hollow, distance.abs() - stroke, distance)
        return (0.5 - distance / self._params.edge_px).clamp(0, 1)

    def _grid(
        self, centre: Float[Tensor, "b 2"], angle: Float[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b h w"], Float[Tensor, "b h w"]]:
        """Pixel centres in pixels, seen from `centre` by an observer turned by `angle`."""
        h, w = self.image_size
        # In double, since the last bit of these two varies with the size of the batch.
        cos, sin = (
            rearrange(f(angle.double()).float(), "b -> b 1 1") for f in (torch.cos, torch.sin)
        )
        x = torch.arange(w) + 0.5 - rearrange(centre[:, 0], "b -> b 1 1")
        y = rearrange(torch.arange(h) + 0.5, "h -> h 1") - rearrange(centre[:, 1], "b -> b 1 1")
        return cos * x + sin * y, cos * y - sin * x


class _Dice:
    """Random numbers of each image: a hash of seed, split, index and a count of what was rolled."""

    def __init__(self, seed: int, split: sandbox.Split, indices: Int[Tensor, " b"]) -> None:
        key = _mix(np.array([2 * seed + (split == "validation")], dtype=np.uint64))
        self._keys = _mix(key + indices.numpy().astype(np.uint64))
        self._rolled = 0

    def roll(self, *axes: int) -> Float[Tensor, "b *axes"]:
        """Uniform numbers in [0, 1), `axes` of them an image."""
        num = math.prod(axes)
        counter = np.arange(self._rolled, self._rolled + num, dtype=np.uint64)
        self._rolled += num
        bits = _mix(self._keys[:, None] + counter) >> np.uint64(40)
        return torch.from_numpy(bits.astype(np.float32) / 2**24).reshape(len(bits), *axes)

    def between(self, low: float, high: float, *axes: int) -> Float[Tensor, "b *axes"]:
        return low + (high - low) * self.roll(*axes)


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One step of splitmix64 (Steele, Lea and Flood 2014): every bit in moves every bit out."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _signed_distance(
    x: Float[Tensor, "b h w"], y: Float[Tensor, "b h w"], forms: Int[Tensor, " b"]
) -> Float[Tensor, "b h w"]:
    """Distance of points to the outline of each image's form, negative inside (even-odd rule)."""
    x = x.abs()
    nearest = torch.full_like(x, math.inf)
    inside = torch.zeros_like(x, dtype=torch.bool)
    corners = rearrange(_CORNERS[forms], "b corner xy -> corner xy b 1 1")
    for (ax, ay), (bx, by) in pairwise(corners):
        ex, ey, dx, dy = bx - ax, by - ay, x - ax, y - ay
        # A repeated corner makes an edge of length 0: still a point of the outline.
        length_squared = (ex * ex + ey * ey).clamp(min=1e-12)
        along = (dx * (ex / length_squared) + dy * (ey / length_squared)).clamp_(0, 1)
        nearest = torch.minimum(nearest, (dx - along * ex).square_() + (dy - along * ey).square_())
        inside ^= ((y < ay) != (y < by)) & ((dx * ey < dy * ex) == (ey > 0))
    polygon = nearest.sqrt_() * torch.where(inside, -1.0, 1.0)
    return torch.where(rearrange(forms == 0, "b -> b 1 1"), (x * x + y * y).sqrt() - 1, polygon)


def _zigzag(x: Float[Tensor, "b h w"]) -> Float[Tensor, "b h w"]:
    """A triangle wave of period 1 between -1 and 1."""
    return (x - x.floor() - 0.5).abs() * 4 - 1


def _over(
    images: Float[Tensor, "b 3 h w"], cover: Float[Tensor, "b h w"], colour: Float[Tensor, "b 3"]
) -> Float[Tensor, "b 3 h w"]:
    cover = rearrange(cover, "b h w -> b 1 h w")
    return images + cover * (rearrange(colour, "b c -> b c 1 1") - images)
