"""The published VAR transformer (arXiv 2404.02905): AdaLN blocks over the tokens of a layout.

The one idea to hold: the network knows a layout's spans, levels and mask and nothing else of it,
so next-scale and raster prediction are the same network. Parameters are called as in the published
checkpoints, so those load as they are; only buffers, all computed here, are left out.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sandbox
from sandbox import Mask, Part, Tokens

from . import copies, initial, published_model, stepwise
from .blocks import Block, HeadNorm, drawing, drop_path_gates, linear


class VAR(nn.Module):
    """Depth is the one dial: width is 64 x depth, with one head per 64 channels."""

    class Params(sandbox.Params):
        depth: int = Field(16, gt=0, le=128)
        """Number of blocks; the published models have 16, 20, 24, 30 and 36."""
        width: int | None = Field(None, gt=0)
        """Model width in channels; 64 x depth if not given."""
        num_heads: int | None = Field(None, gt=0)
        """Attention heads, which must divide the width; one per 64 channels if not given."""
        shared_adaln: bool = False
        """One AdaLN projection for all blocks, as in the published 512-pixel model."""
        qk_norm: bool = True
        """Normalise queries and keys; the softmax scale is then learned per head."""
        label_dropout: float = Field(0.1, ge=0, lt=1)
        """Share of labels hidden in training, which is what guidance needs."""
        drop_path: float | None = Field(None, ge=0, lt=1)
        """Stochastic depth of the last block, linear from 0; 0.1 x depth / 24 if not given."""
        dropout: float = Field(0.0, ge=0, lt=1)
        """Of what attention and MLPs add, in training; none as published."""
        mlp_ratio: float = Field(4.0, gt=0)
        """Hidden width of the MLPs over the model width."""
        attention: Part[sandbox.AttentionBackend] = Field(default="auto", validate_default=True)
        """How attention is computed; no choice changes what is computed."""
        recompute: Annotated[bool, sandbox.INCIDENTAL] = False
        """Keep of each block only what it reads, in training, and compute the rest again for its
        gradients (arXiv 1604.06174): a third more work, a small part of the memory, the same
        numbers."""

    def __init__(self, params: Params, tokens: Tokens) -> None:
        super().__init__()
        self.params, self.tokens = params, tokens
        depth, width = params.depth, params.width or 64 * params.depth
        num_heads = params.num_heads or max(1, width // 64)
        if width % num_heads:
            raise sandbox.SandboxError(
                f"backbone 'var': a width of {width} is not divisible into {num_heads} heads; "
                "change width or num_heads"
            )
        layout = tokens.layout
        self.last_drop = 0.1 * depth / 24 if params.drop_path is None else params.drop_path
        backend = params.attention.build()

        self.word_embed = nn.Linear(tokens.code_dim, width)
        self.class_emb = nn.Embedding(tokens.num_classes + 1, width)
        self.pos_start = nn.Parameter(torch.empty(1, layout.lens[0], width))
        self.pos_1LC = nn.Parameter(torch.empty(1, layout.seq_len, width))
        self.lvl_embed = nn.Embedding(layout.num_levels, width)
        if params.shared_adaln:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(
            Block(
                width,
                num_heads,
                mlp_width=round(params.mlp_ratio * width),
                shared_adaln=params.shared_adaln,
                qk_norm=params.qk_norm,
                dropout=params.dropout,
                backend=backend,
            )
            for _ in range(depth)
        )
        self.head_nm = HeadNorm(width)
        self.head = nn.Linear(width, tokens.vocab_size)
        with torch.device("cpu"):  # known also where the weights are only planned (meta device)
            self.register_buffer("level", layout.level_of(), persistent=False)
        self.mask = Mask(layout.lens)
        self.fused = False
        self._cast = copies.Casts()  # no part of the state
        initial.initialise(self)

    def forward(
        self, contexts: Float[Tensor, "b l c"], labels: Int[Tensor, " b"]
    ) -> Float[Tensor, "b l v"]:
        """Logits of every token at once, float32. In training, some labels are hidden."""
        return self.logits(*self.features(contexts, labels))

    def features(
        self, contexts: Float[Tensor, "b l c"], labels: Int[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "b d"]]:
        """What the blocks make of every token, and of the label."""
        if self.training and self.params.label_dropout > 0:
            hidden = torch.rand(len(labels), device=labels.device) < self.params.label_dropout
            labels = labels.masked_fill(hidden, self.tokens.num_classes)
        cond = self.class_emb(labels)
        first = self.tokens.layout.lens[0]
        x = torch.cat([self.read(cond), self.read(cond, contexts[:, first:])], dim=1)
        x = x + self.places().to(x.dtype)
        gates: Sequence[Tensor | None] = [None] * len(self.blocks)
        if self.training:
            self._rehearse(x)
            if self.last_drop:
                gates = drop_path_gates(len(gates), len(x), self.last_drop, x.device).unbind()
        label = self.label(cond)
        for block, gate in zip(self.blocks, gates, strict=True):
            # Block by block, so that a GPU has work while the next one's small products begin.
            modulation = self._modulation(block, label)
            if gate is not None:
                modulation = modulation * gate.to(modulation.dtype)
            x = self._through(block, x, modulation.to(x.dtype))
        return x, cond

    def logits(
        self, x: Float[Tensor, "b n d"], cond: Float[Tensor, "b d"]
    ) -> Float[Tensor, "b n v"]:
        """Out of reach of autocast, as published: in float32, unless the weights were cast.

        Where autocast makes the blocks 16-bit, a GPU multiplies here in TF32, no coarser than what
        it is given; else as exactly as the surroundings say, and so does compiled code, unless who
        calls it does so within `coarse_products`.
        """
        return self.predict(x, self.head_modulation(cond))

    def predict(
        self, x: Float[Tensor, "b n d"], modulation: Float[Tensor, "b 1 2 d"]
    ) -> Float[Tensor, "b n v"]:
        """`logits` of tokens and what their label makes of the head."""
        return self.project(self.normed(x, modulation))

    def normed(
        self, x: Float[Tensor, "b n d"], modulation: Float[Tensor, "b 1 2 d"]
    ) -> Float[Tensor, "b n d"]:
        """What the head reads of tokens, in its own type."""
        with self._uncast(x.device):
            return self.head_nm(x.to(self.head.weight.dtype), modulation)

    def project(self, normed: Float[Tensor, "b n d"]) -> Float[Tensor, "b n v"]:
        """The logits of what the head reads."""
        with self._uncast(normed.device):
            head = self.head
            made = linear(normed, head.weight, head.bias) if drawing() else head(normed)
            return made.float()

    def read(
        self,
        cond: Float[Tensor, "b d"],
        contexts: Float[Tensor, "b n c"] | None = None,
        word_embed: nn.Linear | None = None,
    ) -> Float[Tensor, "b n d"]:
        """The tokens of contexts, or those of the first step, before they know their places.

        `word_embed` is a copy of the network's.
        """
        if contexts is None:
            return (cond[:, None] + self.pos_start).to(self._dtype())
        embed = word_embed or self.word_embed
        return embed(contexts.to(embed.weight.dtype)).to(self._dtype())

    def places(self) -> Float[Tensor, "1 l d"]:
        """What is added to the tokens: their positions' and their levels' vectors."""
        return self.pos_1LC + self.lvl_embed(self.level)

    def modulations(
        self, cond: Float[Tensor, "b d"], blocks: Sequence[Block]
    ) -> tuple[list[Float[Tensor, "b 1 6 d"]], Float[Tensor, "b 1 2 d"]]:
        """What a label makes of each block, in the type these compute in, and of the head."""
        label = self.label(cond)
        made = [self._modulation(block, label).to(self._dtype()) for block in blocks]
        return made, self.head_modulation(cond)

    def coarse_products(self) -> AbstractContextManager[Any]:
        """The precision of the head's products, for compiled code, which cannot set it."""
        coarse = self._dtype().itemsize == 2
        return sandbox.products_of_float32("tf32") if coarse else nullcontext()

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile what training runs, block by block: they share their code, so it is made once."""
        for block in self.blocks:
            block.compile(*args, **{"dynamic": False, **kwargs})

    def begin(self, labels: Int[Tensor, " b"]) -> stepwise.State:
        """A fresh state; its cache has room for the whole sequence from the start."""
        return stepwise.begin(self, self.class_emb(labels), self._dtype())

    def step(
        self, state: stepwise.State, context: Float[Tensor, "b n c"], step: int
    ) -> Float[Tensor, "b n v"]:
        """The rows of `forward` that belong to one step. The first step's context is not read.

        Raises ValueError if the steps are not taken in order.
        """
        return stepwise.step(self, state, context, step)

    def guided_step(
        self, state: stepwise.State, context: Float[Tensor, "two_b n c"], step: int, weight: float
    ) -> Float[Tensor, "b n v"]:
        """`sandbox.guided` of `step`; fused, tokens are mixed before the head, which is linear."""
        if not self.fused or type(self).step is not VAR.step:  # the steps of a subclass count
            return sandbox.guided(self.step(state, context, step), weight)
        return stepwise.step(self, state, context, step, weight)

    def refresh(self) -> None:
        """Bring the copies of the weights up to date, which a recorded generation reads."""
        for cast in self._cast.values():
            copies.refresh(cast, self)

    def no_weight_decay(self) -> set[str]:
        """Biases, scales, positions and levels, as published; class embeddings do decay."""
        spared = ("pos_1LC", "pos_start", "lvl_embed", "ada_gss", "scale_mul")
        return {
            name
            for name, parameter in self.named_parameters()
            if parameter.ndim == 1 or name.endswith("bias") or any(key in name for key in spared)
        }

    def from_published(self, state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """A published state dict as one of ours, or None if it is not published.

        Raises SandboxError if its buffers tell of other scales or another attention.
        """
        return published_model.to_ours(state, self.tokens.layout)

    def to_published(self) -> dict[str, Tensor]:
        """The weights with exactly the keys of the published checkpoints."""
        return published_model.from_ours(self.state_dict(), self.tokens.layout)

    @staticmethod
    def describe(state: Mapping[str, Tensor]) -> dict[str, str]:
        """What a state dict in our layout says of its model, for messages about mismatches."""
        return published_model.describe(state)

    def _through(
        self, block: Block, x: Float[Tensor, "b l d"], modulation: Float[Tensor, "b 1 6 d"]
    ) -> Float[Tensor, "b l d"]:
        """The block, plainly; in training compiled and computed again, where that is asked for."""
        if not self.training:
            return block.forward(x, modulation, self.mask)
        if not self.params.recompute:
            return block(x, modulation, self.mask)
        draws = self.params.dropout > 0  # paths and labels were drawn before, once
        return checkpoint(
            block, x, modulation, self.mask, use_reentrant=False, preserve_rng_state=draws
        )

    def _rehearse(self, x: Float[Tensor, "b l d"]) -> None:
        """Show the attention what it will get in the blocks, where it may be compiled."""
        attention = self.blocks[0].attn
        rehearse = getattr(attention.backend, "rehearse", None)
        if rehearse and not torch.compiler.is_compiling():
            q = rearrange(x.detach(), "b l (heads e) -> b heads l e", heads=attention.num_heads)
            q.requires_grad_(torch.is_grad_enabled())
            rehearse(q, q, q, self.mask, attention.scale)

    def _dtype(self) -> torch.dtype:
        """What the blocks compute in: autocast's type inside autocast, else the weights'."""
        device = self.word_embed.weight.device.type
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
        return self.word_embed.weight.dtype

    def _uncast(self, device: torch.device) -> AbstractContextManager[Any]:
        if self._dtype().itemsize == 2 and not torch.compiler.is_compiling():
            return sandbox.float32_products(device, "tf32")
        return torch.autocast(device.type, enabled=False)

    def head_modulation(self, cond: Float[Tensor, "b d"]) -> Float[Tensor, "b 1 2 d"]:
        with self._uncast(cond.device):
            return self.head_nm.modulation(cond.to(self.head.weight.dtype))

    def label(self, cond: Float[Tensor, "b d"]) -> Tensor:
        """What every block reads of a label: its SiLU or, `b 1 six d`, what all blocks share."""
        if not self.params.shared_adaln:
            return F.silu(cond).to(self._dtype())
        return rearrange(self.shared_ada_lin(cond), "b (six d) -> b 1 six d", six=6)

    def _modulation(self, block: Block, label: Tensor) -> Float[Tensor, "b 1 6 d"]:
        return block.ada_gss + label if self.params.shared_adaln else block.modulation(label)
