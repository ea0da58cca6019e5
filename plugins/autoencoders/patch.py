"""The autoencoder `patch`, a small one for laptops."""

from collections import OrderedDict

from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

import sandbox

from .layers import GroupNorm, conv3


class Patch(nn.Module):
    """Patches as channels, then residual blocks that keep the size: fast on two cores."""

    class Params(sandbox.Params):
        patch: int = Field(4, ge=1)
        """Pixels that a cell's side covers."""
        ch: int = Field(32, ge=4, multiple_of=4)
        """Channels of the blocks; a multiple of 4."""
        num_res_blocks: int = Field(2, ge=0)
        """Residual blocks of the encoder; the decoder has one more."""
        code_dim: int = Field(8, ge=1)
        """Channels of the feature map, and so of the codes."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.code_dim, self.downsample = params.code_dim, params.patch
        ch, patch_dim = params.ch, 3 * params.patch**2
        self.encoder = _stack(
            unshuffle=nn.PixelUnshuffle(params.patch),
            conv_in=conv3(patch_dim, ch),
            block=nn.Sequential(*(SmallBlock(ch) for _ in range(params.num_res_blocks))),
            conv_out=conv3(ch, params.code_dim),
        )
        self.decoder = _stack(
            conv_in=conv3(params.code_dim, ch),
            block=nn.Sequential(*(SmallBlock(ch) for _ in range(params.num_res_blocks + 1))),
            conv_out=conv3(ch, patch_dim),
            shuffle=nn.PixelShuffle(params.patch),
        )

    def encode(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        return self.encoder(images)

    def decode(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        return self.decoder(features)


class SmallBlock(nn.Module):
    """Two normalised convolutions beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        num_groups = width // 4
        self.norm1, self.conv1 = GroupNorm(num_groups, width), conv3(width, width)
        self.norm2, self.conv2 = GroupNorm(num_groups, width), conv3(width, width)

    def forward(self, x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h w"]:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


def _stack(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))
