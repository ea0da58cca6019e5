"""The autoregressive generator: a tokenizer's ids, predicted step by step.

The one idea to hold: it joins a frozen tokenizer, a backbone, a sampler and an objective, and never
asks which layout they share, so VAR and raster-scan prediction are both this class.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

import sandbox
from sandbox import Keep, Layout, Losses, Part, Subject, Tokens, Watch

from .scoring import Scores, scores

MAX_LOGITS = 2**25
"""How many logits of a training batch are held at once: 128 MiB of them (of one image, if more)."""


class Autoregressive:
    """Predicts ids; images come from the tokenizer, which is not trained here."""

    class Params(sandbox.Params):
        backbone: Part[sandbox.Backbone]
        """The network that predicts ids."""
        sampler: Part[sandbox.Sampler] = Field(default="top-k-top-p", validate_default=True)
        """How ids are drawn from its predictions."""
        objective: Part[sandbox.Objective] = Field(default="cross-entropy", validate_default=True)
        """What training minimises."""
        token_noise: float = Field(0.0, ge=0, lt=1)
        """Share of the ids the network reads in training that are drawn at random instead; what it
        is to predict stays. It learns to go on from mistakes, its own ones when sampling."""
        self_correction: float = Field(0.0, ge=0)
        """Most noise, over the root mean square of what is looked up, in the lookup of the ids that
        the network reads in training; how much is drawn for each image. It is to predict the right
        ids of what that leaves over: later scales learn to repair mistakes in earlier ones
        (Infinity, arXiv 2412.04431). It then learns from features, which it keeps in the cache."""
        fast: sandbox.Switch = "auto"
        """How images are drawn. `auto`: on a GPU, a kind of call (size of the batch, sampler,
        precision) that comes a fourth time is recorded as one CUDA graph, decoder included, and
        replayed: the same images, sooner. `on`: recorded at the first call, decoder and network
        by kernels of their own where they have some, on a CPU compiled, with the draw: up to a
        minute or two where that was never built before; the last digits differ. Edits, and what is
        watched step by step, are not replayed, nor what a tokenizer decodes that is no
        `nn.Module`: nobody could tell when its weights move."""

    def __init__(self, params: Params, subject: Subject) -> None:
        if subject.tokenizer is None:
            raise sandbox.SandboxError(
                "the generator 'autoregressive' predicts a tokenizer's ids: name a tokenizer"
            )
        self.params = params
        self.tokenizer, self.num_classes = subject.tokenizer, subject.num_classes
        if params.self_correction and not isinstance(self.tokenizer, sandbox.RequantizingTokenizer):
            raise sandbox.SandboxError(
                "the generator 'autoregressive': self_correction disturbs the tokenizer's lookup, "
                "and this tokenizer has no features() and quantize(); set it to 0"
            )
        self.layout = self.tokenizer.layout
        self.backbone = params.backbone.build(
            Tokens(
                layout=self.layout,
                vocab_size=self.tokenizer.vocab_size,
                code_dim=self.tokenizer.code_dim,
                num_classes=subject.num_classes,
            )
        )
        self.network: nn.Module = self.backbone
        self.sampler, self.objective = params.sampler.build(), params.objective.build()
        self.fast = params.fast
        self._recordings = sandbox.Recordings()
        self._followed = sandbox.Followed.within(self.backbone, self.tokenizer)
        self._shares: dict[torch.device, Tensor] = {}
        self._score: Callable[..., tuple[Tensor, Tensor]] = self._scored

    @torch.no_grad()
    def prepare(
        self, images: Float[Tensor, "b 3 h w"]
    ) -> Int[Tensor, "b l"] | Float[Tensor, "b c i j"]:
        """The images' ids; with self-correction, the features that are to be quantized."""
        if self.params.self_correction:
            return self.tokenizer.features(images)
        return self.tokenizer.encode(images)

    def loss(
        self,
        prepared: Int[Tensor, "b l"] | Float[Tensor, "b c i j"],
        labels: Int[Tensor, " b"],
    ) -> Losses:
        """Teacher-forced. Parts: `loss`, `accuracy` and, per scale, `loss/scale1` and on.

        Does not wait for the device. A network that was compiled runs so in training alone: what
        is measured in between has other batch sizes, which would be compiled anew.
        """
        with torch.no_grad():
            seen, ids = self._lesson(prepared)
            contexts = self.tokenizer.contexts(seen)
        total, losses, right = self._judged(contexts, labels, ids)
        with torch.no_grad():
            parts = {"loss": total.detach(), "accuracy": right.float().mean()}
            if self.layout.num_levels > 1:
                levels = (self._level_shares(losses.device) * losses.mean(dim=0)).sum(dim=1)
                for number, level in enumerate(levels.unbind(), 1):
                    parts[f"loss/scale{number}"] = level
        return Losses(total, parts)

    def _lesson(self, prepared: Tensor) -> tuple[Int[Tensor, "b l"], Int[Tensor, "b l"]]:
        """The ids that the network reads, and those it is to predict."""
        if not self.params.self_correction:
            return self._disturbed(prepared.long()), prepared.long()
        most = self.params.self_correction if self.network.training else 0.0
        noise = most * torch.rand(len(prepared), device=prepared.device)
        seen, ids = self.tokenizer.quantize(prepared, noise)
        return self._disturbed(seen), ids

    def compile(self) -> None:
        """Compile what training runs: the network, and its output layer with the objective."""
        self.network.compile()
        self._score = sandbox.compiled_method(self._scored, dynamic=False)

    def _judged(
        self, contexts: Float[Tensor, "b l c"], labels: Int[Tensor, " b"], ids: Int[Tensor, "b l"]
    ) -> Scores:
        """The loss of every token, and whether its id was thought the likeliest.

        Of a backbone in two halves the logits, the largest tensor there is, are made of a few
        images at a time, once, with their gradients.
        """
        network: Any = self.network
        if not (hasattr(network, "features") and hasattr(network, "logits")):
            logits = (network if network.training else network.forward)(contexts, labels)
            losses, right = self._right(logits, ids)
            return Scores(losses.mean(), losses, right)
        size = images_at_once(len(ids), MAX_LOGITS // (ids.shape[1] * self.tokenizer.vocab_size))

        def score(ids: Tensor, *features: Tensor) -> tuple[Tensor, Tensor]:
            # A smaller piece at the end is not worth compiling for.
            compiled = network.training and len(ids) == size
            return (self._score if compiled else self._scored)(ids, *features)

        return scores(score, size, ids, network.features(contexts, labels))

    def _scored(
        self, ids: Int[Tensor, "b l"], *features: Tensor
    ) -> tuple[Float[Tensor, "b l"], Bool[Tensor, "b l"]]:
        network: Any = self.network
        return self._right(network.logits(*features), ids)

    def _right(
        self, logits: Float[Tensor, "b l v"], ids: Int[Tensor, "b l"]
    ) -> tuple[Float[Tensor, "b l"], Bool[Tensor, "b l"]]:
        losses = self.objective.losses(logits, ids, self.layout)
        return losses, logits.detach().argmax(-1) == ids

    def _disturbed(self, ids: Int[Tensor, "b l"]) -> Int[Tensor, "b l"]:
        """The ids, in training some of them replaced as `token_noise` says."""
        if not self.network.training or not self.params.token_noise:
            return ids
        drawn = torch.randint_like(ids, self.tokenizer.vocab_size)
        kept = torch.rand(ids.shape, device=ids.device) >= self.params.token_noise
        return torch.where(kept, ids, drawn)

    def _level_shares(self, device: torch.device) -> Float[Tensor, "k l"]:
        """One row a level: what each token counts in the level's mean. Made once a device."""
        if device not in self._shares:
            rows = F.one_hot(self.layout.level_of()).T.float()
            self._shares[device] = (rows / rows.sum(dim=1, keepdim=True)).to(device)
        return self._shares[device]

    def generate(
        self, labels: Int[Tensor, " b"], rng: torch.Generator, watch: Watch | None = None
    ) -> Float[Tensor, "b 3 h w"]:
        """One image a label, in [-1, 1]. `rng` lives on the labels' device."""
        recorded = self.fast != "off" and labels.device.type == "cuda"
        if watch is not None or not recorded or self._followed is None:
            return self._sample(labels, rng, watch=watch)
        where = self._refresh_copies(self._followed)
        drawn = partial(self._sample, sampler=self.sampler)  # kept with it, so its id stays taken
        return self._recordings.run(
            drawn, labels, rng, key=(where, *self._kind(labels)), at_once=self.fast == "on"
        )

    def _refresh_copies(self, of: sandbox.Followed) -> Hashable:
        """Of weights, where there are any and weights have moved on: recordings read them. What
        is given stands for where weights lie."""
        where, moved_on = of.look()
        if moved_on:
            for module in of.modules:
                sandbox.refresh(module)
            if refresh := getattr(self.backbone, "refresh", None):
                refresh()
        return where

    def edit(
        self,
        images: Float[Tensor, "b 3 h w"],
        mask: Float[Tensor, "*b h w"],
        labels: Int[Tensor, " b"],
        rng: torch.Generator,
    ) -> Float[Tensor, "b 3 h w"]:
        """The images drawn anew where `mask` is 0; their own codes stay where it is 1.

        A mask of any size, one for all images or one each, is resized bilinearly to every map and
        kept above 0.5. Maps of at most 3 cells, which show the image as a whole, are kept whole.
        """
        mask = mask.to(images).expand(len(images), *mask.shape[-2:])
        keep = Keep(self.tokenizer.encode(images).long(), keep_cells(self.layout, mask))
        return self._sample(labels, rng, keep=keep)

    @torch.no_grad()
    def _sample(
        self,
        labels: Int[Tensor, " b"],
        rng: torch.Generator,
        sampler: sandbox.Sampler | None = None,
        **wishes: Any,
    ) -> Float[Tensor, "b 3 h w"]:
        with _evaluating(self.backbone), self._fused():
            sampled = sandbox.sample(
                self.tokenizer,
                self.backbone,
                sampler or self.sampler,
                labels,
                rng,
                no_label=self.num_classes,
                **wishes,
            )
            return self.tokenizer.render(sampled.canvas)

    @contextmanager
    def _fused(self) -> Iterator[None]:
        """Let all parts run faster kernels, where that is wanted and they can."""
        parts: tuple[Any, ...] = self.backbone, self.tokenizer, self.sampler
        fusing = [part for part in parts if self.fast == "on" and hasattr(part, "fused")]
        for part in fusing:
            part.fused = True
        try:
            with sandbox.compiling():
                yield
        finally:
            for part in fusing:
                part.fused = False

    def _kind(self, labels: Int[Tensor, " b"]) -> Hashable:
        """What a recorded call depends on besides labels, randomness and the weights."""
        kind, backends = labels.device.type, torch.backends
        return (
            (labels.shape, labels.dtype, labels.device),
            (self.fast, id(self.sampler)),
            (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)),
            (backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision),
        )


def images_at_once(num_images: int, most: int) -> int:
    """At most so many (at least one): equal pieces, unless they were less than half of that."""
    most = max(1, min(num_images, most))
    return next((size for size in range(most, most // 2, -1) if num_images % size == 0), most)


def keep_cells(layout: Layout, mask: Float[Tensor, "b h w"]) -> Bool[Tensor, "b l"]:
    """Which tokens a mask of pixels or cells keeps."""
    kept = []
    for step in layout.steps:
        size = step.height, step.width
        cells = F.interpolate(mask[:, None], size, mode="bilinear") > 0.5
        if layout.num_levels > 1 and step.height * step.width <= 3:
            cells = torch.ones_like(cells)
        kept.append(rearrange(cells, "b 1 h w -> b (h w)")[:, list(step.cells)])
    return torch.cat(kept, dim=1)


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)
