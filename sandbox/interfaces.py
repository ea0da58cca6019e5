"""What each swappable part must be able to do. Every tensor that crosses a seam is named here.

Axes: b images, h w pixels or cells, l tokens of an image, n tokens of one step (or rows), p keys,
c code channels, v vocabulary entries, d model or feature width.
Values: images lie in [-1, 1]; ids in [0, v); labels in [0, num_classes], the last of which means
"no class" and is what guidance is measured against. A part is built as `Class(params, *handed)`,
where `params` is its own nested `Params`; what is handed over stands in each docstring.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sandbox.layout import Layout, Mask
from sandbox.values import (
    AttentionRequest,
    Batch,
    Evidence,
    Losses,
    Reconstruction,
    Split,
    Watch,
)


@runtime_checkable
class ScaleSchedule(Protocol):
    """Makes the layout. Built as `Class(params)`."""

    def layout(self) -> Layout: ...


@runtime_checkable
class Autoencoder(Protocol):
    """Images to a feature map and back; an `nn.Module`. Built as `Class(params)`.

    It may also have `quicken() -> bool`, of a copy that gives no gradients: whether it codes by
    fast kernels from then on; called again where weights have changed.
    """

    code_dim: int
    downsample: int
    """Pixels a cell's side covers."""

    def encode(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]: ...

    def decode(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]: ...


@runtime_checkable
class Codebook(Protocol):
    """Vectors to ids and back; an `nn.Module` in float32. Built as `Class(params, code_dim)`.

    It may also have `penalty(vectors) -> Float[""]`, a loss of its own over one training batch's
    vectors (one `n c` a group, with gradients to the encoder), as entropy regularisation is.
    `lookup` says what "nearest" means: `euclidean`, or `cosine` for directions alone.
    """

    vocab_size: int
    code_dim: int
    lookup: Literal["euclidean", "cosine"]

    def nearest(self, vectors: Float[Tensor, "n c"]) -> Int[Tensor, " n"]: ...

    def embed(self, ids: Int[Tensor, "*axes"]) -> Float[Tensor, "*axes c"]: ...

    def seed(self, vectors: Float[Tensor, "n c"], group: int, num_groups: int) -> None:
        """Initialise the share of the codes that belongs to `group` (a scale) from its vectors."""

    def observe(self, vectors: Sequence[Tensor], ids: Sequence[Tensor]) -> None:
        """Take note of one training batch: per group, its vectors (`n c`) and their ids (`n`)."""

    def after_step(
        self, optimizer: torch.optim.Optimizer, progress: float, rng: torch.Generator
    ) -> Mapping[str, float | Tensor]:
        """Care for the codes after an optimiser step (averages, restarts); returns scalars."""


