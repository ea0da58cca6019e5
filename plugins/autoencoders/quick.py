"""The autoencoder `cnn` on a GPU, without gradients: convolutions, and kernels between them.

The one idea to hold: a convolution of the library's adds nothing. What it would add, and what
stands beside its branch, is handed on as a `Sum`, which whatever reads it next adds up as it reads.
Large maps are strips, whose convolutions do that themselves. Nothing but what finishes a norm's
moments is compiled for a size, and a map is doubled within the convolution that reads it.

Imported only for maps on a GPU, as its kernels are.
"""

from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from . import strips
from .convolving import convolved, convolved_doubled, entered, suits
from .interleaving import interleave
from .leaving import left
from .norms import Sum, added, normed

if TYPE_CHECKING:
    from .cnn import CNN, Level, Mid
    from .layers import Attention, ResBlock, Upsample


def encode(cnn: "CNN", images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b c h w"]:
    """`CNN.encode`, of images in any order of memory, in the type of the convolutions' weights."""
    encoder = cnn.encoder
    maps = _entered(encoder.conv_in, images.to(encoder.conv_in.weight.dtype))
    for level in encoder.down:
        maps = _level(level, maps)
        if isinstance(level.downsample, nn.Identity):
            continue
        conv = level.downsample.conv
        maps = Sum(_product(added(maps, pad=True), conv.weight, stride=2), conv.bias)
    _, read = normed(_middle(encoder.mid, maps), encoder.norm_out, silu=True)
    return cnn.quant_conv(encoder.conv_out(read))


def decode(
    cnn: "CNN", features: Float[Tensor, "b c h w"], doubled: "dict[Upsample, Tensor]"
) -> Float[Tensor, "b 3 H W"]:
    """`CNN.decode`, in the type of the convolutions' weights, with those of `double`."""
    decoder = cnn.decoder
    maps = _convolved(decoder.conv_in, cnn.post_quant_conv(_laid_out(features, decoder.conv_in)))
    maps = _middle(decoder.mid, maps)
    for level in reversed(decoder.up):
        maps = _level(level, maps)
        if not isinstance(level.upsample, nn.Identity):
            maps = _doubled(maps, doubled[level.upsample], level.upsample.conv.bias)
    if strips.is_strip(maps.first):
        return left(maps, decoder.norm_out, decoder.conv_out)
    _, read = normed(maps, decoder.norm_out, silu=True)
    return decoder.conv_out(read)


def _entered(conv: nn.Conv2d, images: Float[Tensor, "b 3 H W"]) -> Sum:
    if suits(images):
        return entered(images, conv.weight, conv.bias)
    images, weight = _widened(images), _widened(conv.weight)
    return Sum(_product(images, weight, padding=conv.padding), conv.bias)


def _doubled(maps: Sum, weight: Float[Tensor, "four_e d 2 2"], bias: Float[Tensor, " e"]) -> Sum:
    if suits(maps.first, times=2):
        return convolved_doubled(added(maps, strip=True), weight, bias)
    return Sum(interleave(F.conv2d(added(maps), weight, padding=1)), bias)


def _middle(mid: "Mid", maps: Sum) -> Sum:
    return _block(mid.block_2, _attended(mid.attn_1, _block(mid.block_1, maps)))


def _level(level: "Level", maps: Sum) -> Sum:
    for block, attn in zip(level.block, level.attn, strict=True):
        maps = _attended(attn, _block(block, maps))
    return maps


def _block(block: "ResBlock", maps: Sum) -> Sum:
    strip = suits(maps.first)
    x, read = normed(maps, block.norm1, silu=True, strip=strip)
    _, read = normed(_convolved(block.conv1, read), block.norm2, silu=True, strip=strip)
    return _convolved(block.conv2, read, _beside(block, x))


def _beside(block: "ResBlock", x: Sum) -> Sum:
    """The block's shortcut."""
    if isinstance(block.nin_shortcut, nn.Identity):
        return x
    weight, bias = block.nin_shortcut.weight, block.nin_shortcut.bias
    if x.first_bias is not None:
        bias = F.linear(x.first_bias, weight.flatten(1), bias)
    convolve = strips.pointwise if strips.is_strip(x.first) else _product
    return Sum(convolve(x.first, weight), bias)


def _attended(attn: "Attention | nn.Identity", maps: Sum) -> Sum:
    if isinstance(attn, nn.Identity):
        return maps
    if strips.is_strip(maps.first):
        maps = Sum(added(maps))
    x, read = normed(maps, attn.norm, silu=False)
    q, k, v = rearrange(attn.qkv(read), "b (qkv d) h w -> qkv b (h w) d", qkv=3)
    weights = (torch.bmm(q, k.mT) * q.shape[2] ** -0.5).softmax(dim=2, dtype=torch.float32)
    seen = rearrange(torch.bmm(weights.to(v.dtype), v), "b (h w) d -> b d h w", h=read.shape[2])
    return Sum(*x[:2], _product(seen, attn.proj_out.weight), attn.proj_out.bias)


def _convolved(conv: nn.Conv2d, maps: Float[Tensor, "b d h w"], beside: Sum | None = None) -> Sum:
    if strips.is_strip(maps):
        return convolved(maps, conv.weight, conv.bias, beside)
    branch = _product(maps, conv.weight, padding=conv.padding), conv.bias
    return Sum(*branch) if beside is None else Sum(*beside[:2], *branch)


def _product(maps: Tensor, weight: Tensor, **how: Any) -> Tensor:
    """The convolution, channels together, as cuDNN leaves them and others may not."""
    return F.conv2d(maps, weight, **how).contiguous(memory_format=torch.channels_last)


def _widened(maps: Tensor) -> Tensor:
    """With channels of 0 to make it 8, where numbers have 16 bits: there all kernels want that."""
    missing = -maps.shape[1] % 8 if maps.element_size() == 2 else 0
    return F.pad(maps, (0, 0, 0, 0, 0, missing)).contiguous(memory_format=torch.channels_last)


def _laid_out(maps: Tensor, conv: nn.Conv2d) -> Tensor:
    return maps.to(conv.weight.dtype, memory_format=torch.channels_last)
