"""Autoencoders: images to a feature map and back. The quantizers stand between the two halves.

`cnn` is the published one, name for name: its state dict is that of the VAR tokenizer's encoder,
decoder and the two convolutions around the quantizer. `patch` is a small one for laptops.
"""

from collections import OrderedDict
from collections.abc import Callable

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

import sandbox

NUM_GROUPS = 32
"""Of the group normalisations of `cnn`, as published."""


class CNN(nn.Module):
    """The convolutional autoencoder of VQGAN (arXiv 2012.09841) as VAR uses it (2404.02905)."""

    class Params(sandbox.Params):
        ch: int = Field(160, ge=32)
        """Channels at full resolution; a multiple of 32."""
        ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
        """Channels per resolution, in multiples of `ch`; each but the first halves the sides."""
        num_res_blocks: int = Field(2, ge=1)
        """Residual blocks per resolution; the decoder has one more."""
        attention: bool = True
        """Self-attention at the lowest resolution."""
        code_dim: int = Field(32, ge=1)
        """Channels of the feature map, and so of the codes."""
        dropout: float = Field(0.0, ge=0, lt=1)
        """In the residual blocks, while training."""

        @field_validator("ch")
        @classmethod
        def _must_split_into_groups(cls, ch: int) -> int:
            if ch % NUM_GROUPS:
                raise ValueError(
                    f"ch must be a multiple of {NUM_GROUPS}, the number of groups that are "
                    f"normalised together, got {ch}"
                )
            return ch

        @field_validator("ch_mult")
        @classmethod
        def _must_be_positive(cls, ch_mult: tuple[int, ...]) -> tuple[int, ...]:
            if not ch_mult or min(ch_mult) < 1:
                raise ValueError("ch_mult needs at least one number, each 1 or more")
            return ch_mult

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.code_dim = params.code_dim
        self.downsample = 2 ** (len(params.ch_mult) - 1)
        self.encoder, self.decoder = Encoder(params), Decoder(params)
        self.quant_conv = _conv3(self.code_dim, self.code_dim)
        self.post_quant_conv = _conv3(self.code_dim, self.code_dim)

    def encode(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        return self.quant_conv(self.encoder(images))

    def decode(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        return self.decoder(self.post_quant_conv(features))


class Encoder(nn.Module):
    """Residual blocks at falling resolutions, `mid` at the lowest."""

    def __init__(self, params: CNN.Params) -> None:
        super().__init__()
        widths = [params.ch * multiple for multiple in params.ch_mult]
        self.conv_in = _conv3(3, params.ch)
        self.down, last = nn.ModuleList(), params.ch
        for index, width in enumerate(widths):
            lowest = index == len(widths) - 1
            level = Level(last, width, params.num_res_blocks, params, lowest)
            if not lowest:
                level.downsample = Downsample(width)
            self.down.append(level)
            last = width
        self.mid = Mid(last, params)
        self.norm_out, self.conv_out = _norm(last), _conv3(last, params.code_dim)

    def forward(self, x: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """The encoder backwards: `up[i]` works at the resolution of `down[i]`, last to first."""

    def __init__(self, params: CNN.Params) -> None:
        super().__init__()
        widths = [params.ch * multiple for multiple in params.ch_mult]
        last = widths[-1]
        self.conv_in = _conv3(params.code_dim, last)
        self.mid = Mid(last, params)
        levels: list[Level] = []
        for index in reversed(range(len(widths))):
            lowest = index == len(widths) - 1
            level = Level(last, widths[index], params.num_res_blocks + 1, params, lowest)
            if index > 0:
                level.upsample = Upsample(widths[index])
            levels.insert(0, level)
            last = widths[index]
        self.up = nn.ModuleList(levels)
        self.norm_out, self.conv_out = _norm(last), _conv3(last, 3)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Level(nn.Module):
    """The blocks of one resolution (attention follows each at the lowest); a change of size."""

    def __init__(
        self, width_in: int, width: int, num_blocks: int, params: CNN.Params, lowest: bool
    ) -> None:
        super().__init__()
        self.block, self.attn = nn.ModuleList(), nn.ModuleList()
        self.downsample: nn.Module = nn.Identity()
        self.upsample: nn.Module = nn.Identity()
        for index in range(num_blocks):
            self.block.append(ResBlock(width if index else width_in, width, params.dropout))
            attend = lowest and params.attention
            self.attn.append(Attention(width) if attend else nn.Identity())

    def forward(self, x: Float[Tensor, "b d h w"]) -> Tensor:
        for block, attn in zip(self.block, self.attn, strict=True):
            x = attn(block(x))
        return self.upsample(self.downsample(x))


class Mid(nn.Module):
    """The middle of either half."""

    def __init__(self, width: int, params: CNN.Params) -> None:
        super().__init__()
        self.block_1 = ResBlock(width, width, params.dropout)
        self.attn_1 = Attention(width) if params.attention else nn.Identity()
        self.block_2 = ResBlock(width, width, params.dropout)

    def forward(self, x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h w"]:
        return self.block_2(self.attn_1(self.block_1(x)))


class ResBlock(nn.Module):
    """Two normalised convolutions beside a shortcut."""

    def __init__(self, width_in: int, width: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(width_in), _conv3(width_in, width)
        self.norm2, self.conv2 = _norm(width), _conv3(width, width)
        self.dropout = nn.Dropout(dropout)
        self.nin_shortcut = nn.Identity() if width_in == width else nn.Conv2d(width_in, width, 1)

    def forward(self, x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b e h w"]:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.nin_shortcut(x) + h


class Attention(nn.Module):
    """Every cell looks at every cell, with one head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _norm(width)
        self.qkv, self.proj_out = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

    def forward(self, x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h w"]:
        q, k, v = rearrange(self.qkv(self.norm(x)), "b (qkv d) h w -> qkv b d (h w)", qkv=3)
        # Spelled out as published: a fused kernel rounds otherwise, and now and then that is enough
        # to make another code the nearest.
        weights = (torch.bmm(q.mT, k) * q.shape[1] ** -0.5).softmax(dim=2)
        seen = torch.bmm(v, weights.mT)
        return x + self.proj_out(rearrange(seen, "b d (h w) -> b d h w", h=x.shape[2]))


class Downsample(nn.Module):
    """Halves the sides; zeros are added below and to the right only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Float[Tensor, "b d h w"]) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the sides."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = _conv3(width, width)

    def forward(self, x: Float[Tensor, "b d h w"]) -> Tensor:
        return self.conv(_doubled(x))


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
            conv_in=_conv3(patch_dim, ch),
            block=nn.Sequential(*(SmallBlock(ch) for _ in range(params.num_res_blocks))),
            conv_out=_conv3(ch, params.code_dim),
        )
        self.decoder = _stack(
            conv_in=_conv3(params.code_dim, ch),
            block=nn.Sequential(*(SmallBlock(ch) for _ in range(params.num_res_blocks + 1))),
            conv_out=_conv3(ch, patch_dim),
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
        self.norm1, self.conv1 = nn.GroupNorm(num_groups, width), _conv3(width, width)
        self.norm2, self.conv2 = nn.GroupNorm(num_groups, width), _conv3(width, width)

    def forward(self, x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h w"]:
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


def _conv3(width_in: int, width: int) -> nn.Conv2d:
    return nn.Conv2d(width_in, width, 3, padding=1)


def _norm(width: int) -> nn.GroupNorm:
    return GroupNorm(NUM_GROUPS, width, eps=1e-6)


class GroupNorm(nn.GroupNorm):
    """The same, but spelled out where it is compiled.

    The compiler's own version flattens a group, which copies every channels-last map to and fro:
    one fifth of a training step.
    """

    def forward(self, x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h w"]:
        if not torch.compiler.is_compiling():
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            groups = x.float().unflatten(1, (self.num_groups, -1))
            variance, mean = torch.var_mean(groups, dim=(2, 3, 4), correction=0, keepdim=True)
            normal = ((groups - mean) * torch.rsqrt(variance + self.eps)).flatten(1, 2)
            return normal * self.weight[:, None, None] + self.bias[:, None, None]


def _doubled(x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d hh ww"]:
    """Every pixel four times; the compiled backward pass is then a sum, not a scatter."""
    if not torch.compiler.is_compiling():
        return F.interpolate(x, scale_factor=2, mode="nearest")
    return repeat(x, "b d h w -> b d (h 2) (w 2)")


def _stack(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


@sandbox.hookimpl
def sandbox_register(register: Callable[..., None]) -> None:
    register(sandbox.Autoencoder, "cnn", CNN)
    register(sandbox.Autoencoder, "patch", Patch)