@runtime_checkable
class Tokenizer(Protocol):
    """Images to ids and back, and ids to what a backbone reads. Built as `Class(params)`.

    A *canvas* is the feature map that the steps so far add up to, `b c h w`. A step's *context* is
    what the backbone reads before it predicts that step: always code vectors, zeros at the first.
    It may also have `fused`, False at first: whether `render` may run kernels built for it
    (`sandbox.render` has them for any autoencoder), whose results differ in the last digits.
    """

    layout: Layout
    vocab_size: int
    code_dim: int
    image_size: tuple[int, int]

    def encode(self, images: Float[Tensor, "b 3 h w"]) -> Int[Tensor, "b l"]: ...

    def decode(self, ids: Int[Tensor, "b l"]) -> Float[Tensor, "b 3 h w"]: ...

    def contexts(self, ids: Int[Tensor, "b l"]) -> Float[Tensor, "b l c"]:
        """What the backbone reads at every token, when all earlier ids are known."""

    def embed(self, ids: Int[Tensor, "*axes"]) -> Float[Tensor, "*axes c"]:
        """The code vectors that ids stand for."""

    def canvas(self, batch_size: int) -> Float[Tensor, "b c h w"]:
        """An empty canvas."""

    def paint(
        self, canvas: Float[Tensor, "b c h w"], codes: Float[Tensor, "b n c"], step: int
    ) -> Float[Tensor, "b c h w"]:
        """The canvas with one step's codes added; the one given is left as it was."""

    def context(self, canvas: Float[Tensor, "b c h w"], step: int) -> Float[Tensor, "b n c"]:
        """One step's share of `contexts`, from the canvas of the steps before it."""

    def render(self, canvas: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 h w"]:
        """The images a canvas stands for, in [-1, 1]."""


@runtime_checkable
class RequantizingTokenizer(Tokenizer, Protocol):
    """A tokenizer whose lookup can be disturbed, for a generator that learns from mistakes."""

    def features(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c i j"]: ...

    def quantize(
        self, features: Float[Tensor, "b c i j"], noise: Float[Tensor, " b"]
    ) -> tuple[Int[Tensor, "b l"], Int[Tensor, "b l"]]:
        """The ids found under noise (over the root mean square of what is looked up), and the right
        ones of what each step then finds left over. Without noise both are those of `encode`."""


@runtime_checkable
class TrainableTokenizer(Tokenizer, Protocol):
    """A tokenizer (an `nn.Module`) that the task `train-tokenizer` can fit."""

    def initialise(self, batches: Iterable[Float[Tensor, "b 3 h w"]]) -> None:
        """Place the codes by the first training images; called once, before the first step."""

    def reconstruct(self, images: Float[Tensor, "b 3 h w"]) -> Reconstruction:
        """Encode, quantize, decode with gradients."""

    def after_step(
        self, optimizer: torch.optim.Optimizer, progress: float, rng: torch.Generator
    ) -> Mapping[str, float | Tensor]:
        """Care for the codebook after an optimiser step; `progress` runs from 0 to 1."""


@runtime_checkable
class AttentionBackend(Protocol):
    """Computes attention, or says why it cannot; never ignores a mask. Built as `Class(params)`.
    One may also have `rehearse(q, k, v, mask, scale)`, called before compiled code attends to such
    tensors, where it cannot measure; and `attend_appending(qkv, past, start, scale, cosine)`, which
    fills a cache as it attends, or gives None.
    """

    def refusal(self, request: AttentionRequest) -> str | None:
        """Why this call cannot be honoured, or None if it can."""

    def attend(
        self,
        q: Float[Tensor, "b heads n e"],
        k: Float[Tensor, "b heads p e"],
        v: Float[Tensor, "b heads p e"],
        mask: Mask,
        scale: float,
    ) -> Float[Tensor, "b heads n e"]:
        """`softmax(scale q k^T) v` under the mask. Raises ValueError where `refusal` has one."""


@runtime_checkable
class Backbone(Protocol):
    """Contexts and labels to logits; an `nn.Module`. Built as `Class(params, tokens)`.

    Logits are the largest tensor of a training. One that has `forward` in two halves need not hold
    them all at once: `features(contexts, labels)` gives a tuple of tensors whose first axis is b,
    and `logits(*features)` what `forward` gives, of any of their rows. `compile()` of such a
    backbone compiles what is slow in `features`. It may also have `fused`, False at first: whether
    steps may run kernels built for it, and `refresh()`, for copies of weights that recordings read.
    And `guided_step(state, context, step, weight)`: `sandbox.guided` of `step`, by a shorter way.
    """

    def forward(
        self, contexts: Float[Tensor, "b l c"], labels: Int[Tensor, " b"]
    ) -> Float[Tensor, "b l v"]:
        """Logits of every token at once, for training (teacher forcing)."""

    def begin(self, labels: Int[Tensor, " b"]) -> Any:
        """A fresh state (an empty key-value cache) for a batch of new images."""

    def step(
        self, state: Any, context: Float[Tensor, "b n c"], step: int
    ) -> Float[Tensor, "b n v"]:
        """The rows of `forward` that belong to one step; moves `state` on."""

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay must not touch (timm's convention)."""


@runtime_checkable
class Sampler(Protocol):
    """Logits to ids; `progress` is 0 at the first step, 1 at the last. Built as `Class(params)`.
    It may also have `soften(logits, progress, rng) -> Float["b n v"]`: weights of codes whose mean
    is painted in place of the drawn one; and `fused`, as a backbone has.
    """

    def guidance(self, progress: float) -> float:
        """The weight t of `(1 + t) with_label - t without` (classifier-free guidance)."""

    def draw(
        self, logits: Float[Tensor, "b n v"], progress: float, rng: torch.Generator
    ) -> Int[Tensor, "b n"]: ...


@runtime_checkable
class Generator(Protocol):
    """What is trained and sampled from. Built as `Class(params, subject)`.

    It may also have `compile() -> None`, called before a training that is to be compiled; without
    it, the network's own is. And `fast`, one of `off`, `auto` and `on`, which may be set at any
    time: whether `generate` may be replayed as recorded, and with `on` run kernels built for it.
    """

    network: nn.Module
    """What the optimiser trains and a checkpoint keeps."""

    def prepare(self, images: Float[Tensor, "b 3 h w"]) -> Tensor:
        """What `loss` reads of images; depends on nothing trained here, so it can be cached."""

    def loss(self, prepared: Tensor, labels: Int[Tensor, " b"]) -> Losses: ...

    def generate(
        self, labels: Int[Tensor, " b"], rng: torch.Generator, watch: Watch | None = None
    ) -> Float[Tensor, "b 3 h w"]:
        """One image a label."""


@runtime_checkable
class Dataset(Protocol):
    """Labelled images, at random access. Built as `Class(params)`.

    One that holds its images in memory may also have `to(device) -> Dataset`: the same, with images
    on that device. Indices and `rng` stay on the CPU, so the batches are the same, bit for bit. It
    returns itself where it cannot.
    """

    num_classes: int
    class_names: Sequence[str]
    image_size: tuple[int, int]

    def size(self, split: Split) -> int:
        """How many images a split has."""

    def batch(self, split: Split, indices: Int[Tensor, " b"], rng: torch.Generator) -> Batch:
        """The images at `indices`; augmentation draws from `rng` alone."""


@runtime_checkable
class FeatureExtractor(Protocol):
    """The network whose features a score reads. Built as `Class(params, image_size, num_classes)`.

    `label` names it in every score, as in `fid[inception]`; the weights of `network` come from the
    recipe's `weights.features` or from the task `train-classifier`.
    """

    label: str
    network: nn.Module
    needs_weights: bool
    """Whether its features mean nothing without weights from a file or a training."""

    def features(
        self, images: Float[Tensor, "b 3 h w"]
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b k"]]:
        """Features and class logits of images in [-1, 1]."""


@runtime_checkable
class Metric(Protocol):
    """A score over images, fed in batches. Built as `Class(params)`.

    `paired` metrics compare image by image (PSNR, SSIM): they are for reconstructions only. One may
    also have `higher_is_better`, which is False where it is absent.
    """

    paired: bool
    reads_features: bool

    def update(self, real: Evidence | None, fake: Evidence | None) -> None:
        """Take in a batch of each; either may be None when one side has run out."""

    def compute(self) -> Mapping[str, float]:
        """Score name to value; names carry no extractor, the evaluation adds it."""


@runtime_checkable
class Observer(Protocol):
    """Watches a run: implements any of `sandbox.hooks.ObserverHooks`. Built as `Class(params)`."""
