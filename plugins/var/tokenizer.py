"""The multi-scale residual tokenizer of VAR (arXiv 2404.02905, Algorithms 1 and 2).

An image's feature map is the sum of K maps, coarse to fine. Map k is what the maps before it have
left over, shrunk to its own few cells, replaced there by codes, and grown back: area down, bicubic
up, then a convolution `phi` that sharpens what growing has blurred. A canvas is the sum so far.
All of that is float32, with neither autocast nor TF32, because both change which codes are nearest.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

import sandbox
from sandbox import Layout, Part, Reconstruction

from . import published_tokenizer


def phi_of_step(num_phi: int, num_steps: int) -> tuple[int, ...]:
    """Which of `num_phi` convolutions each step uses: the one whose tick is nearest.

    In float64 and with the first winning a tie, as published: with 10 steps and 4 convolutions two
    choices hang on the last bit. The published ticks stand further out where there are four.
    """
    edge = 1 / 3 / num_phi if num_phi == 4 else 1 / 2 / num_phi
    ticks = np.linspace(edge, 1 - edge, num_phi)
    places = [step / max(1, num_steps - 1) for step in range(num_steps)]
    return tuple(int(np.argmin(np.abs(ticks - place))) for place in places)


class VarTokenizer(nn.Module):
    """Multi-scale residual vector quantization of an autoencoder's features."""

    class Params(sandbox.Params):
        autoencoder: Part[sandbox.Autoencoder]
        """Makes the feature map and the image."""
        codebook: Part[sandbox.Codebook]
        """One for all scales."""
        schedule: Part[sandbox.ScaleSchedule]
        """The maps, coarse to fine; the last has the size of the feature map."""
        phi: Literal["none", "shared", "partial", "per-scale"] = "partial"
        """Convolutions after growing: none, one for all scales, `num_phi`, or one a scale."""
        num_phi: int = Field(4, ge=2)
        """How many convolutions `phi: partial` shares among neighbouring scales."""
        quant_resi: float = Field(0.5, gt=0, le=1)
        """The convolution's share r: phi(x) = (1 - r) x + r conv(x)."""
        beta: float = Field(0.25, ge=0)
        """Weight of the commitment loss, which pulls features towards their codes."""

        @field_validator("schedule")
        @classmethod
        def _must_fill_whole_maps(
            cls, schedule: Part[sandbox.ScaleSchedule]
        ) -> Part[sandbox.ScaleSchedule]:
            layout = schedule.build().layout()
            if any(s.cells != tuple(range(s.height * s.width)) for s in layout.steps):
                raise ValueError(
                    f"schedule {schedule.name!r} has steps that fill only a part of their map; "
                    "`var-vq` needs growing whole maps (for one token a step use `raster-vq`)"
                )
            # Refuses maps that do not grow.
            Layout.pyramid(*((step.height, step.width) for step in layout.steps))
            return schedule

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.params, self.layout = params, params.schedule.build().layout()
        self.autoencoder = params.autoencoder.build()
        self.code_dim = self.autoencoder.code_dim
        self.codebook = params.codebook.build(self.code_dim)
        self.vocab_size, num_steps = self.codebook.vocab_size, len(self.layout.steps)
        height, width = (cells * self.autoencoder.downsample for cells in self.layout.size)
        self.image_size = (height, width)
        num_phi = {"none": 0, "shared": 1, "partial": params.num_phi, "per-scale": num_steps}
        self.phi = nn.ModuleList(
            nn.Conv2d(self.code_dim, self.code_dim, 3, padding=1)
            for _ in range(num_phi[params.phi])
        )
        self.phi_of_step = phi_of_step(len(self.phi), num_steps) if len(self.phi) else ()
        self.hits: Tensor
        self.seeded: Tensor
        self.register_buffer("hits", torch.zeros(num_steps, self.vocab_size))
        self.register_buffer("seeded", torch.zeros((), dtype=torch.bool))
        self._surely_seeded = False  # spares reading the buffer, which would wait for the device
        self.register_load_state_dict_post_hook(_look_again)

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b 3 H W"]) -> Int[Tensor, "b l"]:
        """Raises ValueError unless the images have `image_size`."""
        return torch.cat(self._quantize(self._features(images))[0], dim=1)

    @torch.no_grad()
    def decode(self, ids: Int[Tensor, "b l"]) -> Float[Tensor, "b 3 H W"]:
        *_, canvas = self._canvases(ids)
        return self.render(canvas)

    @torch.no_grad()
    def contexts(self, ids: Int[Tensor, "b l"]) -> Float[Tensor, "b l c"]:
        """What the backbone reads at every token, when all earlier ids are known."""
        steps = range(len(self.layout.steps))  # the canvas after the last one is never asked for
        whole = [self.context(canvas, k) for k, canvas in zip(steps, self._canvases(ids))]  # noqa: B905
        return torch.cat(whole, dim=1)

    def embed(self, ids: Int[Tensor, "*axes"]) -> Float[Tensor, "*axes c"]:
        return self.codebook.embed(ids)

    def canvas(self, batch_size: int) -> Float[Tensor, "b c h w"]:
        """An empty canvas."""
        return self.hits.new_zeros(batch_size, self.code_dim, *self.layout.size)

    def paint(
        self, canvas: Float[Tensor, "b c h w"], codes: Float[Tensor, "b n c"], step: int
    ) -> Float[Tensor, "b c h w"]:
        """The canvas with one step's codes grown and added; the one given is left as it was."""
        with _exact_float32(canvas.device):
            return canvas + self._grow(codes.float(), step)

    def context(self, canvas: Float[Tensor, "b c h w"], step: int) -> Float[Tensor, "b n c"]:
        """The canvas of the steps before, shrunk to this step's map; of an empty one, zeros."""
        return rearrange(self._shrink(canvas, step), "b c h w -> b (h w) c")

    def render(self, canvas: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """The images a canvas stands for, in [-1, 1]."""
        return self.autoencoder.decode(canvas).float().clamp(-1, 1)

    def reconstruct(self, images: Float[Tensor, "b 3 H W"]) -> Reconstruction:
        """Encode, quantize, decode with gradients (straight through the codes).

        The loss is the mean over scales of |f_k - sg f|^2 + beta |sg f_k - f|^2, where f_k is the
        canvas after scale k. In training mode the codebook takes note of the batch, and the first
        one may initialise it.
        """
        features = self._features(images)
        if self.training:
            self._seed_once(features.detach())
        ids, canvases, vectors = self._quantize(features)
        if self.training:
            self.codebook.observe(vectors, [rows.flatten() for rows in ids])
            self._count(ids)
        target, beta = features.detach(), self.params.beta
        losses = [
            F.mse_loss(canvas, target) + beta * F.mse_loss(canvas.detach(), features)
            for canvas in canvases
        ]
        through = features + (canvases[-1] - features).detach()
        images = self.autoencoder.decode(through)
        return Reconstruction(images, torch.cat(ids, dim=1), torch.stack(losses).mean())

    def after_step(
        self, optimizer: torch.optim.Optimizer, progress: float, rng: torch.Generator
    ) -> Mapping[str, float | Tensor]:
        """Care for the codebook after an optimiser step; `progress` runs from 0 to 1."""
        return self.codebook.after_step(optimizer, progress, rng)

    def no_weight_decay(self) -> set[str]:
        """Codes are places, not weights: decay would pull them to the origin."""
        return {f"codebook.{name}" for name, _ in self.codebook.named_parameters()}

    @torch.no_grad()
    def residual_energy(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, " k"]:
        """The share of the features' variance that is still missing after each scale."""
        features = self._features(images)
        canvases = self._quantize(features)[1]
        missing = torch.stack([F.mse_loss(canvas, features) for canvas in canvases])
        return missing / features.var(correction=0)

    def from_published(self, state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """A published tokenizer's weights under our names; None where the names are not those.

        What only training needs and such a file lacks is as it stands in this tokenizer. The usage
        counts of another number of scales are left out: they are no weights.
        """
        return published_tokenizer.from_published(self, state)

    def to_published(self) -> dict[str, Tensor]:
        """The weights under the published names, to be read by the published code.

        Raises ValueError for an autoencoder or codebook that has no published counterpart.
        """
        return published_tokenizer.to_published(self)

    def describe(self, state: Mapping[str, Tensor]) -> dict[str, str]:
        """What can be read off a state dict (with our names), in plain words."""
        return published_tokenizer.describe(state)

    def _features(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        if tuple(images.shape[2:]) != self.image_size:
            raise ValueError(
                f"this tokenizer is for images of {self.image_size[0]} x {self.image_size[1]} px, "
                f"got {images.shape[2]} x {images.shape[3]}"
            )
        return self.autoencoder.encode(images).float()

    def _quantize(
        self, features: Float[Tensor, "b c h w"], seed: bool = False
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Per step: ids (`b n`), the canvas after it (`b c h w`) and the vectors (`(b n) c`).

        Gradients flow from the canvases to codes and phi, never through the residuals.
        """
        rest, canvas = features.detach(), self.canvas(len(features))
        ids, canvases, vectors = [], [], []
        with _exact_float32(features.device):
            for step in range(len(self.layout.steps)):
                vectors.append(rearrange(self._shrink(rest, step), "b c h w -> (b h w) c"))
                if seed:
                    self.codebook.seed(vectors[-1], step, len(self.layout.steps))
                nearest = self.codebook.nearest(vectors[-1])
                ids.append(rearrange(nearest, "(b n) -> b n", b=len(features)))
                grown = self._grow(self.codebook.embed(ids[-1]), step)
                canvas, rest = canvas + grown, rest - grown.detach()
                canvases.append(canvas)
        return ids, canvases, vectors

    def _canvases(self, ids: Int[Tensor, "b l"]) -> Iterator[Float[Tensor, "b c h w"]]:
        """The canvas before each step, then the one after the last."""
        if ids.shape[1] != self.layout.seq_len:
            raise ValueError(f"expected {self.layout.seq_len} ids an image, got {ids.shape[1]}")
        canvas = self.canvas(len(ids))
        for step, span in enumerate(self.layout.spans):
            yield canvas
            canvas = self.paint(canvas, self.embed(ids[:, span]), step)
        yield canvas

    def _shrink(self, maps: Float[Tensor, "b c h w"], step: int) -> Float[Tensor, "b c i j"]:
        size = self.layout.steps[step].height, self.layout.steps[step].width
        return maps if size == self.layout.size else F.interpolate(maps, size, mode="area")

    def _grow(self, codes: Float[Tensor, "b n c"], step: int) -> Float[Tensor, "b c h w"]:
        height, width = self.layout.steps[step].height, self.layout.steps[step].width
        maps = rearrange(codes, "b (h w) c -> b c h w", h=height, w=width)
        if (height, width) != self.layout.size:
            maps = F.interpolate(maps, self.layout.size, mode="bicubic")
        if not self.phi_of_step:
            return maps
        share = self.params.quant_resi
        return (1 - share) * maps + share * self.phi[self.phi_of_step[step]](maps)

    @torch.no_grad()
    def _seed_once(self, features: Float[Tensor, "b c h w"]) -> None:
        if not self._surely_seeded and not self.seeded:
            self._quantize(features, seed=True)
            self.seeded.fill_(True)
        self._surely_seeded = True

    @torch.no_grad()
    def _count(self, ids: list[Tensor]) -> None:
        """A moving average of how often each scale uses each code, as the published file keeps."""
        counts = torch.zeros_like(self.hits)
        for row, step_ids in zip(counts, ids, strict=True):
            row.index_add_(
                0, step_ids.flatten(), torch.ones_like(step_ids.flatten(), dtype=row.dtype)
            )
        self.hits.lerp_(counts, 0.01)


def _look_again(tokenizer: VarTokenizer, _: object) -> None:
    tokenizer._surely_seeded = False


@contextmanager
def _exact_float32(device: torch.device) -> Iterator[None]:
    """Neither autocast nor TF32 in convolutions."""
    convolution = torch.backends.cudnn.conv
    before = convolution.fp32_precision
    convolution.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        convolution.fp32_precision = before
