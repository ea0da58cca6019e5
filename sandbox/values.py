"""The values that parts hand one another; what they mean stands here, how in `interfaces`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sandbox.layout import Layout, Mask

if TYPE_CHECKING:
    from sandbox.interfaces import Tokenizer

Split = Literal["train", "validation"]
Role = Literal["tokenizer", "generator", "features"]
Watch = Callable[[int, Tensor], None]
"""Called with a step's index and the images decoded from the steps so far, `b 3 h w`."""


@dataclass(frozen=True)
class Batch:
    """Labelled images."""

    images: Float[Tensor, "b 3 h w"]
    labels: Int[Tensor, " b"]


@dataclass(frozen=True)
class Tokens:
    """All that a backbone may know about the tokens it predicts."""

    layout: Layout
    vocab_size: int
    code_dim: int
    num_classes: int


@dataclass(frozen=True)
class Subject:
    """What a generator is to generate. `tokenizer` is None where the recipe names none."""

    image_size: tuple[int, int]
    num_classes: int
    tokenizer: "Tokenizer | None"


@dataclass(frozen=True)
class Reconstruction:
    """What a tokenizer makes of images while it is trained."""

    images: Float[Tensor, "b 3 h w"]
    ids: Int[Tensor, "b l"]
    loss: Float[Tensor, ""]
    """The quantizer's own loss (codebook and commitment), to be added to those of the task."""


@dataclass(frozen=True)
class Losses:
    """`total` is differentiated; `parts` are detached scalars for the curves."""

    total: Float[Tensor, ""]
    parts: Mapping[str, Tensor]


@dataclass(frozen=True)
class Evidence:
    """A batch of images with what a feature extractor sees in them; images in [0, 1]."""

    images: Float[Tensor, "b 3 h w"]
    features: Float[Tensor, "b d"]
    logits: Float[Tensor, "b k"]
    labels: Int[Tensor, " b"]


@dataclass(frozen=True)
class AttentionRequest:
    """One attention call, described: what a backend can say yes or no to beforehand."""

    device: str
    dtype: torch.dtype
    head_dim: int
    num_queries: int
    num_keys: int
    mask: Mask
    needs_grad: bool
