"""Codebooks: vectors to ids and back, in float32 throughout.

`vq` learns its codes and cares for them, `simvq` learns one linear map of frozen codes, `fsq` and
`lfq` round each channel and learn nothing. All stand for the same thing, a set of points of which
the nearest is taken, so a recipe changes one for another and nothing else.
"""

from collections.abc import Callable

import sandbox

from .grids import FSQ, LFQ
from .simvq import SimVQ
from .vq import VQ


@sandbox.hookimpl
def sandbox_register(register: Callable[..., None]) -> None:
    register(sandbox.Codebook, "vq", VQ)
    register(sandbox.Codebook, "simvq", SimVQ)
    register(sandbox.Codebook, "fsq", FSQ)
    register(sandbox.Codebook, "lfq", LFQ)
