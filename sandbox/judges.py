"""What is minimised: how wrong predictions and reconstructions are. Axes as in `interfaces`."""

from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, nn

from sandbox.layout import Layout
from sandbox.values import Losses


@runtime_checkable
class Objective(Protocol):
    """How wrong predicted logits are, each image by itself. Built as `Class(params)`.

    It may be called with a few images of a batch at a time.
    """

    def losses(
        self, logits: Float[Tensor, "b l v"], ids: Int[Tensor, "b l"], layout: Layout
    ) -> Float[Tensor, "b l"]:
        """The loss of every token; their mean is what training minimises."""


@runtime_checkable
class ImageLoss(Protocol):
    """How far a reconstruction is from its image. Built as `Class(params)`.

    One that is an `nn.Module` (it reads a network's features) is moved to the run's device; nothing
    in it is trained. It may also have `prepare(image_size, num_classes) -> None`, which the task
    calls before the first loss: the place for what depends on the data set, or loads weights.
    """

    def loss(
        self, reconstruction: Float[Tensor, "b 3 h w"], images: Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, ""]: ...


@runtime_checkable
class Adversary(Protocol):
    """A discriminator and its losses. Built as `Class(params, image_size)`.

    `progress` runs from 0 at the start of the training to 1 at its end. Images lie in [-1, 1]
    (reconstructions may reach beyond). Both losses are zero, without a pass, before `begins`.
    """

    network: nn.Module
    """The discriminator, trained by an optimiser of its own; kept in checkpoints."""
    learning_rate_factor: float
    """Its learning rate over that of the tokenizer."""

    def begins(self, progress: float) -> bool:
        """Whether the adversary takes part already."""

    def deceive(
        self, fake: Float[Tensor, "b 3 h w"], real: Float[Tensor, "b 3 h w"], progress: float
    ) -> Losses:
        """What the tokenizer is to minimise, unweighted; gradients reach `fake` alone."""

    def weight(
        self,
        loss_gradient: Float[Tensor, "b 3 h w"],
        own_gradient: Float[Tensor, "b 3 h w"],
        progress: float,
    ) -> Float[Tensor, ""]:
        """What `deceive` counts, from the gradients of all other losses and of it at `fake`."""

    def discriminate(
        self, fake: Float[Tensor, "b 3 h w"], real: Float[Tensor, "b 3 h w"], progress: float
    ) -> Losses:
        """What the discriminator is to minimise; gradients reach its network alone."""
