"""Which ids change where the encoder runs in less than exact float32, and what that costs in PSNR.

Only the encoder's arithmetic differs: a tokenizer keeps its lookups exact by itself, and every
reconstruction here is decoded in exact float32.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

import sandbox

_Setting = Callable[[], AbstractContextManager[Any]]


def encoder_precisions(device: torch.device) -> dict[str, _Setting]:
    """The precisions that differ on this device, exact float32 first."""
    found: dict[str, _Setting] = {"float32": lambda: sandbox.exact_float32(device)}
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        found["TF32"] = _tf32
    found["bfloat16"] = lambda: torch.autocast(device.type, torch.bfloat16)
    return found


@torch.no_grad()
def compare_precisions(
    run: sandbox.Run, tokenizer: Any, num_images: int | None, batch_size: int
) -> dict[str, Any]:
    """What an encoder's precision does to its ids.

    `psnr`: by precision, in dB. `ids_changed`: one row a scale with, by precision, the share of the
    ids that are not those of exact float32.
    """
    settings, layout = encoder_precisions(run.device), tokenizer.layout
    changed = torch.zeros(len(settings), layout.seq_len, dtype=torch.float64, device=run.device)
    decibel, count = torch.zeros(len(settings), dtype=torch.float64, device=run.device), 0
    for batch in sandbox.sweep(run.dataset, "validation", batch_size, limit=num_images):
        images = batch.images.to(run.device)
        ids = []
        for setting in settings.values():
            with setting():
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
            for name, share in list(zip(settings, shares, strict=True))[1:]
        }
        for scale in range(layout.num_levels)
    ]
    return {"psnr": dict(zip(settings, psnr, strict=True)), "ids_changed": rows}


@contextmanager
def _tf32() -> Iterator[None]:
    backends: Any = torch.backends  # torch leaves these switches untyped
    switches = backends.cuda.matmul, backends.cudnn.conv
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "tf32"
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value
