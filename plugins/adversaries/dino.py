"""A discriminator that sees what DINO sees: small heads on the tokens of a frozen transformer.

The transformer's weights are a file that the recipe names; it is never trained, and gradients pass
through it to the reconstruction.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

import sandbox

from .duel import Discriminator, Duel, DuelParams, Verdict
from .patchgan import Norm, normed


class Dino(Duel):
    """Convolutional heads on four depths of a frozen DINO ViT-S/16 (arXiv 2104.14294).

    Heads on frozen tokens are StyleGAN-T's idea (arXiv 2301.09515); these are smaller.
    """

    class Params(DuelParams):
        weights: str
        """The transformer's: a file in timm's or Facebook's layout, hf://... or package://..."""
        model: str = "vit_small_patch16_224.dino"
        """timm's name of its architecture, any plain vision transformer."""
        depths: tuple[int, ...] = Field((2, 5, 8, 11), min_length=1)
        """Blocks, from 0, after which a head reads the tokens."""
        input_px: int = Field(128, ge=16)
        """The shorter side that images are resized to; a multiple of the model's patch."""
        channels: int = Field(64, ge=8, multiple_of=8)
        """Channels of the heads."""
        norm: Literal["spectral", "group"] = "spectral"
        """Spectral normalisation of the heads' weights, or group normalisation of features."""

    def __init__(self, params: Params, image_size: tuple[int, int]) -> None:
        transformer = _transformer(params)
        _load(transformer, params.weights)
        patch = transformer.patch_embed.patch_size[0]
        scale = params.input_px / min(image_size)
        size = tuple(max(1, round(side * scale / patch)) * patch for side in image_size)
        super().__init__(params, _Heads(params, transformer, size))


class _Heads(Discriminator):
    def __init__(self, params: Dino.Params, transformer: Any, size: tuple[int, int]) -> None:
        super().__init__()
        self.size, self.depths = size, list(params.depths)
        self.transformer = transformer.eval().requires_grad_(False)
        self.heads = nn.ModuleList(
            _Head(transformer.embed_dim, params.channels, params.norm) for _ in params.depths
        )
        for name in ("mean", "std"):  # of images in [0, 1]
            values = torch.tensor(transformer.pretrained_cfg[name]).view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def train(self, mode: bool = True) -> "_Heads":
        super().train(mode)
        self.transformer.eval()
        return self

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Verdict:
        images = ((images + 1) / 2 - self.mean) / self.std
        images = F.interpolate(images, self.size, mode="bilinear", antialias=True)
        maps = self.transformer.forward_intermediates(
            images, indices=self.depths, intermediates_only=True
        )
        logits = [head(features) for head, features in zip(self.heads, maps, strict=True)]
        return Verdict(torch.cat(logits, dim=1), maps)


class _Head(nn.Module):
    """A projection, a residual 3 x 3 convolution, and one logit a token."""

    def __init__(self, width: int, channels: int, norm: Norm) -> None:
        super().__init__()
        self.project = _layer(width, channels, 1, norm)
        self.mix = _layer(channels, channels, 3, norm)
        self.logit = normed(nn.Conv2d(channels, 1, 1), norm)

    def forward(self, features: Float[Tensor, "b d h w"]) -> Float[Tensor, "b l"]:
        features = self.project(features)
        return self.logit((features + self.mix(features)) * 0.5**0.5).flatten(1)


def _layer(before: int, after: int, kernel: int, norm: Norm) -> nn.Sequential:
    layers = [normed(nn.Conv2d(before, after, kernel, padding=kernel // 2), norm)]
    if norm == "group":
        layers.append(nn.GroupNorm(8, after))
    return nn.Sequential(*layers, nn.LeakyReLU(0.2))


def _transformer(params: Dino.Params) -> Any:
    where = "adversary 'dino'"
    try:
        transformer = timm.create_model(
            params.model, pretrained=False, num_classes=0, dynamic_img_size=True
        )
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{where}: timm has no plain vision transformer {params.model!r} ({error})"
        ) from None
    patch, num_blocks = transformer.patch_embed.patch_size[0], len(transformer.blocks)
    if params.input_px % patch:
        raise ValueError(
            f"{where}: input_px {params.input_px} is no multiple of the patch, {patch}"
        )
    rising = list(params.depths) == sorted(set(params.depths))
    if not rising or params.depths[0] < 0 or params.depths[-1] >= num_blocks:
        raise ValueError(
            f"{where}: depths are rising numbers from 0 to {num_blocks - 1}, got {params.depths}"
        )
    return transformer


class _Published(nn.Module):
    """A transformer under the names of published files, which it translates."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def from_published(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """timm's names and Facebook's are the same, but for prefixes and a head not needed here."""
        named = {}
        for name, tensor in state.items():
            name = name.removeprefix("module.").removeprefix("backbone.")
            if not name.startswith("head."):
                named[f"transformer.{name}"] = tensor
        return named


def _load(transformer: nn.Module, source: str) -> None:
    where = "adversary 'dino': weights"
    if "://" not in source and not Path(source.partition("#sha256=")[0]).is_file():
        raise sandbox.SandboxError(
            f"{where}: {source}: no such file; set it to dino_deitsmall16_pretrain.pth, to timm's "
            "model.safetensors, or to hf://timm/vit_small_patch16_224.dino/model.safetensors"
        )
    try:
        sandbox.load_weights(_Published(transformer), source, "features")
    except sandbox.SandboxError as error:
        raise sandbox.SandboxError(f"{where}: {error}") from None
