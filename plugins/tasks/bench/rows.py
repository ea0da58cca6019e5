"""One row a measurement: a part, at a batch size, in a precision."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sandbox

from ..clock import Clock, attempt, forget_peak, peak_bytes, spread
from ..compiled import compiled_generator
from ..drawing import drawing_fast
from ..encoding import coding, in_bulk
from ..loop import laid_out_for_speed
from ..settings import Training, autocast
from ..upkeep import optimizer_of
from .counting import Work, training_flops
from .kernels import kernels_of
from .split import Split, splits

_STAGES = ("forward", "backward", "optimizer")


@dataclass(frozen=True)
class Setting:
    """How one row is measured."""

    precision: Any
    """One of `Precision`; of encoders and decoders, `tf32` too."""
    batch_size: int
    repeats: int
    warmup: int
    compiled: bool = False
    """Whether encoding, decoding and training run as compiled."""
    fast: sandbox.Switch | None = None
    """How a generator draws; None of one that has no such setting, and of other parts."""
    watched: bool = False
    """Whether the kernels of one call are told instead of the seconds of several."""

    @property
    def plain(self) -> bool:
        """Whether nothing is compiled or recorded."""
        return not self.compiled and self.fast in (None, "off")


def generation(
    run: sandbox.Run,
    clock: Clock,
    setting: Setting,
    split: Split,
    work: Callable[[], Work | None],
) -> dict[str, Any]:
    """Whole generations, then as many again with their parts timed."""
    size = setting.batch_size
    labels = torch.arange(size, device=run.device) % run.num_classes
    made: list[Tensor] = []

    def call() -> None:
        with autocast(run.device, setting.precision):
            made[:] = [run.generator.generate(labels, run.rng("generate"))]

    def measure() -> dict[str, Any]:
        known = forget_peak(clock.device)
        (first,) = clock.time(call, 1)
        if setting.fast == "auto":  # recorded when it comes a fourth time
            clock.time(call, 3)
        if setting.watched:
            return _watched(clock, call, setting)
        found = _timed(clock, call, setting, alone=True) | {"first_seconds": first}
        found["peak_bytes"] = peak_bytes(clock.device) if known else None
        found |= _splits(split, call, setting.repeats)
        if not made[0].isfinite().all():
            found["status"] = "not finite"
        return found | shares(found["median_seconds"], size, work())

    with drawing_fast(run, setting.fast or "off"), _refusing_the_plain_path():
        return _row(setting, measure)


def _splits(split: Split, call: Callable[[], None], repeats: int) -> dict[str, Any]:
    """The seconds of its parts, or why there are none: what is recorded with marks in it needs
    memory of its own."""
    told = attempt(lambda: {"splits": splits(split, call, repeats)})
    if "splits" in told:
        return {"splits": told["splits"]}
    return {"splits_left_out": told.get("reason", told["status"])}


def encoding(run: sandbox.Run, clock: Clock, setting: Setting) -> dict[str, Any]:
    """The tokenizer's `encode` of noise, and the share of ids that are not those of float32."""
    tokenizer = run.tokenizer

    def measure() -> dict[str, Any]:
        images = noise(run, setting.batch_size)
        if setting.watched:
            return _watched(clock, lambda: tokenizer.encode(images), setting)
        found = _timed(clock, lambda: tokenizer.encode(images), setting)
        ids = tokenizer.encode(images)
        with coding(run.device, "float32"):
            exact = tokenizer.encode(images)
        return found | {"ids_changed": float((ids != exact).double().mean())}

    return _coding(run, setting, measure)


def decoding(run: sandbox.Run, clock: Clock, setting: Setting) -> dict[str, Any]:
    """The tokenizer's `decode` of random ids."""
    tokenizer = run.tokenizer

    def measure() -> dict[str, Any]:
        shape = setting.batch_size, tokenizer.layout.seq_len
        ids = torch.randint(
            tokenizer.vocab_size, shape, generator=run.rng("ids"), device=run.device
        )
        how = _watched if setting.watched else _timed
        return how(clock, lambda: tokenizer.decode(ids), setting)

    return _coding(run, setting, measure)


