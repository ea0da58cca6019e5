"""What looks wrong with a tokenizer in training, in plain words, and the setting that mends it.

Thresholds are meant to be quiet for a healthy training: nothing is said in its first tenth, nor
from so few images that chance alone would explain what is seen.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

NUM_RISING = 3
"""Measurements that must be worse than the one before, in a row."""
SETTLED, LATE = 0.7, 0.8
"""Shares of the training after which codes are left alone, and should stand still."""
SMALLEST_STD = 0.01
"""Features below this are vanishing."""


@dataclass(frozen=True)
class Symptoms:
    """One measurement, and what is remembered of those before it."""

    rows: Sequence[Mapping[str, float]]
    vocab_size: int
    num_images: int
    dead_codes: int
    feature_std: float
    history: Mapping[str, Sequence[float]]
    """The last values of `l2` and `residual` (of the last scale), oldest first."""
    progress: float
    previous_progress: float | None


def complaints(seen: Symptoms, settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Kind and text of everything that looks wrong; `settings` are the tokenizer's."""
    if seen.progress < 0.1:
        return
    for kind, text in (
        ("collapse", _collapse(seen, settings)),
        ("residual", _residual(seen, settings)),
        ("l2", _rising_l2(seen)),
        ("quantization", _rising_quantization(seen, settings)),
        ("restless", _restless(seen, settings)),
        ("shrinking", _shrinking(seen, settings)),
    ):
        if text:
            yield kind, text


def _collapse(seen: Symptoms, settings: Mapping[str, Any]) -> str:
    vocab, remedy = seen.vocab_size, _alive_again(settings)
    collapsed = [row for row in seen.rows if _has_collapsed(row, vocab, seen.num_images)]
    if collapsed:
        worst, *others = collapsed
        also = f"; so have scales {_listed(others)}" if others[1:] else ""
        also = f"; so has scale {others[0]['scale']}" if len(others) == 1 else also
        return (
            f"scale {worst['scale']} has collapsed: {worst['used']} of {vocab} codes carry it "
            f"(perplexity {worst['perplexity']:.1f}){also}; {remedy}"
        )
    draws = seen.num_images * sum(row["tokens"] for row in seen.rows)
    if vocab - seen.dead_codes < min(vocab, draws / 4) / 2:
        return f"{seen.dead_codes} of {vocab} codes are used at no scale; {remedy}"
    return ""


def _has_collapsed(row: Mapping[str, float], vocab_size: int, num_images: int) -> bool:
    draws = num_images * row["tokens"]
    first = row["scale"] == 1 and min(vocab_size, draws) >= 64 and row["perplexity"] < 8
    return first or row["used"] < min(vocab_size, draws) / 16


def _listed(rows: Sequence[Mapping[str, float]]) -> str:
    *most, last = (str(row["scale"]) for row in rows)
    return f"{', '.join(most)} and {last}"


def _alive_again(settings: Mapping[str, Any]) -> str:
    """The first remedy for a codebook of few codes that is not in use yet."""
    codebook = _codebook(settings)
    move = "move dead ones (codebook.restart: true)" if codebook.get("restart") is False else ""
    if codebook.get("init") == "normal":
        return "start codes on data (codebook.init: data)" + (f" and {move}" if move else "")
    if move:
        return move.replace("dead ones", "dead codes onto data")
    fewer = "use fewer codes (codebook.vocab_size)"
    if settings.get("prefix_dropout") == 0:
        return f"leave late scales out in training (prefix_dropout: 0.1), or {fewer}"
    return fewer


def _residual(seen: Symptoms, settings: Mapping[str, Any]) -> str:
    for before, after in pairwise(row for row in seen.rows if "residual" in row):
        if after["residual"] > 1.02 * before["residual"]:
            share = settings.get("phi") in ("partial", "per-scale")
            remedy = "share one convolution (phi: shared) or train longer" if share else (
                "train longer (num_images)"
            )  # fmt: skip
            return (
                f"scale {after['scale']} makes things worse: the share of the features that is "
                f"missing rises from {before['residual']:.3f} to {after['residual']:.3f}; {remedy}"
            )
    return ""


def _risen(values: Sequence[float]) -> str:
    recent = list(values)[-NUM_RISING - 1 :]
    rises = len(recent) > NUM_RISING and all(a < b for a, b in pairwise(recent))
    if not rises or recent[-1] < 1.02 * recent[0]:  # less is noise
        return ""
    return f"has risen for {NUM_RISING} measurements, from {recent[0]:.4g} to {recent[-1]:.4g}"


def _rising_l2(seen: Symptoms) -> str:
    if rise := _risen(seen.history.get("l2", ())):
        return (
            f"the validation l2 {rise}; lower learning_rate (an adversary that has just begun "
            "does this too: lower its weight)"
        )
    return ""


def _rising_quantization(seen: Symptoms, settings: Mapping[str, Any]) -> str:
    if rise := _risen(seen.history.get("residual", ())):
        direction = _codebook(settings).get("lookup") == "euclidean"
        cosine = " or look codes up by direction (codebook.lookup: cosine)" if direction else ""
        return (
            f"the share of the features that no scale explains {rise}; lower learning_rate{cosine}"
        )
    return ""


def _restless(seen: Symptoms, settings: Mapping[str, Any]) -> str:
    shares = [row["ids_changed"] for row in seen.rows if "ids_changed" in row]
    late = seen.progress >= LATE and (seen.previous_progress or 0.0) >= SETTLED
    if not shares or not late or fmean(shares) <= 0.5:
        return ""
    until = _codebook(settings).get("restart_until", 0.0)
    remedy = "lower learning_rate or final_factor"
    if _codebook(settings).get("restart") and until > SETTLED:
        remedy = f"stop moving codes earlier (codebook.restart_until: {SETTLED}, now {until})"
    return (
        f"{100 * fmean(shares):.0f} % of the ids still change between two measurements, late in "
        f"the training: a generator would learn ids that do not last; {remedy}"
    )


def _shrinking(seen: Symptoms, settings: Mapping[str, Any]) -> str:
    if seen.feature_std >= SMALLEST_STD:
        return ""
    remedy = f"lower beta (now {settings['beta']})" if "beta" in settings else "raise learning_rate"
    if settings.get("estimator") == "rotation":
        remedy = "let gradients pass unturned (estimator: straight-through)"
    return f"the features have shrunk to a standard deviation of {seen.feature_std:.2g}; {remedy}"


def _codebook(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    codebook = settings.get("codebook")
    return codebook if isinstance(codebook, Mapping) else {}
