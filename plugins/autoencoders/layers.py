"""What `cnn` is made of, with the published names."""

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

NUM_GROUPS = 32
"""Of the group normalisations of `cnn`, as published."""


class ResBlock(nn.Module):
    """Two normalised convolutions beside a shortcut."""

    def __init__(self, width_in: int, width: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.conv1 = normalisation(width_in), conv3(width_in, width)
        self.norm2, self.conv2 = normalisation(width), conv3(width, width)
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
        self.norm = normalisation(width)
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
        self.conv = conv3(width, width)

    def forward(self, x: Float[Tensor, "b d h w"]) -> Tensor:
        return self.conv(_doubled(x))


class GroupNorm(nn.GroupNorm):
    """The same, but spelled out where it is compiled: channel by channel, then over a group's.

    The compiler's own version flattens a group, which copies every channels-last map to and fro:
    one fifth of a training step. A channel's moments are read along memory in either order.
    """

    def forward(self, x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h w"]:
        if not torch.compiler.is_compiling():
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            variances, means = torch.var_mean(x.float(), dim=(2, 3), correction=0)
            of_groups = [each.unflatten(1, (self.num_groups, -1)) for each in (variances, means)]
            between, mean = torch.var_mean(of_groups[1], dim=2, correction=0, keepdim=True)
            variance = of_groups[0].mean(dim=2, keepdim=True) + between
            normal = torch.rsqrt(variance + self.eps)
            scale = self.weight.unflatten(0, (self.num_groups, -1)) * normal
            shift = self.bias.unflatten(0, (self.num_groups, -1)) - mean * scale
            scale, shift = (each.flatten(1)[:, :, None, None] for each in (scale, shift))
            return x.float() * scale + shift


def _doubled(x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d hh ww"]:
    """Every pixel four times; the compiled backward pass is then a sum, not a scatter."""
    if not torch.compiler.is_compiling():
        return F.interpolate(x, scale_factor=2, mode="nearest")
    return repeat(x, "b d h w -> b d (h 2) (w 2)")


def conv3(width_in: int, width: int) -> nn.Conv2d:
    """A 3 x 3 convolution that keeps the size."""
    return nn.Conv2d(width_in, width, 3, padding=1)


def normalisation(width: int) -> nn.GroupNorm:
    """Over `NUM_GROUPS` groups of channels."""
    return GroupNorm(NUM_GROUPS, width, eps=1e-6)
