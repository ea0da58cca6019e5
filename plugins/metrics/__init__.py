"""Scores over images. All read features that were extracted once; see `sandbox.Metric`."""

from collections.abc import Callable

import sandbox

from .distances import Fid, Inception, Kid, Rfid
from .images import ClassAccuracy, Psnr, Ssim
from .manifolds import PrecisionRecall

__all__ = [
    "ClassAccuracy",
    "Fid",
    "Inception",
    "Kid",
    "PrecisionRecall",
    "Psnr",
    "Rfid",
    "Ssim",
]


@sandbox.hookimpl
def sandbox_register(register: Callable[[type, str, type], None]) -> None:
    register(sandbox.Metric, "fid", Fid)
    register(sandbox.Metric, "rfid", Rfid)
    register(sandbox.Metric, "kid", Kid)
    register(sandbox.Metric, "inception-score", Inception)
    register(sandbox.Metric, "precision-recall", PrecisionRecall)
    register(sandbox.Metric, "psnr", Psnr)
    register(sandbox.Metric, "ssim", Ssim)
    register(sandbox.Metric, "class-accuracy", ClassAccuracy)
