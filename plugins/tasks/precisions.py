"""Which ids change where the encoder runs in less than exact float32, and what that costs in PSNR.

Only the encoder's arithmetic differs: a tokenizer keeps its lookups exact by itself, and every
reconstruction here is decoded in exact float32.
"""

from typing import Any

import torch

import sandbox

from .encoding import coding, coding_precisions


@torch.no_grad()
def compare_precisions(
    run: sandbox.Run, tokenizer: Any, num_images: int | None, batch_size: int
) -> dict[str, Any]:
    """What an encoder's precision does to its ids.

    `psnr`: by precision, in dB. `ids_changed`: one row a scale with, by precision, the share of the
    ids that are not those of exact float32.
    """
    precisions, layout = coding_precisions(run.device), tokenizer.layout
    changed = torch.zeros(len(precisions), layout.seq_len, dtype=torch.float64, device=run.device)
    decibel, count = torch.zeros(len(precisions), dtype=torch.float64, device=run.device), 0
    for batch in sandbox.sweep(run.dataset, "validation", batch_size, limit=num_images):
        images = batch.images.to(run.device)
        ids = []
        for precision in precisions:
            with coding(run.device, precision):
                ids.append(tokenizer.encode(images))
        for row, found in enumerate(ids):
            changed[row] += (found != ids[0]).double().sum(0)
            with sandbox.exact_float32(run.device):
                made = tokenizer.decode(found)
            error = (made - images).square().flatten(1).mean(1).double()
            decibel[row] -= 10 * torch.log10(error.clamp_min(1e-12) / 4).sum()
        count += len(images)
    psnr = [round(score / count, 3) for score in decibel.tolist()]
    level, shares = layout.level_of(), changed.cpu() / count
    rows: list[dict[str, float]] = [
        {"scale": scale + 1}
        | {
            name: round(float(share[level == scale].mean()), 5)
            for name, share in list(zip(precisions, shares, strict=True))[1:]
        }
        for scale in range(layout.num_levels)
    ]
    return {"psnr": dict(zip(precisions, psnr, strict=True)), "ids_changed": rows}
