"""How well a tokenizer does on held-out images, scale by scale, and how much it still moves.

One measurement encodes every image once; what is summed on the way stays on the device and is read
at the end. Drift compares with the measurement before, which is why this has a state.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

import sandbox

from .remedies import NUM_RISING, Symptoms, complaints
from .usage import CodebookUsage, usage_rows

MAX_STEPS = 32
"""Layouts of more steps are not painted step by step."""
NUM_PARTIAL_IMAGES = 512
"""The first images, on which `residual` and `psnr_upto` are measured: they cost a further pass of
the encoder and one of the decoder a scale."""


class Health:
    """Measures a `sandbox.TrainableTokenizer` on the first `num_images` of the validation split.

    It also says, once a run, what looks wrong and which setting mends it.
    """

    def __init__(
        self, run: sandbox.Run, tokenizer: Any, num_images: int | None, batch_size: int
    ) -> None:
        self.run, self.tokenizer = run, tokenizer
        self.num_images, self.batch_size = num_images, batch_size
        self.rows: list[dict[str, float]] = []
        """The last measurement, one mapping a scale: scale, tokens, used, usage, perplexity,
        entropy, residual, psnr_upto, ids_changed (what could not be measured is left out)."""
        self._ids: Tensor | None = None
        self._magnitude: Tensor | None = None
        self._progress: float | None = None
        self._history: dict[str, list[float]] = {}
        self._said: list[str] = []

    @torch.no_grad()
    def measure(self, progress: float = 1.0) -> dict[str, float]:
        """The scores by name; `progress` of the training, in [0, 1], decides what is worrying.

        `l2` and `psnr` (dB, range -1..1), means over images. Per scale k: `perplexity/scalek`,
        `used/scalek` (codes), `entropy/scalek` (nats), `residual/scalek` (share of the features'
        variance still missing after it), `psnr_upto/scalek` (dB, from the first k scales alone),
        `ids_changed/scalek` (share in [0, 1] of ids that are not what they were at the measurement
        before). `dead_codes`: codes used at no scale. `feature_std`: of the quantized feature map.
        `feature_drift`: relative change of the mean absolute code vector since the last time.
        """
        usage = CodebookUsage(self.tokenizer.layout, self.tokenizer.vocab_size)
        sums, ids = self._sweep(usage)
        if self._ids is not None:
            sums.add("changed", _changed(ids, self._ids.to(ids.device), self.tokenizer.layout))
        read = sums.read()
        read["magnitude"] /= ids.numel()
        scores = self._scores(read, usage, len(ids))
        self._warn(scores, len(ids), progress)
        self._ids, self._magnitude, self._progress = ids, read["magnitude"], progress
        return scores

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to report the same."""
        return {
            "ids": self._ids,
            "magnitude": self._magnitude,
            "progress": self._progress,
            "history": {name: list(values) for name, values in self._history.items()},
            "said": list(self._said),
            "rows": [dict(row) for row in self.rows],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        self._ids, self._magnitude = state["ids"], state["magnitude"]
        self._progress = state["progress"]
        self._history = {name: list(values) for name, values in state["history"].items()}
        self._said = list(state["said"])
        self.rows = [dict(row) for row in state["rows"]]

    def _sweep(self, usage: CodebookUsage) -> "tuple[_Sums, Int[Tensor, 'b l']]":
        """Sums over the images, and their ids."""
        sums, found, seen = _Sums(), [], 0
        for batch in sandbox.sweep(
            self.run.dataset, "validation", self.batch_size, limit=self.num_images
        ):
            images = batch.images.to(self.run.device)
            ids = self.tokenizer.encode(images)
            usage.update(ids)
            found.append(ids.int())
            errors = _errors(self.tokenizer.decode(ids), images)
            sums.add("l2", errors.sum())
            sums.add("psnr", _decibel(errors).sum())
            codes = self.tokenizer.embed(ids)
            sums.add("magnitude", codes.double().abs().sum((0, 1)))
            few = max(0, min(len(images), NUM_PARTIAL_IMAGES - seen))
            canvases = self._canvases(codes)
            _add_moments(sums, canvases[-1] if canvases else codes)
            if few:
                self._add_partial(sums, images[:few], [each[:few] for each in canvases], errors)
            seen += len(images)
        if not found:
            raise sandbox.SandboxError(
                f"{self.run.label}: the data set has no validation images: give it some"
            )
        return sums, torch.cat(found)

    def _canvases(self, codes: Float[Tensor, "b l c"]) -> list[Float[Tensor, "b c h w"]]:
        """The canvas after each scale; none where the layout has too many steps."""
        layout = self.tokenizer.layout
        if len(layout.steps) > MAX_STEPS:
            return []
        canvas, after = self.tokenizer.canvas(len(codes)), {}
        for step, span in enumerate(layout.spans):
            canvas = self.tokenizer.paint(canvas, codes[:, span], step)
            after[layout.level_of_step[step]] = canvas
        return list(after.values())

    def _add_partial(
        self, sums: "_Sums", images: Tensor, canvases: list[Tensor], errors: Tensor
    ) -> None:
        sums.add("few", errors.new_full((), len(images)))
        if residual_energy := getattr(self.tokenizer, "residual_energy", None):
            sums.add("residual", residual_energy(images).double() * len(images))
        if canvases:  # the last is what was decoded
            made = [_errors(self.tokenizer.render(each), images) for each in canvases[:-1]]
            decibel = [_decibel(each).sum() for each in [*made, errors[: len(images)]]]
            sums.add("psnr_upto", torch.stack(decibel))

    def _scores(
        self, read: Mapping[str, Tensor], usage: CodebookUsage, num_images: int
    ) -> dict[str, float]:
        layout, few = self.tokenizer.layout, read["few"]
        self.rows = usage_rows(layout, usage)
        exact = usage.compute()
        by_scale: dict[str, list[float]] = {
            "perplexity": exact["perplexity"],
            "used": exact["used_codes"],
            "entropy": exact["entropy_nats"],
        }
        for name in ("residual", "psnr_upto"):
            if name in read:
                by_scale[name] = (read[name] / few).tolist()
        if "changed" in read:
            by_scale["ids_changed"] = read["changed"].tolist()
        scores = {name: float(read[name] / num_images) for name in ("l2", "psnr")}
        for name, values in by_scale.items():
            for row, value in zip(self.rows, values, strict=True):
                scores[f"{name}/scale{row['scale']}"] = value
                row.setdefault(name, round(value, 4 if name != "psnr_upto" else 2))
        scores["dead_codes"] = float(usage.dead_codes())
        total, squares, count = read["moments"].tolist()
        scores["feature_std"] = max(0.0, squares / count - (total / count) ** 2) ** 0.5
        if self._magnitude is not None:
            now, before = read["magnitude"], self._magnitude
            scores["feature_drift"] = float((now - before).norm() / before.norm().clamp_min(1e-12))
        return scores

    def _warn(self, scores: Mapping[str, float], num_images: int, progress: float) -> None:
        """Say, once a run and kind, what looks wrong and what mends it."""
        watched = {"l2": scores["l2"]}
        if (last := f"residual/scale{len(self.rows)}") in scores:
            watched["residual"] = scores[last]
        for name, value in watched.items():
            self._history[name] = [*self._history.get(name, []), value][-NUM_RISING - 1 :]
        symptoms = Symptoms(
            self.rows,
            self.tokenizer.vocab_size,
            num_images,
            int(scores["dead_codes"]),
            scores["feature_std"],
            self._history,
            progress,
            self._progress,
        )
        for kind, text in complaints(symptoms, self.run.settings("tokenizer")):
            if kind not in self._said:
                self._said.append(kind)
                self.run.say(text)


class _Sums:
    """Sums that stay on the device, and are read in one go."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def read(self) -> dict[str, Tensor]:
        flat = torch.cat([value.reshape(-1) for value in self._sums.values()]).cpu()
        sizes = [value.numel() for value in self._sums.values()]
        return dict(zip(self._sums, flat.split(sizes), strict=True))


def _errors(made: Tensor, images: Tensor) -> Float[Tensor, " b"]:
    """The mean squared error of each image."""
    return (made - images).square().flatten(1).mean(1).double()


def _decibel(errors: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    return -10 * torch.log10(errors.clamp_min(1e-12) / 4)  # pixels range from -1 to 1


def _add_moments(sums: _Sums, values: Tensor) -> None:
    exact = values.double()
    count = exact.new_full((), exact.numel())
    sums.add("moments", torch.stack([exact.sum(), exact.square().sum(), count]))


def _changed(
    ids: Int[Tensor, "b l"], before: Int[Tensor, "b l"], layout: sandbox.Layout
) -> Float[Tensor, " k"]:
    """The share of each scale's ids that are not what they were."""
    if ids.shape != before.shape:
        raise sandbox.SandboxError(
            f"the measurement before was of {len(before)} images and {before.shape[1]} ids each, "
            f"this one is of {len(ids)} and {ids.shape[1]}: begin anew (--fresh)"
        )
    level, changed = layout.level_of().to(ids.device), (ids != before).double().mean(0)
    shares = changed.new_zeros(layout.num_levels).index_add_(0, level, changed)
    sizes = torch.zeros_like(shares).index_add_(0, level, torch.ones_like(changed))
    return shares / sizes
