"""The autoencoder `cnn`, the published one, name for name.

Its state dict is that of the VAR tokenizer's encoder, decoder and the two convolutions around the
quantizer.
"""

from functools import cache
from types import ModuleType

import torch
from einops import rearrange
from jaxtyping import Float
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

import sandbox

from .doubling import double
from .layers import NUM_GROUPS, Attention, Downsample, ResBlock, Upsample, conv3, normalisation


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
        self.quant_conv = conv3(self.code_dim, self.code_dim)
        self.post_quant_conv = conv3(self.code_dim, self.code_dim)
        self._doubled: dict[Upsample, Tensor] | None = None

    def encode(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
        if self._doubled is not None and not self.training:
            from . import quick

            return quick.encode(self, images)
        return self.quant_conv(self.encoder(images))

    def decode(self, features: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 H W"]:
        if self._doubled is not None and not self.training:
            from . import quick

            return quick.decode(self, features, self._doubled)
        return self.decoder(self.post_quant_conv(features))

    def quicken(self) -> bool:
        """Code by the kernels of `quick` from now on, with the weights as they are: on a GPU only.

        Called again, it takes note of weights that have changed.
        """
        first = self.quant_conv.weight
        if _quick(first.device, first.dtype) is None:
            return False
        ups = [each for each in self.modules() if isinstance(each, Upsample)]
        doubled = {up: double(up.conv.weight) for up in ups}
        if self._doubled is None:
            self._doubled = doubled
        else:
            for up, kept in self._doubled.items():  # recordings read where they lie
                kept.copy_(doubled[up])
        return True


@cache
def _quick(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """The module `quick`, after a trial: triton may be missing, or the compiler that it needs."""
    if device.type != "cuda" or dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return None

    def trial() -> ModuleType:
        from . import quick

        norm = normalisation(2 * NUM_GROUPS).to(device)
        for side in (2, 160):  # held by a program, and shared by several
            zeros = torch.zeros(1, side, side, 2 * NUM_GROUPS, dtype=dtype, device=device)
            maps = rearrange(zeros, "b h w d -> b d h w")
            terms, _ = quick.normed(quick.Sum(maps, None, maps), norm, silu=True)
            quick.added(terms, pad=True)
        quick.interleave(maps)
        return quick

    return sandbox.tried(trial, "an autoencoder without its Triton kernels")


class Encoder(nn.Module):
    """Residual blocks at falling resolutions, `mid` at the lowest."""

    def __init__(self, params: CNN.Params) -> None:
        super().__init__()
        widths = [params.ch * multiple for multiple in params.ch_mult]
        self.conv_in = conv3(3, params.ch)
        self.down, last = nn.ModuleList(), params.ch
        for index, width in enumerate(widths):
            lowest = index == len(widths) - 1
            level = Level(last, width, params.num_res_blocks, params, lowest)
            if not lowest:
                level.downsample = Downsample(width)
            self.down.append(level)
            last = width
        self.mid = Mid(last, params)
        self.norm_out, self.conv_out = normalisation(last), conv3(last, params.code_dim)

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
        self.conv_in = conv3(params.code_dim, last)
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
        self.norm_out, self.conv_out = normalisation(last), conv3(last, 3)

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
