"""What a training keeps besides its network: the optimiser, the average of the weights, a state.

The one thing to hold in mind: the state decides everything that is to come, so a training that is
stopped at any moment ends with the weights of one that was not.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import sandbox

from .settings import Training


def optimizer_of(network: nn.Module, settings: Training, device: torch.device) -> Optimizer:
    """What the settings name, over decayed and undecayed parameters; on a GPU in a few launches.

    Spared of decay are biases, norms and, by timm's convention, what the network excludes.
    """
    spared = getattr(network, "no_weight_decay", set)()
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.endswith("bias") and name not in spared
            groups[decays].append(parameter)
    apart = [{"params": p, "decays": decays} for decays, p in groups.items() if p]
    rate, fused = settings.learning_rate, True if device.type == "cuda" else None
    if settings.optimizer == "sgd":
        return SGD(apart, lr=rate, momentum=settings.betas[0], nesterov=True, fused=fused)
    return AdamW(apart, lr=rate, betas=settings.betas, fused=fused)


class Average:
    """An exponential average of a network's weights; `weights` is a state dict of its own."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network, self.decay = network, decay
        self.weights = weights_of(network)
        self._live = dict(network.state_dict())  # views: they see every change made in place
        floating = [name for name, tensor in self._live.items() if tensor.is_floating_point()]
        whole = [name for name in self._live if name not in set(floating)]
        self._mixed = [self.weights[n] for n in floating], [self._live[n] for n in floating]
        self._copied = [self.weights[n] for n in whole], [self._live[n] for n in whole]

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Take in the network after `steps` steps, with the usual ramp: early weights go soon."""
        decay = min(self.decay, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(*self._mixed, weight=1 - decay)
        if self._copied[0]:
            torch._foreach_copy_(*self._copied)

    def check(self) -> None:
        """Raise ValueError where a tensor of the network was replaced, so that none is missed."""
        for name, tensor in self.network.state_dict().items():
            if tensor.data_ptr() != self._live[name].data_ptr():
                raise ValueError(
                    f"{type(self.network).__name__} replaces its {name!r} while it is trained: "
                    "change it in place (copy_), or set ema: null"
                )


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """A copy of all weights."""
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def state_of(
    network: nn.Module, optimizer: Optimizer, average: Average | None, keep: Mapping[str, Any]
) -> dict[str, Any]:
    """All that decides how the training goes on, but for its position."""
    return {
        "network": dict(network.state_dict()),
        "keep": {name: kept.state_dict() for name, kept in keep.items()},
        "optimizer": optimizer.state_dict(),
        "average": average.weights if average else None,
        "random": sandbox.random_states(),
    }


def restore(
    state: Mapping[str, Any],
    network: nn.Module,
    optimizer: Optimizer,
    average: Average | None,
    keep: Mapping[str, Any],
) -> None:
    """Put everything back to where `state_of` saw it."""
    network.load_state_dict(state["network"])
    for name, kept in keep.items():
        kept.load_state_dict(state["keep"][name])
    load_optimizer(optimizer, state["optimizer"])
    if average is not None:
        for name, tensor in state["average"].items():
            average.weights[name].copy_(tensor)
    sandbox.set_random_states(state["random"])


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load a state from a file, where tensors lie plain; moments then lie as their parameters do.

    A fused step pairs a parameter with its moments by place in memory.
    """
    optimizer.load_state_dict(state)
    for parameter, moments in optimizer.state.items():
        for name, tensor in moments.items():
            if isinstance(tensor, Tensor) and tensor.shape == parameter.shape:
                moments[name] = torch.empty_like(parameter).copy_(tensor)


@torch.no_grad()
def average_buffers(network: nn.Module, average: Average | None) -> None:
    """Give all processes the mean of their statistics (those of batch normalisation, say).

    In double precision, in which the mean of equal numbers is that number.
    """
    if sandbox.world_size() == 1:
        return
    names = {name for name, _ in network.named_buffers()}
    states = [network.state_dict(), average.weights if average else {}]
    buffers = [
        tensor
        for state in states
        for name, tensor in state.items()
        if name in names and tensor.is_floating_point()
    ]
    if buffers:
        wide = [tensor.double() for tensor in buffers]
        sandbox.all_reduce_mean_(wide)
        torch._foreach_copy_(buffers, wide)


@torch.no_grad()
def check_together(network: nn.Module) -> None:
    """Raise RunError where the processes no longer train one and the same network."""
    if sandbox.world_size() == 1:
        return
    parameters = dict(network.named_parameters())
    norms = torch.stack(torch._foreach_norm([p.float() for p in parameters.values()])).tolist()
    sizes = dict(zip(parameters, norms, strict=True))
    for name, size in sandbox.agree(sizes).items():
        if abs(size - sizes[name]) > 1e-4 * abs(size):
            raise sandbox.RunError(
                f"process {sandbox.rank()} has another {name!r} than process 0: something changes "
                "it by what one process alone sees (exchange that with sandbox.all_reduce_mean_)"
            )
