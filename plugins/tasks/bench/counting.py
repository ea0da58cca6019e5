"""How much work a generation is: floating-point operations, and bytes that must be read."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sandbox

from ..clock import Precision
from ..drawing import drawing_fast
from ..replacing import replaced
from ..settings import autocast

HOW = {
    "flops": "torch.utils.flop_counter over one image: matrix products, convolutions and attention "
    "as torch offers it; kernels that are no operator of torch's (xformers) count nothing",
    "bytes": "the network's weights as they are stored, once for every step, and of the state that "
    "begin() made (keys and values) the share filled after each step, read once; decoder, "
    "activations and casts are not in it, so it is a lower bound",
    "share_of_matmul": "FLOPs a second of the whole generation (decoding included) over those of "
    "the matrix product in the same precision, or in float32 where that is faster here",
    "share_of_copy": "those bytes a second over those a copy reads and writes",
    "split": "by marks before and after each part's methods, in calls of their own; of a recorded "
    "generation within a recording of its own, set anew by every replay; `rest` is what is left of "
    "those calls' whole; where nothing is recorded on a GPU, waiting for launches counts where it "
    "happens",
    "seconds": "of a generation, from call to image with nothing else on the device; encoding, "
    "decoding and training in calls one after the other without waiting between, as in bulk; after "
    "half a second of such calls or more on a GPU, which is slower at first",
    "first_seconds": "the first call, with all that is set up then: compiled kernels and "
    "attention's picks where neither this process nor one before it had any, and a generation's "
    "CUDA graph; FLOPs are counted afterwards",
    "ended_seconds": "since the measurement began, as `began_seconds` (which is when the row "
    "before ended): what a row took beyond its calls, it compiled or counted",
    "times_as_fast": "the median of the same row plainly (`fast` off, not compiled) over its own",
    "kernels": "with `profile`, what ran on the device in one call more (on a CPU, operators), "
    "made when all rows had been timed, the 60 that took longest; `kernels_seconds` is what all "
    "took, roughly the row's seconds less the time in which nothing ran (kernels may run side by "
    "side, and watching them takes time); `kernels_launched` is how many there were, copies and "
    "fills included, and `kernels_gaps_seconds` in how much of the time from first to last none "
    "ran",
    "peak_bytes": "tensors allocated on a GPU, weights included; on a CPU the process's resident "
    "set, torch itself included",
    "ceilings": "the best of a few products and copies, which others' work here slows down",
    "training": "ids of one noise image, AdamW, gradients clipped; FLOPs are those of the "
    "uncompiled step, what it computes twice (blocks with `recompute`) counted twice",
    "compiled": "built by torch.compile for that batch size, as for long trainings and large "
    "caches; encoder and decoder in channels-last order too",
    "ids_changed": "the share of ids that are not those of an exact float32 encoder, of 1/f noise; "
    "of real images `inspect-tokenizer` tells it, scale by scale (`precisions: true`)",
}
"""What the numbers of `bench.json` mean."""


@dataclass(frozen=True)
class Work:
    """One image's work."""

    flops: int
    weight_bytes: int | None
    """Read by a batch of any size."""
    cache_bytes: int | None
    """Read for each image of a batch."""


def work_of(run: sandbox.Run, precision: Precision) -> Work:
    """Count one image's generation; bytes, where a `Backbone` makes a tokenizer's steps."""
    network, states, steps = run.generator.network, [], 0
    label = torch.zeros(1, dtype=torch.long, device=run.device)

    def begun(*words: Any, **named: Any) -> Any:
        states.append(begin(*words, **named))
        return states[-1]

    def stepped(*words: Any, **named: Any) -> Any:
        nonlocal steps
        steps += 1
        return step(*words, **named)

    def generate() -> int:
        with (
            drawing_fast(run, "off"),
            autocast(run.device, precision),
            FlopCounterMode(display=False) as counter,
        ):
            run.generator.generate(label, run.rng("count"))
        return int(counter.get_total_flops())

    if not (isinstance(network, sandbox.Backbone) and run.settings("tokenizer")):
        return Work(generate(), None, None)
    begin, step = network.begin, network.step
    with replaced(network, "begin", begun), replaced(network, "step", stepped):
        flops = generate()
    layout = run.tokenizer.layout
    if len(states) != 1 or steps != len(layout.steps):
        return Work(flops, None, None)
    held = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(states[0]))
    filled = sum(span.stop for span in layout.spans) / layout.seq_len
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    return Work(flops, weights * steps, round(held * filled))


def training_flops(loss: Callable[[], Tensor]) -> int:
    """Of a loss, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    return int(counter.get_total_flops())


def _tensors(state: Any) -> Iterator[Tensor]:
    """Every tensor in a state, however it is nested, once; networks in it are no state."""
    seen: set[int] = set()
    waiting = [state]
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, nn.Module | str):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, Sequence):
            waiting += value
        elif hasattr(value, "__dict__"):
            waiting += vars(value).values()
