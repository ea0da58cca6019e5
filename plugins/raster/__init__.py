"""Raster-scan prediction: the orders and the tokenizer that make of it a changed recipe."""

from collections.abc import Callable

import sandbox

from .orders import Raster
from .tokenizer import RasterTokenizer


@sandbox.hookimpl
def sandbox_register(register: Callable[..., None]) -> None:
    register(sandbox.ScaleSchedule, "raster", Raster)
    register(sandbox.Tokenizer, "raster-vq", RasterTokenizer)
