"""The parts of the VAR transformer: an AdaLN block, its attention, and the AdaLN before the head.

The one idea to hold: a label reaches the tokens only through six vectors a block, which gate, scale
and shift what attention and MLP read and write (arXiv 2404.02905, after DiT, arXiv 2212.09748).
"""

import math
from functools import partial
from types import ModuleType
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

import sandbox
from sandbox import Mask, onednn_linear, suits_onednn

from . import between, hidden, operators

LAYER_NORM_EPS = 1e-6
MAX_LOG_SCALE = math.log(100)


class Block(nn.Module):
    """Attention and MLP, each normalised, modulated by the label and gated."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        mlp_width: int,
        shared_adaln: bool,
        qk_norm: bool,
        dropout: float,
        backend: sandbox.AttentionBackend,
    ) -> None:
        super().__init__()
        self.attn = SelfAttention(width, num_heads, qk_norm, dropout, backend)
        gelu = partial(nn.GELU, approximate="tanh")
        self.ffn = Mlp(width, mlp_width, act_layer=gelu, drop=(0.0, dropout))
        self.norm = nn.LayerNorm(width, LAYER_NORM_EPS, elementwise_affine=False)
        if shared_adaln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) / math.sqrt(width))
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def modulation(self, active: Float[Tensor, "b d"]) -> Float[Tensor, "b 1 6 d"]:
        """Of the SiLU of a label, the same for all blocks; that in `ada_lin` keeps its names."""
        return rearrange(self.ada_lin[1](active), "b (six d) -> b 1 six d", six=6)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        modulation: Float[Tensor, "b 1 6 d"],
        mask: Mask,
        memory: tuple[Tensor, slice, Tensor] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """`memory` is the cache of keys and values, the place of these tokens in it, and the bias
        of all three, which is the same in every step.
        """
        if self.training and memory is None and not self.attn.dropout.p:
            dtype = between.norm_dtype(x, modulation, self.attn.proj.weight)
            if dtype is not None:
                return self.learn(x, modulation, mask, dtype)
        past, span, bias = memory or (None, slice(None), None)
        made = self.before(x, modulation, bias)
        return self.after(x, self.attn.see(made, mask, past, span), modulation)

    def before(
        self,
        x: Float[Tensor, "b n d"],
        modulation: Float[Tensor, "b 1 6 d"],
        bias: Float[Tensor, " three_d"] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each `b heads n e`."""
        _, _, scale, _, shift, _ = modulation.unbind(2)
        return self.attn.project(normalised(x, self.norm) * (1 + scale) + shift, bias)

    def after(
        self,
        x: Float[Tensor, "b n d"],
        seen: Float[Tensor, "b heads n e"],
        modulation: Float[Tensor, "b 1 6 d"],
    ) -> Float[Tensor, "b n d"]:
        """What attention saw, and then the MLP, added to `x`."""
        gate1, gate2, _, scale, _, shift = modulation.unbind(2)
        x = x + self.attn.merge(seen) * gate1
        return x + self.mlp(normalised(x, self.norm) * (1 + scale) + shift) * gate2

    def learn(
        self,
        x: Float[Tensor, "b n d"],
        modulation: Float[Tensor, "b 1 6 d"],
        mask: Mask,
        dtype: torch.dtype,
    ) -> Float[Tensor, "b n d"]:
        """`forward` by the kernels for training, its norms of type `dtype`; without dropout."""
        proj, fc2 = self.attn.proj, self.ffn.fc2
        gate1, gate2, scale1, scale2, shift1, shift2 = modulation.unbind(2)
        x, normed = between.modulated(x, scale1, shift1, dtype)
        seen = self.attn.see(self.attn.project(normed), mask)
        product = F.linear(rearrange(seen, "b heads n e -> b n (heads e)"), proj.weight)
        x, normed = between.added_and_modulated(x, product, proj.bias, gate1, scale2, shift2)
        product = F.linear(self.widened(normed), fc2.weight)
        return between.added(x, product, fc2.bias, gate2)

    def widened(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n f"]:
        """The MLP's hidden layer in training; on a GPU by kernels of its own."""
        fc1 = self.ffn.fc1
        if hidden.suits(x, fc1.weight):
            return hidden.activated(F.linear(x, fc1.weight), fc1.bias)
        return self.ffn.act(fc1(x))

    def mlp(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Compiled to draw, with the cheapest GELU."""
        fc1, fc2 = self.ffn.fc1, self.ffn.fc2
        if self.training:
            return self.ffn.drop2(fc2(self.widened(x)))
        if not drawing():
            return self.ffn(x)
        if suits_onednn(x, fc1.weight):
            return linear(onednn_linear(x, fc1.weight, fc1.bias, gelu=True), fc2.weight, fc2.bias)
        return linear(gelu(linear(x, fc1.weight, fc1.bias)), fc2.weight, fc2.bias)


def drawing() -> bool:
    """Whether this is compiled, and for no gradients."""
    return torch.compiler.is_compiling() and not torch.is_grad_enabled()


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer; compiled to draw on a CPU, in float32, by a library that suits it better."""
    if drawing() and suits_onednn(x, weight):
        return onednn_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def normalised(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """What `norm`, which has no weights, makes of tokens.

    Compiled to draw on a CPU it is spelled out, so that adding, moments and normalising are one
    loop over tokens; the compiler's own version keeps means in memory, between loops.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or not drawing():
        return norm(x)
    centred = x - x.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    return centred * torch.rsqrt(variance + norm.eps)


def gelu(x: Tensor) -> Tensor:
    """Its tanh form, written with one exponential, which is cheaper where it is compiled."""
    # 2 sqrt(2 / pi) as a number: what is reckoned here would be reckoned anew for each few of `x`.
    return x * torch.sigmoid(1.5957691216057308 * (x + 0.044715 * x**3))


class SelfAttention(nn.Module):
    """Multi-head attention; with `qk_norm`, cosine similarity times a learned, capped scale."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        qk_norm: bool,
        dropout: float,
        backend: sandbox.AttentionBackend,
    ) -> None:
        super().__init__()
        self.num_heads, self.qk_norm, self.backend = num_heads, qk_norm, backend
        self.scale = 1.0 if qk_norm else 0.25 / math.sqrt(width // num_heads)
        if qk_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, num_heads, 1, 1), math.log(4)))
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj, self.dropout = nn.Linear(width, width), nn.Dropout(dropout)

    def bias(self) -> Float[Tensor, " three_d"]:
        """Of queries, keys (which have none: zeros) and values."""
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])

    def log_scale(self) -> Float[Tensor, "1 heads 1 1"] | None:
        """Of each head's cosine similarities, neither capped nor exponentiated yet."""
        return self.scale_mul_1H11 if self.qk_norm else None

    def product(
        self, x: Float[Tensor, "b n d"], bias: Float[Tensor, " three_d"] | None = None
    ) -> Float[Tensor, "b n three_d"]:
        """Queries, keys and values side by side; `bias` if it was put together before."""
        return linear(x, self.mat_qkv.weight, self.bias() if bias is None else bias)

    def project(
        self, x: Float[Tensor, "b n d"], bias: Float[Tensor, " three_d"] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each `b heads n e`; `bias` if it was put together before."""
        weight = self.mat_qkv.weight
        if self.qk_norm and operators.suits(x, weight, self.num_heads):
            bias = self.bias() if bias is None else bias
            return operators.part(F.linear(x, weight), bias, self.scale_mul_1H11)
        qkv = self.product(x, bias)
        q, k, v = rearrange(
            qkv, "b n (qkv heads e) -> qkv b heads n e", qkv=3, heads=self.num_heads
        )
        if self.qk_norm:  # in float32: half precision loses the direction of long vectors
            sharpness = self.scale_mul_1H11.float().clamp_max(MAX_LOG_SCALE).exp()
            q = (F.normalize(q.float(), dim=-1) * sharpness).to(v.dtype)
            k = F.normalize(k.float(), dim=-1).to(v.dtype)
        return q, k, v

    def see(
        self,
        made: Any,
        mask: Mask,
        past: Float[Tensor, "2 b heads l e"] | None = None,
        span: slice = slice(None),
        kernel: ModuleType | None = None,
    ) -> Float[Tensor, "b heads n e"]:
        """What the heads see with queries, keys and values of `project`.

        Keys and values go to their place in the cache `past`, and all that stands there is seen. By
        the module `kernel`, or by the backend itself, they go there from what `product` gives.
        """
        if past is None:
            q, k, v = made
        else:
            if kernel is None:
                q, k, v = made
                past[0, :, :, span], past[1, :, :, span] = k, v
            else:
                if appending := getattr(self.backend, "attend_appending", None):
                    cosine = (self.scale_mul_1H11, MAX_LOG_SCALE) if self.qk_norm else None
                    seen = appending(made, past, span.start, self.scale, cosine)
                    if seen is not None:
                        return seen
                q = kernel.place(made, self.log_scale(), past, span.start)
            k, v = past[:, :, :, : span.stop]
        return self.backend.attend(q, k, v, mask, self.scale)

    def merge(self, seen: Float[Tensor, "b heads n e"]) -> Float[Tensor, "b n d"]:
        """What all heads saw, as one vector a token."""
        seen = rearrange(seen, "b heads n e -> b n (heads e)")
        made = linear(seen, self.proj.weight, self.proj.bias) if drawing() else self.proj(seen)
        return self.dropout(made)


def drop_path_gates(
    num: int, batch: int, last_drop: float, device: torch.device
) -> Float[Tensor, "num b 1 6 1"]:
    """Stochastic depth (arXiv 1603.09382) in the gates: a closed gate drops an image's branch.

    Both branches of block i of `num` close with probability `last_drop` i / (num - 1); the open
    ones are scaled up, so that the expectation stays. What the modulations are to be multiplied by.
    """
    drops = torch.linspace(0, last_drop, num, device=device).view(num, 1, 1, 1, 1)
    drawn = torch.rand(num, batch, 1, 2, 1, device=device)
    return F.pad((drawn >= drops) / (1 - drops), (0, 0, 0, 4), value=1.0)


class HeadNorm(nn.Module):
    """The AdaLN before the output layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, LAYER_NORM_EPS, elementwise_affine=False)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(
        self, x: Float[Tensor, "b n d"], modulation: Float[Tensor, "b 1 2 d"]
    ) -> Float[Tensor, "b n d"]:
        scale, shift = modulation.unbind(2)
        return normalised(x, self.norm) * (1 + scale) + shift

    def modulation(self, cond: Float[Tensor, "b d"]) -> Float[Tensor, "b 1 2 d"]:
        return rearrange(self.ada_lin(cond), "b (two d) -> b 1 two d", two=2)
