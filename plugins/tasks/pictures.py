"""Pictures of what a tokenizer makes of held-out images."""

from typing import Any

import torch

import sandbox

MAX_STEPS = 32
"""Layouts of more steps have no picture of their scales."""


@torch.no_grad()
def tokenizer_pictures(run: sandbox.Run, tokenizer: Any, num_images: int) -> None:
    """Originals over reconstructions, and what the first k steps alone decode to."""
    batch = next(sandbox.sweep(run.dataset, "validation", num_images))
    images = batch.images.to(run.device)
    ids = tokenizer.encode(images)
    run.picture("reconstructions", torch.cat([images, tokenizer.decode(ids)]), columns=len(images))
    if len(tokenizer.layout.steps) > MAX_STEPS:
        return
    canvas, rows = tokenizer.canvas(len(ids)), []
    for step, span in enumerate(tokenizer.layout.spans):
        canvas = tokenizer.paint(canvas, tokenizer.embed(ids[:, span]), step)
        rows.append(tokenizer.render(canvas))
    run.picture("scales", torch.cat(rows), columns=len(images))
