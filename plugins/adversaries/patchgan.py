"""PatchGAN: a small convolutional network that judges patches, for images of any size."""

from typing import Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from .duel import Discriminator, Duel, DuelParams, Verdict

Norm = Literal["spectral", "group"]


class PatchGan(Duel):
    """The discriminator of pix2pix (Isola et al. 2017, arXiv 1611.07004), sized for small images.

    Blocks of 4 x 4 convolutions, all but the last one strided, then one logit a place. A logit sees
    22 px with 3 blocks (32 px images), 46 px with 4 and 94 px with 5 (256 px images).
    """

    class Params(DuelParams):
        channels: int = Field(64, ge=8, multiple_of=8)
        """Channels of the first block; doubled from block to block, up to eight times as many."""
        num_layers: int = Field(3, ge=2, le=7)
        """Convolutional blocks; all but the last halve the map."""
        norm: Literal["spectral", "group"] = "spectral"
        """Spectral normalisation of the weights, or group normalisation of the features."""

    def __init__(self, params: Params, image_size: tuple[int, int]) -> None:
        if min(image_size) < 2**params.num_layers:
            height, width = image_size
            raise ValueError(
                f"adversary 'patchgan': {params.num_layers} layers need images of at least "
                f"{2**params.num_layers} px, these have {height} x {width}: lower num_layers"
            )
        super().__init__(params, _Patches(params.channels, params.num_layers, params.norm))


class _Patches(Discriminator):
    def __init__(self, channels: int, num_layers: int, norm: Norm) -> None:
        super().__init__()
        widths = [3, *(channels * min(8, 2**index) for index in range(num_layers))]
        self.blocks = nn.ModuleList(
            _block(
                widths[index],
                widths[index + 1],
                stride=1 if index == num_layers - 1 else 2,
                norm=norm,
                first=index == 0,
            )
            for index in range(num_layers)
        )
        self.head = normed(nn.Conv2d(widths[-1], 1, 1), norm)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Verdict:
        features, maps = images, []
        for block in self.blocks:
            features = block(features)
            maps.append(features)
        return Verdict(self.head(features).flatten(1), maps)


def _block(before: int, after: int, stride: int, norm: Norm, first: bool) -> nn.Sequential:
    layers: list[nn.Module] = [normed(nn.Conv2d(before, after, 4, stride, padding=1), norm)]
    if norm == "group" and not first:
        layers.append(nn.GroupNorm(8, after))
    return nn.Sequential(*layers, nn.LeakyReLU(0.2))


def normed(layer: nn.Module, norm: Norm) -> nn.Module:
    """The layer under spectral normalisation (arXiv 1802.05957), where that is the norm."""
    return spectral_norm(layer) if norm == "spectral" else layer
