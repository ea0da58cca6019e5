"""Adversaries: discriminators that tell reconstructions from images, and what they teach.

The one idea to hold: all share their losses and remedies (`duel.py`); they differ in the network,
which gives one logit a place and the feature maps on the way.
"""

from typing import Any

import sandbox

from .dino import Dino
from .patchgan import PatchGan


@sandbox.hookimpl
def sandbox_register(register: Any) -> None:
    register(sandbox.Adversary, "dino", Dino)
    register(sandbox.Adversary, "patchgan", PatchGan)
