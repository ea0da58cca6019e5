"""The training loop that every task which trains shares.

It is read in one go: resume, then step, report, validate, save, done? Everything that decides how
the training goes on is in one state, saved by images seen, so that a run stopped at any moment ends
with the same weights as one that was not.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

import sandbox

from .settings import Training

State = dict[str, Any]


@dataclass
class Fit:
    """What a task hands to the loop.

    The order of the data set's images derives from the run's seed and the name `order`.
    `loss(batch, progress)` gives the losses of a batch that is on the device;
    `after_step(optimizer, progress, done)` cares for what is no gradient's business and returns
    scalars; `validate()` returns scalars, of which `score` (lower is better) picks the best
    weights. `begin()` is called once, before the first step of a training and never on going on
    with one; `keep` are objects with `state_dict()` and `load_state_dict()` that checkpoints hold
    besides the network.
    """

    run: sandbox.Run
    settings: Training
    network: nn.Module
    dataset: sandbox.Dataset
    order: str
    loss: Callable[[sandbox.Batch, float], sandbox.Losses]
    validate: Callable[[], Mapping[str, float]]
    score: str
    after_step: Callable[[AdamW, float, int], Mapping[str, float | Tensor]] | None = None
    begin: Callable[[], None] | None = None
    keep: Mapping[str, Any] = field(default_factory=dict)


def train(fit: Fit) -> dict[str, Any]:
    """Train to the end, or on to it from the last checkpoint; returns the last validation.

    The network is left with the weights to keep. The last checkpoint stays for the run to delete,
    once the task's result is kept. Raises RunError where the loss stops being finite.
    """
    run, settings, network = fit.run, fit.settings, fit.network
    checkpoints = sandbox.Checkpoints(run.task_folder / "checkpoints")
    if (state := checkpoints.newest()) is None:
        # dropout depends on the task, not on what was built or drawn before it
        torch.manual_seed(sandbox.derive_seed(run.seed, run.label))
        if fit.begin is not None:
            fit.begin()
    optimizer = AdamW(_groups(network), lr=settings.learning_rate, betas=settings.betas)
    average = _weights(network) if settings.ema else None
    total = -(-settings.num_images // settings.batch_size) * settings.batch_size
    done, best = 0, None
    if state is not None:
        done, best = _resume(fit, state, optimizer, average)
        run.rewind(done)
        run.say(f"going on from {done:,} images")
    batches, watch = _batches(fit, done), _Watch(run, settings, done)
    if state is not None:
        watch.sums, watch.counts = state["sums"], state["counts"]
    scores: dict[str, float] = dict(state["scores"]) if state else {}
    network.train()
    while done < total:
        watch.add(_step(fit, optimizer, next(batches), done / total))
        done += settings.batch_size
        if average is not None:
            _mix(average, network, settings.ema or 0.0, done // settings.batch_size)
        if fit.after_step is not None:
            watch.add(fit.after_step(optimizer, done / total, done))
        watch.pulse(done, total)
        if done == total or _due(done, settings.validate_every, settings.batch_size):
            scores = _validate(fit, average)
            run.report(done, total, **{f"validation/{name}": v for name, v in scores.items()})
            if best is None or scores[fit.score] < best:
                best = scores[fit.score]
                if settings.keep == "best":
                    kept = average if average is not None else _weights(network)
                    sandbox.write_tensors(run.task_folder / "best.safetensors", kept)
        if done == total or _due(done, _checkpoint_every(settings, total), settings.batch_size):
            watch.check(done)
            state = _state(fit, done, best, scores, optimizer, average)
            checkpoints.save(done, state | {"sums": watch.sums, "counts": watch.counts})
    _finish(fit, average)
    return {"images_seen": done, "validation": scores}


def _batches(fit: Fit, start: int) -> Iterator[sandbox.Batch]:
    return sandbox.stream(
        fit.dataset,
        "train",
        fit.settings.batch_size,
        seed=sandbox.derive_seed(fit.run.seed, fit.order),
        start=start,
        num_workers=fit.settings.num_workers,
    )


def _step(
    fit: Fit, optimizer: AdamW, batch: sandbox.Batch, progress: float
) -> Mapping[str, float | Tensor]:
    settings, device = fit.settings, fit.run.device
    for group in optimizer.param_groups:
        group["lr"] = settings.rate(progress)
        group["weight_decay"] = settings.decay_at(progress) if group["decays"] else 0.0
    dtype, seen = settings.dtype(device), {}
    optimizer.zero_grad(set_to_none=True)
    for part in _cut(batch, settings.accumulate):
        on_device = sandbox.Batch(part.images.to(device), part.labels.to(device))
        with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            losses = fit.loss(on_device, progress)
        share = len(part.labels) / len(batch.labels)
        (losses.total * share).backward()
        for name, value in {"loss": losses.total.detach(), **losses.parts}.items():
            seen[name] = seen.get(name, 0.0) + value * share
    norm = nn.utils.clip_grad_norm_(fit.network.parameters(), settings.clip)
    optimizer.step()
    return seen | {"gradient_norm": norm.detach(), "learning_rate": settings.rate(progress)}


class _Watch:
    """Sums scalars on the device and reads them only when a report is due."""

    def __init__(self, run: sandbox.Run, settings: Training, done: int) -> None:
        self.run, self.settings, self.last_done = run, settings, done
        self.sums: dict[str, Any] = {}
        self.counts: dict[str, int] = {}

    def add(self, scalars: Mapping[str, float | Tensor]) -> None:
        for name, value in scalars.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def pulse(self, done: int, total: int) -> None:
        if done < total and not _due(done, self.settings.report_every, self.settings.batch_size):
            if self.run.device.type == "cpu":
                self.check(done)  # nothing to wait for there: the very step is named
            return self.run.report(done, total)
        self.check(done)
        means = {name: float(value) / self.counts[name] for name, value in self.sums.items()}
        self.sums, self.counts, self.last_done = {}, {}, done
        return self.run.report(done, total, **means)

    def check(self, done: int) -> None:
        """Stop where the loss or its gradient is no longer finite."""
        sick = [
            name
            for name in ("loss", "gradient_norm")
            if name in self.sums and not torch.isfinite(torch.as_tensor(self.sums[name]))
        ]
        if sick:
            begin = done - self.settings.batch_size
            first = begin if self.run.device.type == "cpu" else self.last_done
            raise sandbox.RunError(
                f"{self.run.label}: the {sick[0]} is no longer finite, between image {first:,} and "
                f"image {done:,}; the last good checkpoint stays in "
                f"{self.run.task_folder / 'checkpoints'}; lower learning_rate or clip, in a new "
                "folder (--out) or over this one (--fresh)"
            )


def _validate(fit: Fit, average: dict[str, Tensor] | None) -> dict[str, float]:
    own = _weights(fit.network) if average is not None else None
    if average is not None:
        fit.network.load_state_dict(average)
    fit.network.eval()
    states = sandbox.random_states()
    try:
        with torch.no_grad():
            return dict(fit.validate())
    finally:
        sandbox.set_random_states(states)
        fit.network.train()
        if own is not None:
            fit.network.load_state_dict(own)


def _finish(fit: Fit, average: dict[str, Tensor] | None) -> None:
    best = fit.run.task_folder / "best.safetensors"
    if fit.settings.keep == "best" and best.exists():
        fit.network.load_state_dict(sandbox.read_tensors(best)[0])
    elif average is not None:
        fit.network.load_state_dict(average)
    fit.network.eval()


def _groups(network: nn.Module) -> list[dict[str, Any]]:
    """Decayed and undecayed parameters; timm's convention says which are spared."""
    spared = getattr(network, "no_weight_decay", set)()
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            groups[parameter.ndim > 1 and not name.endswith("bias") and name not in spared].append(
                parameter
            )
    return [{"params": p, "decays": decays} for decays, p in groups.items() if p]


