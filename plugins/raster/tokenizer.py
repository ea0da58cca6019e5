"""The single-scale tokenizer behind raster-scan prediction: one code a cell of one map.

Same slots as the multi-scale tokenizer, so that a comparison changes the schedule and the tokenizer
and nothing else. A step's context is the code of the step before it.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

import sandbox
from sandbox import Layout, Part, Reconstruction


class RasterTokenizer(nn.Module):
    """Vector quantization (VQ-VAE, arXiv 1711.00937) of an autoencoder's features."""

    class Params(sandbox.Params):
        autoencoder: Part[sandbox.Autoencoder]
        """Makes the feature map and the image."""
        codebook: Part[sandbox.Codebook]
        """The codes."""
        schedule: Part[sandbox.ScaleSchedule]
        """The order of the cells; its map has the size of the feature map."""
        beta: float = Field(0.25, ge=0)
        """Weight of the commitment loss, which pulls features towards their codes."""
        lookup_noise: float = Field(0.0, ge=0)
        """In training, most noise, over the root mean square of the features, in the lookup of the
        codes that are decoded; how much is drawn for each image. The decoder learns to make do with
        codes that are not the right ones, as a generator's are (RobustTok, arXiv 2503.08354)."""

        @field_validator("schedule")
        @classmethod
        def _must_fill_cell_by_cell(
            cls, schedule: Part[sandbox.ScaleSchedule]
        ) -> Part[sandbox.ScaleSchedule]:
            layout = schedule.build().layout()
            cells = [cell for step in layout.steps for cell in step.cells]
            whole = sorted(cells) == list(range(layout.size[0] * layout.size[1]))
            if not whole or layout != Layout.raster(*layout.size, cells):
                raise ValueError(
                    f"schedule {schedule.name!r} does not fill one map cell by cell, which "
                    "`raster-vq` needs (for growing maps use `var-vq`)"
                )
            return schedule

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.params, self.layout = params, params.schedule.build().layout()
        self.autoencoder = params.autoencoder.build()
        self.code_dim = self.autoencoder.code_dim
        self.codebook = params.codebook.build(self.code_dim)
        self.vocab_size = self.codebook.vocab_size
        height, width = (cells * self.autoencoder.downsample for cells in self.layout.size)
        self.image_size = (height, width)
        self.order: Tensor
        order = torch.tensor([step.cells[0] for step in self.layout.steps])
        self.register_buffer("order", order, persistent=False)
        self._encode: Callable[..., Tensor] = self.autoencoder.encode
        self._decode: Callable[..., Tensor] = self.autoencoder.decode
        self._judge: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = self._judged
        self.fused = False

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "b 3 H W"]) -> Int[Tensor, "b l"]:
        """Raises ValueError unless the images have `image_size`."""
        return self._quantize(self.features(images))[:, self.order]

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
        """Ids of a disturbed lookup, and the right ones.

        What is looked up gets Gaussian noise of `noise` times its root mean square.
        """
        maps = (_disturbed(features, noise).float(), features.float())
        found, right = (self._quantize(each)[:, self.order] for each in maps)
        return found, right

    @torch.no_grad()
    def decode(self, ids: Int[Tensor, "b l"]) -> Float[Tensor, "b 3 H W"]:
        if ids.shape[1] != self.layout.seq_len:
            raise ValueError(f"expected {self.layout.seq_len} ids an image, got {ids.shape[1]}")
        return self.render(self._maps(ids[:, self.order.argsort()]))

    @torch.no_grad()
    def contexts(self, ids: Int[Tensor, "b l"]) -> Float[Tensor, "b l c"]:
        """What the backbone reads at every token, when all earlier ids are known."""
        return F.pad(self.embed(ids[:, :-1]), (0, 0, 1, 0))

    def embed(self, ids: Int[Tensor, "*axes"]) -> Float[Tensor, "*axes c"]:
        return self.codebook.embed(ids)

    def canvas(self, batch_size: int) -> Float[Tensor, "b c h w"]:
        """An empty canvas."""
        size = (batch_size, self.code_dim, *self.layout.size)
        return torch.zeros(size, device=self.order.device)

    def paint(
        self, canvas: Float[Tensor, "b c h w"], codes: Float[Tensor, "b 1 c"], step: int
    ) -> Float[Tensor, "b c h w"]:
        """The canvas with one cell filled; the one given is left as it was."""
        row, column = self._cell(step)
        painted = canvas.clone()
        painted[:, :, row, column] = codes[:, 0].float()
        return painted

    def context(self, canvas: Float[Tensor, "b c h w"], step: int) -> Float[Tensor, "b 1 c"]:
        """The code in the cell that was filled last; zeros at the first step."""
        if step == 0:
            return canvas.new_zeros(len(canvas), 1, self.code_dim)
        row, column = self._cell(step - 1)
        return canvas[:, None, :, row, column]

    def render(self, canvas: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        """The images a canvas stands for, in [-1, 1]."""
        return sandbox.render(self.autoencoder, canvas, fused=self.fused)

    @torch.no_grad()
    def initialise(self, batches: Iterable[Float[Tensor, "b 3 H W"]]) -> None:
        """Place the codes by images' features. Raises ValueError where there are too few."""
        features = torch.cat([self.features(images) for images in batches])
        self.codebook.seed(rearrange(features, "b c h w -> (b h w) c"), 0, 1)

    def reconstruct(self, images: Float[Tensor, "b 3 H W"]) -> Reconstruction:
        """Encode, quantize, decode with gradients (straight through the codes).

        The loss is |q - sg f|^2 + beta |sg q - f|^2 and the codebook's own penalty. In training
        mode the codebook takes note of the batch.
        """
        features = self.features(images, self._encode if self.training else None)
        judge = self._judge if self.training else self._judged
        with sandbox.exact_float32(features.device):
            through, loss, ids, vectors = judge(features)
        if self.training:
            self.codebook.observe([vectors], [ids.flatten()])
        decode = self._decode if self.training else self.autoencoder.decode
        return Reconstruction(decode(through), ids[:, self.order], loss)

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
    def residual_energy(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, " 1"]:
        """The share of the features' variance that the codes miss."""
        features = self.features(images)
        missing = F.mse_loss(self._maps(self._quantize(features)), features)
        return (missing / features.var(correction=0))[None]

    @torch.no_grad()
    def residual_vectors(self, images: Float[Tensor, "b 3 H W"]) -> list[Float[Tensor, "n c"]]:
        """What the lookup sees, as one scale."""
        return [rearrange(self.features(images), "b c h w -> (b h w) c")]

    def _judged(
        self, features: Float[Tensor, "b c h w"]
    ) -> tuple[Tensor, Tensor, Tensor, Float[Tensor, "n c"]]:
        """What the decoder reads, the quantizer's loss, the ids, and the vectors looked up."""
        ids = self._quantize(features)
        codes = self._maps(ids)
        if self.training and self.params.lookup_noise:
            noise = self.params.lookup_noise * torch.rand(len(features), device=features.device)
            codes = self._maps(self._quantize(_disturbed(features, noise)))
        loss = F.mse_loss(codes, features.detach())
        loss = loss + self.params.beta * F.mse_loss(codes.detach(), features)
        vectors = rearrange(features, "b c h w -> (b h w) c")
        if penalty := getattr(self.codebook, "penalty", None):
            loss = loss + penalty([vectors])
        return features + (codes - features).detach(), loss, ids, vectors.detach()

    def _quantize(self, features: Float[Tensor, "b c h w"]) -> Int[Tensor, "b n"]:
        """The nearest code of every cell, row by row."""
        ids = self.codebook.nearest(rearrange(features.detach(), "b c h w -> (b h w) c"))
        return rearrange(ids, "(b n) -> b n", b=len(features))

    def _maps(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b c h w"]:
        """Codes of ids that stand row by row."""
        return rearrange(self.embed(ids), "b (h w) c -> b c h w", h=self.layout.size[0])

    def _cell(self, step: int) -> tuple[int, int]:
        return divmod(self.layout.steps[step].cells[0], self.layout.size[1])


def _disturbed(
    features: Float[Tensor, "b c h w"], noise: Float[Tensor, " b"]
) -> Float[Tensor, "b c h w"]:
    """The features and Gaussian noise: an image's `noise` times their root mean square."""
    strength = noise[:, None, None, None] * features.square().mean().sqrt()
    return features + strength * torch.randn_like(features)
