"""The multi-scale residual tokenizer of VAR (arXiv 2404.02905, Algorithms 1 and 2).

An image's feature map is the sum of K maps, coarse to fine. Map k is what the maps before it have
left over, shrunk to its own few cells, replaced there by codes, and grown back: area down, bicubic
up, then a convolution `phi` that sharpens what growing has blurred. A canvas is the sum so far.
All of that is float32, with neither autocast nor TF32, because both change which codes are nearest.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

import sandbox
from sandbox import Layout, Part, Reconstruction

from . import published_tokenizer, quantizing
from .pyramid import Pyramid, painter_for, phi_of_step


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
        estimator: Literal["straight-through", "rotation"] = "straight-through"
        """How gradients pass the codes: unchanged (published), or turned and stretched as the
        features are (the rotation trick, arXiv 2410.06424)."""
        scale_dropout: float = Field(0.0, ge=0, lt=1)
        """In training, the share of an image's scales, the last never, that are left out."""
        prefix_dropout: float = Field(0.0, ge=0, le=1)
        """In training, the share of the images of which only the first scales are decoded, as many
        as chance says, from `prefix_min` on."""
        prefix_min: int = Field(1, ge=1)
        """The fewest scales that `prefix_dropout` leaves."""
        lookup_noise: float = Field(0.0, ge=0)
        """In training, most noise, over the root mean square of what is looked up, in the lookup of
        the codes that are decoded; how much is drawn for each image. The decoder learns to make do
        with codes that are not the right ones, as a generator's are (RobustTok, arXiv 2503.08354).
        """

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
        self.pyramid = Pyramid(self.layout)
        self.hits: Tensor
        self.register_buffer("hits", torch.zeros(num_steps, self.vocab_size))
        self._encode: Callable[..., Tensor] = self.autoencoder.encode
        self._decode: Callable[..., Tensor] = self.autoencoder.decode
        self._judge: Callable[..., Any] = self._judged
        self.fused = False

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b 3 H W"]) -> Int[Tensor, "b l"]:
        """Raises ValueError unless the images have `image_size`."""
        return torch.cat(quantizing.quantized(self, self.features(images)).ids, dim=1)

    def features(
        self, images: Float[Tensor, "b 3 H W"], encode: Callable[..., Tensor] | None = None
    ) -> Float[Tensor, "b c h w"]:
        """What `quantize` takes. Raises ValueError unless the images have `image_size`."""
        if tuple(images.shape[2:]) != self.image_size:
            raise ValueError(
                f"this tokenizer is for images of {self.image_size[0]} x {self.image_size[1]} px, "
                f"got {images.shape[2]} x {images.shape[3]}"
            )
        return (encode or self.autoencoder.encode)(images).float()

    @torch.no_grad()
    def quantize(
        self, features: Float[Tensor, "b c h w"], noise: Float[Tensor, " b"]
    ) -> tuple[Int[Tensor, "b l"], Int[Tensor, "b l"]]:
        """Ids of a disturbed lookup, and those that at each scale would have been right.

        What is looked up gets Gaussian noise of `noise` times its root mean square at that scale.
        What is left over after that is left to the later scales, whose right ids so make up for
        mistakes in earlier ones (bitwise self-correction, arXiv 2412.04431, for any codebook).
        """
        return quantizing.corrected(self, features, noise)

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
        (height, width), hits = self.layout.size, self.hits
        if not hits.is_cuda:
            return hits.new_zeros(batch_size, self.code_dim, height, width)
        zeros = hits.new_zeros(batch_size, height, width, self.code_dim)
        return rearrange(zeros, "b h w c -> b c h w")  # as a painter keeps it

    def grow(self, codes: Float[Tensor, "b n c"], step: int) -> Float[Tensor, "b c h w"]:
        """One step's codes as a map of full size, sharpened by its convolution."""
        maps = self.pyramid.grow(codes, step)
        if not self.phi_of_step:
            return maps
        return maps.lerp(self.phi[self.phi_of_step[step]](maps), self.params.quant_resi)

    def paint(
        self, canvas: Float[Tensor, "b c h w"], codes: Float[Tensor, "b n c"], step: int
    ) -> Float[Tensor, "b c h w"]:
        """The canvas with one step's codes grown and added; the one given is left as it was."""
        with sandbox.exact_float32(canvas.device):
            if painter := painter_for(canvas):
                matrices = self.pyramid.matrices("bicubic", step)
                return painter.paint(canvas, codes.float(), *matrices, self._phi(step))
            return canvas + self.grow(codes.float(), step)

    def context(self, canvas: Float[Tensor, "b c h w"], step: int) -> Float[Tensor, "b n c"]:
        """The canvas of the steps before, shrunk to this step's map; of an empty one, zeros."""
        with sandbox.exact_float32(canvas.device):
            if painter := painter_for(canvas):
                return painter.shrink(canvas, *self.pyramid.matrices("area", step))
            return rearrange(self.pyramid.shrink(canvas, step), "b c h w -> b (h w) c")

    def render(self, canvas: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """The images a canvas stands for, in [-1, 1]."""
        canvas = canvas if self.fused else canvas.contiguous()
        return sandbox.render(self.autoencoder, canvas, fused=self.fused)

    @torch.no_grad()
    def initialise(self, batches: Iterable[Float[Tensor, "b 3 H W"]]) -> None:
        """Place the codes by images' features, scale after scale.

        Raises ValueError where the codebook finds too few images, or features that are not finite.
        """
        features = torch.cat([self.features(images) for images in batches])
        quantizing.quantized(self, features, seed=True)

    def reconstruct(self, images: Float[Tensor, "b 3 H W"]) -> Reconstruction:
        """Encode, quantize, decode with gradients.

        The loss is the mean over scales of |f_k - sg f|^2 + beta |sg f_k - f|^2, where f_k is the
        canvas after scale k, and the codebook's own penalty. In training mode the codebook takes
        note of the batch.
        """
        features = self.features(images, self._encode if self.training else None)
        judge = self._judge if self.training else self._judged
        with sandbox.exact_float32(features.device):
            through, loss, ids, vectors = judge(features)
        if self.training:
            self.codebook.observe(vectors, [rows.flatten() for rows in ids])
            self._count(ids)
        decode = self._decode if self.training else self.autoencoder.decode
        return Reconstruction(decode(through), torch.cat(ids, dim=1), loss)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile what training runs: encoder, quantizer and decoder, each by itself."""
        kwargs = {"dynamic": False, **kwargs}
        self._encode = sandbox.compiled_method(self.autoencoder.encode, *args, **kwargs)
        self._decode = sandbox.compiled_method(self.autoencoder.decode, *args, **kwargs)
        self._judge = sandbox.compiled_method(self._judged, *args, **kwargs)

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
        features = self.features(images)
        canvases = quantizing.quantized(self, features).canvases
        missing = torch.stack([F.mse_loss(canvas, features) for canvas in canvases])
        return missing / features.var(correction=0)

    @torch.no_grad()
    def residual_vectors(self, images: Float[Tensor, "b 3 H W"]) -> list[Float[Tensor, "n c"]]:
        """What each scale's lookup sees: the features left over, shrunk to its cells."""
        return quantizing.quantized(self, self.features(images)).vectors

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

    def _judged(self, features: Float[Tensor, "b c h w"]) -> quantizing.Judged:
        return quantizing.judged(self, features)

    def _canvases(self, ids: Int[Tensor, "b l"]) -> Iterator[Float[Tensor, "b c h w"]]:
        """The canvas before each step, then the one after the last."""
        if ids.shape[1] != self.layout.seq_len:
            raise ValueError(f"expected {self.layout.seq_len} ids an image, got {ids.shape[1]}")
        canvas, codes = self.canvas(len(ids)), self.embed(ids)
        for step, span in enumerate(self.layout.spans):
            yield canvas
            canvas = self.paint(canvas, codes[:, span], step)
        yield canvas

    def _phi(self, step: int) -> tuple[Tensor, Tensor, float] | None:
        """The weights of a step's convolution and its share; None where there is none."""
        if not self.phi_of_step:
            return None
        conv = self.phi[self.phi_of_step[step]]
        return conv.weight, conv.bias, self.params.quant_resi

    @torch.no_grad()
    def _count(self, ids: list[Tensor]) -> None:
        """A moving average of how often each scale uses each code, as the published file keeps."""
        rows = torch.cat(
            [step_ids.flatten() + k * self.vocab_size for k, step_ids in enumerate(ids)]
        )
        counts = torch.zeros_like(self.hits).view(-1)
        counts.index_add_(0, rows, torch.ones_like(rows, dtype=counts.dtype))
        # Of the whole batch: training averages this over the processes, each of which saw a share.
        self.hits.lerp_(counts.view_as(self.hits) * sandbox.world_size(), 0.01)
