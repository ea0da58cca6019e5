"""Losses that compare pixel by pixel: no network, no weights."""

from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

import sandbox


class L2:
    """Mean squared difference."""

    class Params(sandbox.Params):
        weight: float = Field(1.0, gt=0)
        """What the loss is multiplied by."""

    def __init__(self, params: Params) -> None:
        self.params = params

    def loss(
        self, reconstruction: Float[Tensor, "b 3 h w"], images: Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, ""]:
        return self.params.weight * F.mse_loss(reconstruction, images)


class L1(L2):
    """Mean absolute difference."""

    def loss(
        self, reconstruction: Float[Tensor, "b 3 h w"], images: Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, ""]:
        return self.params.weight * F.l1_loss(reconstruction, images)
