"""How the weights of the transformer begin, before a checkpoint or training says more."""

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from .model import VAR


@torch.no_grad()
def initialise(network: "VAR") -> None:
    """As published: small weights, near-silent residual branches, near-uniform logits.

    The published code truncates these normals at 2, far outside of what they ever draw.
    """
    depth, width = network.params.depth, network.class_emb.embedding_dim
    std = math.sqrt(1 / (3 * width))
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    nn.init.normal_(network.pos_start, std=std)
    nn.init.normal_(network.pos_1LC, std=std)
    network.head.weight.mul_(0.02)
    network.head_nm.ada_lin[1].weight.mul_(0.5)
    gamma = 1e-3 if depth < 24 else 1e-4 if depth < 30 else 1e-5
    for block in network.blocks:
        block.attn.proj.weight.div_(math.sqrt(2 * depth))
        block.ffn.fc2.weight.div_(math.sqrt(2 * depth))
        # Of the six modulations, the first two gate the branches; the others scale and shift.
        if network.params.shared_adaln:
            block.ada_gss[:, :, :2].mul_(gamma)
            block.ada_gss[:, :, 2:].mul_(0.5)
        else:
            block.ada_lin[1].weight[: 2 * width].mul_(gamma)
            block.ada_lin[1].weight[2 * width :].mul_(0.5)