def training(run: sandbox.Run, clock: Clock, setting: Setting) -> dict[str, Any]:
    """A step as `train-generator` takes it: loss, gradients, optimiser. Puts the weights back."""
    plain, size = run.generator, setting.batch_size
    network, settings = plain.network, Training(num_images=size, batch_size=size)
    optimizer = optimizer_of(network, settings, run.device)
    before = {name: t.detach().cpu().clone() for name, t in network.state_dict().items()}

    def measure() -> dict[str, Any]:
        image = noise(run, 1) if run.settings("tokenizer") else _blank(run)
        prepared = plain.prepare(image)
        labels = torch.arange(size, device=run.device) % run.num_classes
        prepared = prepared.expand(size, *prepared.shape[1:]).contiguous()
        stages: list[list[Any]] = []

        def loss(made: sandbox.Generator) -> Tensor:
            with autocast(run.device, setting.precision):
                return made.loss(prepared, labels).total

        def step(made: sandbox.Generator) -> None:
            marks = [clock.mark()]
            optimizer.zero_grad(set_to_none=True)
            total = loss(made)
            marks.append(clock.mark())
            total.backward()
            marks.append(clock.mark())
            parameters = [p for p in network.parameters() if p.grad is not None]
            nn.utils.clip_grad_norm_(parameters, settings.clip)
            optimizer.step()
            stages.append([*marks, clock.mark()])

        if not setting.watched:
            counted = attempt(lambda: {"flops": training_flops(lambda: loss(plain))}).get("flops")
        with compiled_generator(plain) if setting.compiled else nullcontext(plain) as made:
            if setting.watched:
                return _watched(clock, lambda: step(made), setting)
            found = _timed(clock, lambda: step(made), setting)
        splits = [
            dict(zip(_STAGES, map(clock.seconds, marks, marks[1:]), strict=False))
            for marks in stages[-setting.repeats :]
        ]
        work = Work(counted // size, None, None) if counted else None
        return found | {"splits": splits} | shares(found["median_seconds"], size, work)

    with laid_out_for_speed(network, run.device):
        network.train()
        try:
            return _row(setting, measure)
        finally:
            network.zero_grad(set_to_none=True)
            network.load_state_dict(before)
            network.eval()


def noise(run: sandbox.Run, num_images: int) -> Tensor:
    """Noise of the tokenizer's size, as strong in every octave, which is as photographs are."""
    size, rng = run.tokenizer.image_size, run.rng("noise")
    sides = [2**octave for octave in range(min(size).bit_length())]
    images = torch.zeros(num_images, 3, *size, device=run.device)
    for side in sides:
        drawn = torch.rand(num_images, 3, side, side, generator=rng, device=run.device) * 2 - 1
        images += F.interpolate(drawn, size, mode="bilinear")
    return (images / len(sides) ** 0.5).clamp(-1, 1)


def keep_trace(run: sandbox.Run, setting: Setting, path: Path) -> dict[str, Any]:
    """One generation as a Chrome trace."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if run.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    labels = torch.arange(setting.batch_size, device=run.device) % run.num_classes
    with drawing_fast(run, setting.fast or "off"), autocast(run.device, setting.precision):
        run.generator.generate(labels, run.rng("warm-up"))
        with torch.profiler.profile(activities=activities, acc_events=True) as profile:
            run.generator.generate(labels, run.rng("profile"))
            Clock(run.device).settle()
    with sandbox.atomic(path) as draft:
        profile.export_chrome_trace(str(draft))
    return {}


def shares(seconds: float, batch_size: int, work: Work | None) -> Mapping[str, Any]:
    """FLOPs and bytes of a batch, a second."""
    if work is None:
        return {}
    found: dict[str, Any] = {"flops": work.flops * batch_size}
    found["flops_per_second"] = found["flops"] / seconds
    if work.weight_bytes is not None and work.cache_bytes is not None:
        found["bytes"] = work.weight_bytes + work.cache_bytes * batch_size
        found["bytes_per_second"] = found["bytes"] / seconds
    return found


def _blank(run: sandbox.Run) -> Tensor:
    return torch.zeros(1, 3, *run.dataset.image_size, device=run.device)


def _coding(
    run: sandbox.Run, setting: Setting, measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Encoder and decoder as they are called by others; compiled, as where a cache is written."""
    half = setting.precision == "float16"
    precise = autocast(run.device, "float16") if half else coding(run.device, setting.precision)
    bulk = in_bulk(run.tokenizer, run.device, compiled=True)
    with torch.no_grad(), bulk if setting.compiled else nullcontext(), precise:
        return _row(setting, measure)


def _row(setting: Setting, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Any part must work plainly in float32; another precision, or to be fast, it may refuse."""
    where: dict[str, Any] = {"precision": setting.precision, "batch_size": setting.batch_size}
    where |= {"compiled": True} if setting.compiled else {}
    where |= {"fast": setting.fast} if setting.fast is not None else {}
    strict = setting.precision == "float32" and setting.plain
    return {**where, **attempt(measure, strict=strict)}


@contextmanager
def _refusing_the_plain_path() -> Iterator[None]:
    """What cannot be recorded is refused: as slow as the plain row, it would pass for fast."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", sandbox.NotRecorded)
        yield


def _timed(
    clock: Clock, call: Callable[[], Any], setting: Setting, *, alone: bool = False
) -> dict[str, Any]:
    """Seconds, their spread, and what follows from them; of each call `alone`, as who waits for it
    sees it, or of one after the other, as in bulk, and then the peak of memory too."""
    known = not alone and forget_peak(clock.device)
    before = clock.warm_up(call, setting.warmup)
    timed = clock.time if alone else clock.time_on_end
    seconds = timed(call, setting.repeats)
    found = spread(seconds)
    median = found["median_seconds"]
    peak = peak_bytes(clock.device) if known else None
    return {
        "first_seconds": [*before, *seconds][0],
        "seconds": seconds,
        **found,
        "ms_per_image": 1000 * median / setting.batch_size,
        "images_per_second": setting.batch_size / median,
        "peak_bytes": peak,
    }


def _watched(clock: Clock, call: Callable[[], Any], setting: Setting) -> dict[str, Any]:
    """The kernels of one call, after as many as go before what is timed."""
    clock.warm_up(call, setting.warmup)
    return kernels_of(clock, call)
