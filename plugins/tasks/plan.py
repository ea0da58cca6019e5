"""What a task will cost, measured on one trial step before the long work begins.

The trial runs the real step once to warm up and once on the clock, counts its floating-point
operations and what autograd keeps, and then puts weights, gradients and random streams back.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from time import perf_counter
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sandbox

from .drawing import drawing_fast
from .settings import Training, autocast


def training_plan(
    run: sandbox.Run, settings: Training, network: nn.Module, loss: Callable[[int], Tensor]
) -> dict[str, str]:
    """The plan of a training; `loss(n)` is the loss of any `n` images."""
    num_parameters = sum(p.numel() for p in network.parameters())
    trial_size = max(
        1, min(settings.batch_size // settings.accumulate, 2 if _large(network) else 64)
    )

    def trial() -> Tensor:
        with autocast(run.device, settings.precision):
            return loss(trial_size)

    seconds, flops, kept = _trial(network, trial, run.device)
    per_image, per_batch = seconds / trial_size, settings.batch_size // settings.accumulate
    weights = num_parameters * (16 + (4 if settings.ema else 0))
    activations = kept / trial_size * per_batch
    return {
        "network": f"{type(network).__name__}, {num_parameters / 1e6:.2f} M parameters",
        "images": f"{settings.num_images:,}, in batches of {settings.batch_size}",
        "per image": f"{flops / trial_size / 1e9:.3g} GFLOP, forward and backward",
        "memory": f"about {gib(weights + activations)} ({gib(weights)} weights, gradients and "
        f"optimiser, {gib(activations)} activations) of {gib(_available(run.device))} here",
        "time": f"about {duration(per_image * settings.num_images)} on "
        f"{sandbox.device_name(run.device)} ({1 / per_image:.3g} images/s in a trial step)",
    }


def sampling_plan(run: sandbox.Run, num_images: int, batch_size: int) -> dict[str, str]:
    """The plan of a generation, from one image generated on trial."""
    network, label = run.generator.network, torch.zeros(1, dtype=torch.long, device=run.device)
    with _own_randomness(run.device), drawing_fast(run, "off"):  # replayed, nothing can be counted
        if run.device.type == "cuda":
            run.generator.generate(label, run.rng("warm-up"))
        began = _now(run.device)
        with FlopCounterMode(display=False) as counter:
            run.generator.generate(label, run.rng("trial"))
        seconds = _now(run.device) - began
    num_parameters = sum(p.numel() for p in network.parameters())
    return {
        "network": f"{type(network).__name__}, {num_parameters / 1e6:.2f} M parameters",
        "images": f"{num_images:,}, in batches of {batch_size}",
        "per image": f"about {counter.get_total_flops() / 1e9:.3g} GFLOP, decoding included",
        "memory": f"{gib(4 * num_parameters)} for the network's weights, of "
        f"{gib(_available(run.device))} here",
        "time": f"at most {duration(seconds * num_images)} on {sandbox.device_name(run.device)} "
        f"({seconds:.2g} s for one image alone)",
    }


def _large(network: nn.Module) -> bool:
    return sum(p.numel() for p in network.parameters()) > 5e7


def _trial(
    network: nn.Module, loss: Callable[[], Tensor], device: torch.device
) -> tuple[float, float, float]:
    """Seconds, FLOPs and bytes kept for the backward pass of one step."""
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    own = {id(p) for p in network.parameters()}
    training, packed = network.training, list[ref[Tensor]]()

    def pack(tensor: Tensor) -> Tensor:
        if id(tensor) not in own:
            packed.append(ref(tensor))
        return tensor

    with _own_randomness(device):
        network.train()
        with FlopCounterMode(display=False) as counter:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                value = loss()
            kept = _bytes_of(packed)
            value.backward()
        network.zero_grad(set_to_none=True)
        began = _now(device)
        loss().backward()
        seconds = _now(device) - began
    network.zero_grad(set_to_none=True)
    network.load_state_dict(before)
    network.train(training)
    return seconds, float(counter.get_total_flops()), float(kept)


def _bytes_of(tensors: Iterable[ref[Tensor]]) -> int:
    """Of those that are still there, and of what several share once."""
    storages = [x.untyped_storage() for tensor in tensors if (x := tensor()) is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _own_randomness(device: torch.device) -> AbstractContextManager[None]:
    """Put the random streams of the CPU and of this one GPU back afterwards."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def _available(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return sandbox.memory_bytes()


def gib(num_bytes: float) -> str:
    """`1.5 GiB`, or MiB where that is less than one."""
    if num_bytes < 2**30:
        return f"{num_bytes / 2**20:.0f} MiB"
    return f"{num_bytes / 2**30:.1f} GiB"


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.4 h` or `8.2 days`."""
    for limit, size, unit in ((90, 1, "s"), (5400, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}" if size < 3600 else f"{seconds / size:.1f} {unit}"
    return f"{seconds / 86_400:.1f} days"
