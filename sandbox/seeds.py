"""Random streams that depend on names, not on how much was drawn before.

Each use derives its own seed from the run's, so that adding a draw in one place moves nothing
elsewhere and a resumed run needs no stored stream for what it can derive again.
"""

import hashlib

import torch


def derive_seed(*parts: str | int) -> int:
    """A seed of 63 bits that depends on every part and on their order."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(device: torch.device | str, *parts: str | int) -> torch.Generator:
    """A fresh `torch.Generator` on `device`, seeded from the parts."""
    return torch.Generator(device).manual_seed(derive_seed(*parts))
