"""Whether a block's products are with so few tokens that kernels of their own are faster.

The one idea to hold: sizes and types decide, and one trial for each plan that the kernels have, so
that whatever they need was built before a recording begins.
"""

from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

import sandbox

if TYPE_CHECKING:
    from .blocks import Block

LIMIT = 32
"""Tokens of all images; with more, the library's products are faster."""
WIDEST = 1280
"""Channels of tokens; with more the library's are faster, too (tried: 1,024 and 1,920)."""
CHUNK = 128
"""Widths are multiples of it."""


def products_for(
    block: "Block", tokens: int, modulation: Float[Tensor, "b 1 6 d"]
) -> ModuleType | None:
    """The module `skinny`, where it can compute what this block makes of so many tokens to draw.

    Tokens of all images together; they are of the modulation's type.
    """
    dtype, width, fc1 = modulation.dtype, modulation.shape[-1], block.ffn.fc1
    if tokens > LIMIT or block.training or dtype not in (torch.float16, torch.bfloat16):
        return None
    if fc1.weight.dtype != dtype or modulation.stride(-1) != 1:
        return None
    if width > WIDEST or width % CHUNK or len(fc1.weight) % CHUNK:
        return None
    heads = block.attn.num_heads
    return _skinny(modulation.device, dtype, padded(tokens), heads, width, len(fc1.weight))


def padded(tokens: int) -> int:
    """Rounded up to what a matrix unit takes, in few kinds: each is built by itself."""
    return 16 if tokens <= 16 else LIMIT


@cache
def _skinny(
    device: torch.device, dtype: torch.dtype, tokens: int, heads: int, width: int, mlp_width: int
) -> ModuleType | None:
    """The module `skinny`, after a trial of a block's four products: triton may be missing, the
    compiler that it needs, or a processor with enough memory of its own."""

    def trial() -> ModuleType:
        from . import skinny

        zeros = torch.zeros(max(3 * width, mlp_width) * width, dtype=dtype, device=device)

        def some(*shape: int) -> Tensor:
            return zeros[: torch.Size(shape).numel()].view(shape)

        x, gate, up = some(tokens, 1, width), some(tokens, 1, 6, width)[:, :, 0], some(mlp_width)
        seen = some(tokens, 1, heads, width // heads).transpose(1, 2)
        skinny.linear(x, some(3 * width, width), some(3 * width))
        skinny.gated_linear(seen, some(width, width), x[0, 0], gate, x)
        hidden = skinny.linear(x, some(mlp_width, width), up, gelu=True)
        skinny.gated_linear(hidden[:, None], some(width, mlp_width), x[0, 0], gate, x)
        return skinny

    return sandbox.tried(trial, "products with few tokens without their Triton kernels")
