"""What of a run's results a reader asks for first; the report and its comparison share these."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .record import RunRecord, TaskRecord

_LOWER = {"fid", "kid", "rfid", "mse", "error"}
_HIGHER = {"inception_score", "psnr", "ssim", "precision", "recall", "accuracy", "class_accuracy"}


def key_scores(run: RunRecord) -> dict[str, float]:
    """Scores and known quality measures by name, those of the last task first and winning."""
    found: dict[str, float] = {}
    for task in reversed(run.tasks.values()):
        known = {k: v for k, v in _numbers(task.result).items() if direction(k)}
        for name, value in {**_numbers(task.result.get("scores")), **known}.items():
            found.setdefault(name, value)
    return found


def conditions(run: RunRecord) -> dict[str, Any]:
    """Under what conditions the run's scores were taken."""
    found: dict[str, Any] = {}
    for task in run.tasks.values():
        provenance = task.result.get("provenance")
        found.update(provenance if isinstance(provenance, Mapping) else {})
    return found


def _numbers(values: Any) -> dict[str, float]:
    if not isinstance(values, Mapping):
        return {}
    return {
        str(key): value
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def split_score(name: str) -> tuple[str, str]:
    """`fid[inception]` as `fid` and `inception`, whose features it used."""
    stem, _, extractor = name.partition("[")
    return stem, extractor.removesuffix("]")


def direction(name: str) -> int:
    """1 where higher is better, -1 where lower is, 0 where it is not known."""
    stem = split_score(name)[0]
    return (stem in _HIGHER) - (stem in _LOWER)


def seconds_per_image(task: TaskRecord) -> float | None:
    """How long one image took, where the task has measured it."""
    value = task.result.get("seconds_per_image")
    return float(value) if isinstance(value, int | float) else None


def kind_of(picture: Path) -> str:
    """Which part of the report a picture belongs to, told from its file name."""
    name = picture.stem.lower()
    if any(word in name for word in ("strip", "scales", "coarse", "step-by-step")):
        return "Coarse to fine"
    if "recon" in name:
        return "Reconstructions"
    return "Samples" if "sample" in name else "Other pictures"


def sample_picture(run: RunRecord) -> Path | None:
    """The latest picture of samples."""
    samples = [p for task in run.tasks.values() for p in task.pictures if kind_of(p) == "Samples"]
    return samples[-1] if samples else None
