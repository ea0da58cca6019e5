"""Which of several backends is fastest for one call on a GPU.

The one idea to hold: nothing of the caller's is disturbed. The call's own tensors are attended to,
so no random number is drawn; and it happens in a thread of its own, where no mode of the caller's
is in force (autocast, FLOP counting, hooks on saved tensors, inference).
"""

import statistics
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

import sandbox
from sandbox import AttentionRequest, Mask

from .picks import Pick
from .plain import Attention

ROUNDS = 5
ROUND_MS = 20.0
"""Calls are repeated until they take about this long: of a call alone, or a graph of few, how long
it takes to launch counts, which happens while the GPU is still at work."""
MOST_CALLS = 200
MARGIN = 1.05
"""A later backend must be faster than an earlier one by more than this factor."""
TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""How far results may lie apart, relative to the largest; 1e-2 in other types."""


def fastest(
    backends: Mapping[str, Attention],
    request: AttentionRequest,
    tensors: tuple[Tensor, Tensor, Tensor],
    scale: float,
) -> Pick:
    """The pick among those that do not refuse; the first where none could be measured.

    One whose numbers are not the first one's, or that fails, is out; why is told.
    """
    willing = {name: b for name, b in backends.items() if b.refusal(request) is None}
    stream = torch.cuda.current_stream(tensors[0].device)
    with ThreadPoolExecutor(1) as thread:
        job = partial(_race, willing, request, tensors, scale, stream)
        times, failures = thread.submit(job).result()
    return picked(next(iter(backends)), times, failures)


def picked(first: str, times: Mapping[str, float], failures: Mapping[str, str]) -> Pick:
    """By milliseconds, in the order of preference."""
    told = [f"{name} {ms:.3g} ms" for name, ms in times.items()]
    told += [f"{name} failed: {reason}" for name, reason in failures.items()]
    if not times:
        return Pick(first, ", ".join(["nothing could be measured", *told]), certain=False)
    limit = MARGIN * min(times.values())
    return Pick(next(name for name, ms in times.items() if ms <= limit), ", ".join(told))


def _race(
    backends: Mapping[str, Attention],
    request: AttentionRequest,
    tensors: tuple[Tensor, Tensor, Tensor],
    scale: float,
    stream: torch.cuda.Stream,
) -> tuple[dict[str, float], dict[str, str]]:
    """Milliseconds of those that can, reasons of those that cannot."""
    calls: dict[str, Callable[[], list[Tensor]]] = {}
    failures: dict[str, str] = {}
    expected: list[Tensor] | None = None
    with torch.cuda.stream(stream), torch.set_grad_enabled(request.needs_grad):
        for name, backend in backends.items():
            call = partial(_attend, backend, request.needs_grad, tensors, request.mask, scale)
            try:
                found = call()  # compiles, plans
                if expected is None:
                    expected = found
                elif not all(map(agree, found, expected)):
                    raise ArithmeticError("its numbers are not those of the others")
                calls[name] = call
            except Exception as error:
                failures[name] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        del expected
        timed = {name: _timed(call, request.needs_grad, tensors[0]) for name, call in calls.items()}
        rounds = [{name: once() for name, once in timed.items()} for _ in range(ROUNDS)]
    return {name: statistics.median(each[name] for each in rounds) for name in calls}, failures


def _attend(
    backend: Attention,
    needs_grad: bool,
    tensors: tuple[Tensor, Tensor, Tensor],
    mask: Mask,
    scale: float,
) -> list[Tensor]:
    """The output and, if asked for, the gradients."""
    q, k, v = inputs = [x.detach().requires_grad_(needs_grad) for x in tensors]
    out = backend.compute(q, k, v, mask, scale)
    if not needs_grad:
        return [out]
    return [out.detach(), *torch.autograd.grad(out, inputs, out.detach())]


def agree(found: Tensor, expected: Tensor) -> bool:
    """Whether two backends' results are the same up to rounding; so is all, where it overflows."""
    largest = expected.abs().max()
    limit = TOLERANCE.get(expected.dtype, 1e-2) * largest
    return not bool(largest.isfinite()) or bool((found - expected).abs().max() <= limit)


def _timed(call: Callable[[], list[Tensor]], needs_grad: bool, like: Tensor) -> Callable[[], float]:
    """What tells the milliseconds of one call: without gradients of a CUDA graph of several.

    Drawing goes in steps of a few tokens, which take less time than it takes to launch them; in a
    graph, as drawing is replayed, only what the GPU does counts.
    """
    repeats = _repeats(call)
    if needs_grad:
        return partial(_milliseconds, call, repeats)

    def several(_: Tensor, __: torch.Generator) -> Tensor:
        for _ in range(repeats):
            found = call()[0]
        return found

    try:
        rng = torch.Generator(like.device)
        graph = sandbox.Recording(several, like.new_zeros(1), rng).graph
    except Exception:  # whatever a library raises where it cannot be captured
        return partial(_milliseconds, call, repeats)
    return lambda: _milliseconds(graph.replay, 1) / repeats


def _repeats(call: Callable[[], object]) -> int:
    call()
    return max(1, min(MOST_CALLS, int(ROUND_MS / max(1e-3, _milliseconds(call, 1)))))


def _milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Of one call, between CUDA events around several."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(repeats):
        call()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended)) / repeats
