"""The autoregressive generator: a tokenizer's ids, predicted step by step.

The one idea to hold: it joins a frozen tokenizer, a backbone, a sampler and an objective, and never
asks which layout they share, so VAR and raster-scan prediction are both this class.
"""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

import sandbox
from sandbox import Keep, Layout, Losses, Part, Subject, Tokens, Watch


@sandbox.hookimpl
def sandbox_register(register: Any) -> None:
    register(sandbox.Generator, "autoregressive", Autoregressive)


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
        fast: Literal["auto", "on", "off"] = "auto"
        """How images are drawn. `auto`: on a GPU, a kind of call (size of the batch, sampler,
        precision) that comes a fourth time is recorded as one CUDA graph, decoder included, and
        replayed: the same images, sooner. `on`: recorded at the first call, and the network's
        kernels are built for it, on a CPU too: about a minute where they were never built before,
        and the last digits differ. Edits, and what is watched step by step, are not replayed."""

        @field_validator("fast", mode="before")
        @classmethod
        def _words(cls, value: Any) -> Any:
            """YAML reads a plain on or off as true or false."""
            return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

    def __init__(self, params: Params, subject: Subject) -> None:
        if subject.tokenizer is None:
            raise sandbox.SandboxError(
                "the generator 'autoregressive' predicts a tokenizer's ids: name a tokenizer"
            )
        self.params = params
        self.tokenizer, self.num_classes = subject.tokenizer, subject.num_classes
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
        parts = [self.backbone, self.tokenizer]
        self._modules = [m for p in parts if isinstance(p, nn.Module) for m in p.modules()]
        self._shares: dict[torch.device, Tensor] = {}

    @torch.no_grad()
    def prepare(self, images: Float[Tensor, "b 3 h w"]) -> Int[Tensor, "b l"]:
        """The images' ids."""
        return self.tokenizer.encode(images)

    def loss(self, prepared: Int[Tensor, "b l"], labels: Int[Tensor, " b"]) -> Losses:
        """Teacher-forced. Parts: `loss`, `accuracy` and, per scale, `loss/scale1` and on.

        Does not wait for the device. A network that was compiled runs so in training alone: what
        is measured in between has other batch sizes, which would be compiled anew.
        """
        ids = prepared.long()
        with torch.no_grad():
            contexts = self.tokenizer.contexts(self._disturbed(ids))
        call = self.network if self.network.training else self.network.forward
        logits = call(contexts, labels)
        losses = self.objective.losses(logits, ids, self.layout)
        total = losses.mean()
        with torch.no_grad():
            parts = {"loss": total.detach(), "accuracy": (logits.argmax(-1) == ids).float().mean()}
            if self.layout.num_levels > 1:
                levels = (self._level_shares(losses.device) * losses.mean(dim=0)).sum(dim=1)
                for number, level in enumerate(levels.unbind(), 1):
                    parts[f"loss/scale{number}"] = level
        return Losses(total, parts)

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
        if watch is not None or self.fast == "off" or labels.device.type != "cuda":
            return self._sample(labels, rng, watch=watch)
        drawn = partial(self._sample, sampler=self.sampler)  # kept with it, so its id stays taken
        return self._recordings.run(
            drawn, labels, rng, key=self._kind(labels), at_once=self.fast == "on"
        )

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
        keep = Keep(self.prepare(images).long(), keep_cells(self.layout, mask))
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
        """Let the backbone run compiled kernels, where that is wanted and it has any."""
        if self.fast != "on" or not hasattr(self.backbone, "fused"):
            yield
            return
        self.backbone.fused = True
        try:
            with sandbox.compiling():
                yield
        finally:
            self.backbone.fused = False

    def _kind(self, labels: Int[Tensor, " b"]) -> Hashable:
        """What a recorded call depends on besides labels, randomness and the weights' values."""
        kind, backends = labels.device.type, torch.backends
        return (
            (labels.shape, labels.dtype, labels.device),
            (self.fast, id(self.sampler)),
            (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)),
            (backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision),
            sandbox.places(self._modules),
        )


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
