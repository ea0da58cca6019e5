"""A perceptual loss from any feature extractor: LPIPS with unit weights, without VGG.

For data of which ImageNet's networks know little, or where no weights can be had: the classifier
that `train-classifier` fits to the data set itself, or random features.
"""

from typing import Any, Self

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

import sandbox

from .frozen import Frozen, load_frozen, squared_distances


class Perceptual(Frozen):
    """Squared distances of unit-length intermediate features, summed over channels and layers.

    Layers are the maps that the network's `forward_intermediates` gives (timm's convention), each
    averaged over its cells. TiTok (arXiv 2406.07550) compares logits alone.
    """

    class Params(sandbox.Params):
        features: sandbox.Part[sandbox.FeatureExtractor] = Field(
            {"name": "classifier"}, validate_default=True
        )
        """The network whose feature maps are compared."""
        weights: str | None = None
        """Its weights: a file, a run folder with trained features, hf://... or package://..."""
        weight: float = Field(1.0, gt=0)
        """What the loss is multiplied by."""
        logits_weight: float = Field(0.0, ge=0)
        """Weight of the mean squared difference of logits, beside the 1 of the maps."""

        @model_validator(mode="after")
        def _has_weights(self) -> Self:
            if self.weights is None and getattr(self.features.cls, "needs_weights", False):
                raise ValueError(
                    f"the features {self.features.name!r} mean nothing without weights: set "
                    "`weights` to a file or to the folder of a run with the task "
                    "train-classifier, or use features: random"
                )
            return self

    network: nn.Module | None

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.params = params
        self.network = None

    def prepare(self, image_size: tuple[int, int], num_classes: int) -> None:
        """Build the network for the data set's images and load its weights; a second call is void.

        Raises SandboxError where the weights do not fit, or the network has no maps to compare.
        """
        if self.network is not None:
            return
        name = self.params.features.name
        network = self.params.features.build(image_size, num_classes).network
        if not hasattr(network, "forward_intermediates"):
            raise sandbox.SandboxError(
                f"image loss 'perceptual': the network of the features {name!r} has no "
                "forward_intermediates(), which gives the maps to compare; use classifier or random"
            )
        if self.params.weights is not None:
            load_frozen(network, self.params.weights, "perceptual", folders=True)
        self.network = self.freeze(network)

    def loss(
        self, reconstruction: Float[Tensor, "b 3 h w"], images: Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, ""]:
        network: Any = self.network
        if network is None:
            raise ValueError("image loss 'perceptual': call prepare() before loss()")
        with torch.no_grad():
            last_wanted, wanted = network.forward_intermediates(images)
        last_found, found = network.forward_intermediates(reconstruction)
        layers = [distance.sum(1).mean() for distance in squared_distances(found, wanted)]
        loss = torch.stack(layers).sum()
        if self.params.logits_weight > 0:
            with torch.no_grad():
                logits = network.forward_head(last_wanted).float()
            error = F.mse_loss(network.forward_head(last_found).float(), logits)
            loss = loss + self.params.logits_weight * error
        return self.params.weight * loss
