"""A tokenizer against a discriminator: one forward pass of the tokenizer serves both.

The losses are differentiated at the reconstruction, which is where their gradients can be compared;
what they add up to then goes back through the tokenizer once. The discriminator takes its own step
afterwards, on the very reconstructions that it was deceived with.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import AdamW

import sandbox

from .settings import Training, autocast
from .upkeep import load_optimizer

BETAS, CLIP = (0.5, 0.9), 1.0
"""AdamW's running-average factors and the largest gradient norm, of every discriminator."""


class Contest:
    """An adversary in training; a checkpoint keeps its network and its optimiser."""

    def __init__(
        self, adversary: sandbox.Adversary, settings: Training, device: torch.device
    ) -> None:
        self.adversary, self.settings, self.device = adversary, settings, device
        self.network = adversary.network.to(device).train()
        if device.type == "cuda":  # the order of memory in which convolutions are fastest
            self.network.to(memory_format=torch.channels_last)
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = AdamW(
            self.parameters,
            lr=settings.learning_rate,
            betas=BETAS,
            weight_decay=0.0,
            fused=device.type == "cuda",
        )
        self._progress = 0.0
        self._shown: list[tuple[Tensor, Tensor]] = []

    def begins(self, progress: float) -> bool:
        """Whether the adversary takes part already; if not, there is nothing to call here."""
        return self.adversary.begins(progress)

    def losses(
        self,
        made: sandbox.Reconstruction,
        real: Float[Tensor, "b 3 h w"],
        judge: Callable[[Float[Tensor, "b 3 h w"]], Mapping[str, Tensor]],
        progress: float,
    ) -> sandbox.Losses:
        """All losses of the tokenizer: its quantizer's, those that `judge` names, and deception."""
        fake = made.images.detach().float().requires_grad_()
        fake = fake.view_as(fake)  # torch's counter of operations takes no leaf in autograd.grad
        judged = dict(judge(fake))
        loss = torch.stack(list(judged.values())).sum()
        (gradient,) = torch.autograd.grad(loss, fake)
        deceived = self.adversary.deceive(fake, real, progress)
        (own_gradient,) = torch.autograd.grad(deceived.total, fake)
        weight = self.adversary.weight(gradient, own_gradient, progress)
        combined = (gradient + weight * own_gradient).detach()
        through = made.loss + (made.images.float() * combined).sum()  # has the gradient ...
        value = made.loss + loss + weight * deceived.total  # ... of this value
        self._shown.append((fake.detach(), real))
        self._progress = progress
        parts = {"quantizer": made.loss, **judged, **deceived.parts}
        detached = {f"loss/{name}": part.detach() for name, part in parts.items()}
        total = value.detach() + (through - through.detach())
        return sandbox.Losses(total, detached | {"adversary_weight": weight.detach()})

    def step(self) -> dict[str, Tensor]:
        """Train the discriminator on what was shown since its last step; returns scalars."""
        if not self._shown:
            return {}
        rate = self.settings.rate(self._progress) * self.adversary.learning_rate_factor
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        found = self.rehearse()
        self._exchange(found)
        found["gradient_norm"] = nn.utils.clip_grad_norm_(self.parameters, CLIP).detach()
        self.optimizer.step()
        return {f"discriminator/{name}": value for name, value in found.items()}

    def rehearse(self) -> dict[str, Any]:
        """Leave the gradients of all that was shown in the network, forget it; gives scalars.

        This is a step less the other processes and the optimiser: what a plan measures.
        """
        shown, self._shown, found = self._shown, [], {}
        num_images = sum(len(fake) for fake, _ in shown)
        for fake, real in shown:
            with autocast(self.device, self.settings.precision):
                losses = self.adversary.discriminate(fake, real, self._progress)
            share = len(fake) / num_images
            (losses.total * share).backward()
            for name, value in losses.parts.items():
                found[name] = found.get(name, 0.0) + value * share
        return found

    def _exchange(self, found: dict[str, Any]) -> None:
        """Put the mean over all processes in place of gradients, buffers and scalars."""
        if sandbox.world_size() == 1:
            return
        values = torch.stack(list(found.values()))
        buffers = [each for each in self.network.buffers() if each.is_floating_point()]
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        sandbox.all_reduce_mean_([*gradients, *buffers, values])
        found.update(zip(list(found), values.unbind(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """What a training that goes on needs."""
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""
        self.network.load_state_dict(state["network"])
        load_optimizer(self.optimizer, state["optimizer"])
