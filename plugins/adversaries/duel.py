"""What all adversaries share: hinge losses, adaptive weight, and the remedies that keep D in check.

A discriminator is a network from images to logits (`b n`) and feature maps. Nothing here reads a
number back from the device; the clock is `progress`, a plain float.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import sandbox

from .augment import Augmentation, draw_policy

LEAST_NORM = 1e-12
"""Added to a gradient's length before dividing by it; lengths fall with the number of pixels."""


class Verdict(NamedTuple):
    """What a discriminator says of images."""

    logits: Float[Tensor, "b n"]
    features: list[Tensor]
    """Maps on the way to the logits, one a layer."""


class Discriminator(nn.Module):
    """A network that judges images, with the running means that LeCam needs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean_real", torch.zeros(()))
        self.register_buffer("mean_fake", torch.zeros(()))

    @abstractmethod
    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Verdict: ...


class DuelParams(sandbox.Params):
    """Settings that all adversaries have."""

    weight: float = Field(0.4, gt=0)
    """What the adversarial loss counts: of the other losses' gradient (adaptive), or as it is."""
    start: float = Field(0.3, ge=0, lt=1)
    """Share of the training after which the adversary takes part."""
    ramp: float = Field(0.05, ge=0, le=1)
    """Share of the training over which its weight then rises linearly from zero."""
    adaptive: bool = True
    """Weigh its gradient against that of the other losses (arXiv 2012.09841, eq. 7)."""
    max_weight: float = Field(1.0, gt=0)
    """Largest ratio of the two gradients that `adaptive` may find, before `weight`."""
    feature_matching: float = Field(0.0, ge=0)
    """Weight of the distance of D's features (L1, arXiv 1711.11585) beside the hinge."""
    augment: tuple[Augmentation, ...] = ("color", "translation", "cutout")
    """What is done to all that D sees (DiffAugment, arXiv 2006.10738)."""
    lecam: float = Field(0.01, ge=0)
    """Weight of LeCam regularisation (arXiv 2104.03310) on D."""
    lecam_decay: float = Field(0.99, ge=0, lt=1)
    """Decay of the running means of D's logits that LeCam pulls towards."""
    learning_rate_factor: float = Field(1.0, gt=0)
    """D's learning rate over that of the tokenizer."""


class Duel:
    """A `sandbox.Adversary` around a discriminator."""

    def __init__(self, params: DuelParams, network: Discriminator) -> None:
        self.params, self.network = params, network
        self.learning_rate_factor = params.learning_rate_factor

    def begins(self, progress: float) -> bool:
        return progress >= self.params.start

    def deceive(
        self, fake: Float[Tensor, "b 3 h w"], real: Float[Tensor, "b 3 h w"], progress: float
    ) -> sandbox.Losses:
        """The hinge's other side, -mean D(fake), and feature matching where it has a weight."""
        if not self.begins(progress):
            return sandbox.Losses(fake.new_zeros(()), {})
        policy = draw_policy(fake, self.params.augment)
        # detached, so that no gradient is left in what the discriminator's own step reads
        weights = {name: p.detach() for name, p in self.network.named_parameters()}
        found: Verdict = functional_call(self.network, weights, (policy(fake),))
        total = -found.logits.float().mean()
        parts = {"adversary": total.detach()}
        if self.params.feature_matching > 0:
            with torch.no_grad():
                wanted: Verdict = functional_call(self.network, weights, (policy(real),))
            pairs = zip(found.features, wanted.features, strict=True)
            distance = torch.stack([F.l1_loss(a.float(), b.float()) for a, b in pairs]).sum()
            total = total + self.params.feature_matching * distance
            parts["feature_matching"] = distance.detach()
        return sandbox.Losses(total, parts)

    def weight(
        self,
        loss_gradient: Float[Tensor, "b 3 h w"],
        own_gradient: Float[Tensor, "b 3 h w"],
        progress: float,
    ) -> Float[Tensor, ""]:
        """In [0, weight x max_weight]: the ratio of lengths at the reconstruction, ramped.

        VQGAN measures both gradients at the decoder's last layer, which costs two passes through
        it; at the reconstruction they are there already.
        """
        full = self.params.weight * self._ramped(progress)
        if not self.params.adaptive:
            return torch.full((), full, device=own_gradient.device)
        wanted, own = (gradient.float().norm() for gradient in (loss_gradient, own_gradient))
        return (wanted / (own + LEAST_NORM)).clamp(max=self.params.max_weight) * full

    def _ramped(self, progress: float) -> float:
        since = progress - self.params.start
        if since < 0:
            return 0.0
        return min(1.0, since / self.params.ramp) if self.params.ramp > 0 else 1.0

    def discriminate(
        self, fake: Float[Tensor, "b 3 h w"], real: Float[Tensor, "b 3 h w"], progress: float
    ) -> sandbox.Losses:
        """The hinge loss, half for reconstructions and half for images, and LeCam."""
        if not self.begins(progress):
            return sandbox.Losses(fake.new_zeros(()), {})
        policy = draw_policy(fake, self.params.augment)
        both = torch.cat([policy(fake.detach()), policy(real.detach())])
        of_fake, of_real = self.network(both).logits.float().chunk(2)
        total = (F.relu(1 + of_fake).mean() + F.relu(1 - of_real).mean()) / 2
        parts = {"loss": total.detach()}
        parts |= {"real": of_real.detach().mean(), "fake": of_fake.detach().mean()}
        if self.params.lecam > 0:
            pull = self._lecam(of_fake, of_real, parts)
            total = total + self.params.lecam * pull
            parts["lecam"] = pull.detach()
        return sandbox.Losses(total, parts)

    def _lecam(self, of_fake: Tensor, of_real: Tensor, means: Mapping[str, Tensor]) -> Tensor:
        """Squared distance of either side's logits to the other side's running mean."""
        kept, step = self.network, 1 - self.params.lecam_decay
        kept.mean_real.lerp_(means["real"], step)
        kept.mean_fake.lerp_(means["fake"], step)
        return (of_real - kept.mean_fake).square().mean() + (
            of_fake - kept.mean_real
        ).square().mean()