def _cut(batch: sandbox.Batch, count: int) -> Iterator[sandbox.Batch]:
    pairs = zip(batch.images.chunk(count), batch.labels.chunk(count), strict=True)
    return (sandbox.Batch(images, labels) for images, labels in pairs)


def _due(done: int, every: int | None, batch_size: int) -> bool:
    """Whether a multiple of `every` was reached in this very step."""
    return every is not None and done // every > (done - batch_size) // every


def _checkpoint_every(settings: Training, total: int) -> int:
    return settings.checkpoint_every or max(settings.batch_size, total // 10)


def _weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


@torch.no_grad()
def _mix(average: dict[str, Tensor], network: nn.Module, decay: float, steps: int) -> None:
    """Exponential average with the usual ramp, so that early weights do not linger."""
    decay = min(decay, (1 + steps) / (10 + steps))
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            average[name].lerp_(tensor, 1 - decay)
        else:
            average[name].copy_(tensor)


def _state(
    fit: Fit,
    done: int,
    best: float | None,
    scores: Mapping[str, float],
    optimizer: AdamW,
    average: dict[str, Tensor] | None,
) -> State:
    return {
        "done": done,
        "best": best,
        "scores": dict(scores),
        "network": dict(fit.network.state_dict()),
        "keep": {name: kept.state_dict() for name, kept in fit.keep.items()},
        "optimizer": optimizer.state_dict(),
        "average": average,
        "random": sandbox.random_states(),
    }


def _resume(
    fit: Fit, state: State, optimizer: AdamW, average: dict[str, Tensor] | None
) -> tuple[int, float | None]:
    fit.network.load_state_dict(state["network"])
    for name, kept in fit.keep.items():
        kept.load_state_dict(state["keep"][name])
    optimizer.load_state_dict(state["optimizer"])
    if average is not None:
        for name, tensor in state["average"].items():
            average[name].copy_(tensor)
    sandbox.set_random_states(state["random"])
    return state["done"], state["best"]
