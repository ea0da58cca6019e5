"""Image losses: how far a reconstruction is from its image, as a network sees it or pixel by pixel.

The one idea to hold: a loss is a mean over images times its weight; a task adds several of them up.
"""

from typing import Any

import sandbox

from .lpips import Lpips
from .perceptual import Perceptual
from .pixels import L1, L2


@sandbox.hookimpl
def sandbox_register(register: Any) -> None:
    register(sandbox.ImageLoss, "l1", L1)
    register(sandbox.ImageLoss, "l2", L2)
    register(sandbox.ImageLoss, "lpips", Lpips)
    register(sandbox.ImageLoss, "perceptual", Perceptual)
