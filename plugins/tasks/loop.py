"""The training loop that every task which trains shares.

It is read in one go: resume, then step, report, validate, save, done? Everything that decides how
the training goes on is in one state, saved by images seen, so that a run stopped at any moment ends
with the same weights as one that was not. Of several processes each runs this loop over its share
of every batch; the first one alone validates and writes.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import sandbox

from .settings import Training, autocast
from .upkeep import (
    Average,
    average_buffers,
    check_together,
    optimizer_of,
    restore,
    state_of,
    weights_of,
)
from .watch import Watch, add_scaled, is_due


@dataclass
class Fit:
    """What a task hands to the loop.

    The order of the data set's images derives from the run's seed and the name `order`.
    `loss(batch, progress)` gives the losses of a batch that is on the device;
    `after_step(optimizer, progress, done)` cares for what is no gradient's business and returns
    scalars; `validate()` returns scalars, of which `score` (lower is better) picks the best
    weights. `begin()` is called once, before the first step of a training and never on going on
    with one; `keep` are objects with `state_dict()` and `load_state_dict()` that checkpoints hold
    besides the network. `compile()` is what compiling means; by default, `network.compile()`.
    """

    run: sandbox.Run
    settings: Training
    network: nn.Module
    dataset: sandbox.Dataset
    order: str
    loss: Callable[[sandbox.Batch, float], sandbox.Losses]
    validate: Callable[[], Mapping[str, float]]
    score: str
    after_step: Callable[[Optimizer, float, int], Mapping[str, float | Tensor]] | None = None
    begin: Callable[[], None] | None = None
    keep: Mapping[str, Any] = field(default_factory=dict)
    compile: Callable[[], None] | None = None
    spare_memory: bool = False
    """Where it is compiled, compute cheap things again in the backward pass."""


def train(fit: Fit) -> dict[str, Any]:
    """Train to the end, or on to it from the last checkpoint; returns the last validation.

    The network is left with the weights to keep. The last checkpoint stays for the run to delete,
    once the task's result is kept. Raises RunError where the loss stops being finite or processes
    drift apart, SandboxError where the batch cannot be shared among them.
    """
    _check_shares(fit)
    compiles = fit.settings.compiles(fit.run.device)
    sparing = fit.spare_memory
    compiler = sandbox.compiling(spare_memory=sparing) if compiles else nullcontext()
    with laid_out_for_speed(fit.network, fit.run.device), compiler:
        return _train(fit)


def _train(fit: Fit) -> dict[str, Any]:
    run, settings, network = fit.run, fit.settings, fit.network
    checkpoints = sandbox.Checkpoints(run.task_folder / "checkpoints")
    if (state := checkpoints.newest()) is None:
        _begin(fit)
    optimizer = optimizer_of(network, settings, run.device)
    average = Average(network, settings.ema) if settings.ema else None
    total = -(-settings.num_images // settings.batch_size) * settings.batch_size
    done = state["done"] if state else 0
    best, scores = (state["best"], dict(state["scores"])) if state else (None, {})
    watch = Watch(run, settings, done)
    keep = {**fit.keep, "watch": watch}
    if state is not None:
        restore(state, network, optimizer, average, keep)
        run.rewind(done)
        run.say(f"going on from {done:,} images")
    _check_start(run, done)
    _part_ways(run, done)
    _compile(fit)
    network.train()
    with closing(_batches(fit, done)) as batches:
        while done < total:
            with watch.waiting():
                batch = next(batches)
            watch.add(_step(fit, optimizer, batch, done / total))
            done += settings.batch_size
            if average is not None:
                average.update(done // settings.batch_size)
            if fit.after_step is not None:
                watch.add(fit.after_step(optimizer, done / total, done))
            watch.pulse(done, total)
            if done == total or is_due(done, settings.validate_every, settings.batch_size):
                with watch.pause():
                    scores = _validate(fit, average)
                run.report(done, total, **{f"validation/{name}": v for name, v in scores.items()})
                if best is None or scores[fit.score] < best:
                    best = scores[fit.score]
                    _keep_best(fit, average)
            if done == total or is_due(done, _save_every(settings, total), settings.batch_size):
                watch.check(done)
                position = {"done": done, "best": best, "scores": scores}
                with watch.pause():
                    _save(fit, checkpoints, position, optimizer, average, keep)
    _finish(fit, average)
    return {"images_seen": done, "validation": scores}


def _check_shares(fit: Fit) -> None:
    settings, size = fit.settings, sandbox.world_size()
    if size > 1 and settings.batch_size % (size * settings.accumulate):
        raise sandbox.SandboxError(
            f"{fit.run.label}: batch_size {settings.batch_size} is not divisible by {size} "
            f"processes x accumulate {settings.accumulate}: make it a multiple of "
            f"{size * settings.accumulate}, or start another number of processes"
        )


@contextmanager
def laid_out_for_speed(network: nn.Module, device: torch.device) -> Iterator[None]:
    """On a GPU, convolutions in their fastest memory order and by the fastest kernel at hand.

    What is left in float32 (heads, say) runs as TF32; what must be exact says so itself.
    """
    if device.type != "cuda":
        yield
        return
    matmul: Any = torch.backends.cuda.matmul
    precision, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    convolves = any(parameter.ndim == 4 for parameter in network.parameters())
    try:
        if convolves:
            network.to(memory_format=torch.channels_last)
        with sandbox.fastest_convolutions():
            yield
    finally:
        matmul.fp32_precision = precision
        if convolves:
            network.to(memory_format=torch.contiguous_format)


def _begin(fit: Fit) -> None:
    """What comes before the first step, the same in every process."""
    # Dropout depends on the task, not on what was built or drawn before it.
    torch.manual_seed(sandbox.derive_seed(fit.run.seed, fit.run.label))
    if fit.begin is not None:
        fit.begin()
    sandbox.broadcast_([*fit.network.parameters(), *fit.network.buffers()])


def _check_start(run: sandbox.Run, done: int) -> None:
    if (first := sandbox.agree(done)) != done:
        raise sandbox.SandboxError(
            f"{run.label}: process {sandbox.rank()} finds a checkpoint of {done:,} images in "
            f"{run.task_folder / 'checkpoints'}, process 0 one of {first:,}: all processes must "
            "see one run folder; put it where all machines can read it (--out)"
        )


def _part_ways(run: sandbox.Run, done: int) -> None:
    """Dropout of its own for every process; the first one's is that of a process alone.

    By position, at the start and with every checkpoint, so that no state but the first one's needs
    to be kept.
    """
    if sandbox.rank() > 0:
        torch.manual_seed(sandbox.derive_seed(run.seed, run.label, sandbox.rank(), done))


def _compile(fit: Fit) -> None:
    if fit.settings.compiles(fit.run.device):
        fit.run.say("the network is compiled as it goes (compile: off does without)")
        (fit.compile or fit.network.compile)()


def _batches(fit: Fit, start: int) -> Any:
    return sandbox.stream(
        fit.dataset,
        "train",
        fit.settings.batch_size,
        seed=sandbox.derive_seed(fit.run.seed, fit.order),
        start=start,
        num_workers=fit.settings.num_workers,
        device=fit.run.device,
        share=(sandbox.rank(), sandbox.world_size()),
    )


def _step(
    fit: Fit, optimizer: Optimizer, batch: sandbox.Batch, progress: float
) -> Mapping[str, float | Tensor]:
    settings, device = fit.settings, fit.run.device
    for group in optimizer.param_groups:
        group["lr"] = settings.rate(progress)
        group["weight_decay"] = settings.decay_at(progress) if group["decays"] else 0.0
    seen: dict[str, Any] = {}
    torch.compiler.cudagraph_mark_step_begin()
    optimizer.zero_grad(set_to_none=True)
    for part in _cut(batch, settings.accumulate):
        with autocast(device, settings.precision):
            losses = fit.loss(part, progress)
        share = len(part.labels) / len(batch.labels)
        (losses.total if share == 1 else losses.total * share).backward()
        add_scaled(seen, {"loss": losses.total, **losses.parts}, share)
    parameters = [p for p in fit.network.parameters() if p.grad is not None]
    _exchange([p.grad for p in parameters if p.grad is not None], seen)
    norm = nn.utils.clip_grad_norm_(parameters, settings.clip)
    optimizer.step()
    return seen | {"gradient_norm": norm, "learning_rate": settings.rate(progress)}


def _exchange(gradients: list[Tensor], seen: dict[str, Any]) -> None:
    """Put the mean over all processes in place of gradients and scalars."""
    if sandbox.world_size() == 1:
        return
    told = {name: value for name, value in seen.items() if isinstance(value, Tensor)}
    values = torch.stack([value.float() for value in told.values()])
    sandbox.all_reduce_mean_([*gradients, values])
    seen.update(zip(told, values.unbind(), strict=True))


def _validate(fit: Fit, average: Average | None) -> dict[str, float]:
    """The scores of the weights as they would be kept, by process 0; known to all."""
    average_buffers(fit.network, average)
    if sandbox.rank() > 0:
        return sandbox.agree({})
    own = weights_of(fit.network) if average is not None else None
    if average is not None:
        average.check()
        fit.network.load_state_dict(average.weights)
    fit.network.eval()
    states = sandbox.random_states()
    try:
        with torch.no_grad():
            return sandbox.agree(dict(fit.validate()))
    finally:
        sandbox.set_random_states(states)
        fit.network.train()
        if own is not None:
            fit.network.load_state_dict(own)


def _keep_best(fit: Fit, average: Average | None) -> None:
    if fit.settings.keep == "best" and sandbox.rank() == 0:
        kept = average.weights if average is not None else fit.network.state_dict()
        sandbox.write_tensors(fit.run.task_folder / "best.safetensors", kept)


def _save(
    fit: Fit,
    checkpoints: sandbox.Checkpoints,
    position: Mapping[str, Any],
    optimizer: Optimizer,
    average: Average | None,
    keep: Mapping[str, Any],
) -> None:
    average_buffers(fit.network, average)
    check_together(fit.network)
    if sandbox.rank() == 0:
        state = state_of(fit.network, optimizer, average, keep)
        checkpoints.save(position["done"], {**position, **state})
    _part_ways(fit.run, position["done"])


def _finish(fit: Fit, average: Average | None) -> None:
    sandbox.barrier()  # the best weights are written
    best = fit.run.task_folder / "best.safetensors"
    if fit.settings.keep == "best" and best.exists():
        fit.network.load_state_dict(sandbox.read_tensors(best)[0])
    elif average is not None:
        fit.network.load_state_dict(average.weights)
    fit.network.eval()


def _cut(batch: sandbox.Batch, count: int) -> Iterator[sandbox.Batch]:
    pairs = zip(batch.images.chunk(count), batch.labels.chunk(count), strict=True)
    return (sandbox.Batch(images, labels) for images, labels in pairs)


def _save_every(settings: Training, total: int) -> int:
    return settings.checkpoint_every or max(settings.batch_size, total // 10)
