"""LPIPS: distances of features that people's judgement of image pairs has weighted.

The linear weights come with torchmetrics; those of the backbone are a file that the recipe names.
"""

from collections.abc import Mapping
from importlib.resources import as_file, files
from typing import Literal

import torch
import torchvision
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

import sandbox

from .frozen import Frozen, load_frozen, squared_distances

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""ImageNet's mean and standard deviation a channel, for images in [-1, 1]."""
LAYERS = {"vgg16": (3, 8, 15, 22, 29), "alexnet": (1, 4, 7, 9, 11)}
"""The rectified convolutions that are compared, by their place in torchvision's `features`."""
HEADS = {"vgg16": "vgg.pth", "alexnet": "alex.pth"}


class Lpips(Frozen):
    """Learned perceptual image patch similarity (Zhang et al. 2018, arXiv 1801.03924, eq. 1).

    Version 0.1, as torchmetrics and the reference code compute it. Meant for images of 48 px and
    more; the deepest VGG map of a 32 px image has 2 x 2 cells.
    """

    class Params(sandbox.Params):
        weights: str
        """The backbone's: torchvision's vgg16 or alexnet, whole or `features` alone; a file, hf://...
        or package://..."""
        network: Literal["vgg16", "alexnet"] = "vgg16"
        """The backbone; VGG16 is the usual one to train with."""
        weight: float = Field(1.0, gt=0)
        """What the loss is multiplied by."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.params = params
        backbone = _Backbone(params.network)
        load_frozen(backbone, params.weights, "lpips")
        self.backbone = self.freeze(backbone)
        for index, head in enumerate(_heads(params.network)):
            self.register_buffer(f"head{index}", head)
        self.register_buffer("shift", torch.tensor(SHIFT).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(3, 1, 1))

    def loss(
        self, reconstruction: Float[Tensor, "b 3 h w"], images: Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, ""]:
        with torch.no_grad():
            wanted = self.backbone((images - self.shift) / self.scale)
        found = self.backbone((reconstruction - self.shift) / self.scale)
        layers = [
            (distance * getattr(self, f"head{index}")).sum(1).mean()
            for index, distance in enumerate(squared_distances(found, wanted))
        ]
        return self.params.weight * torch.stack(layers).sum()


class _Backbone(nn.Module):
    """The convolutions of a torchvision network, up to the last layer that is compared.

    Built without random numbers; it means nothing before its weights are loaded.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layers = LAYERS[name]
        with torch.device("meta"):
            features = getattr(torchvision.models, name)(weights=None).features
        for module in features.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False  # its input is a map that others read
        self.features = features[: self.layers[-1] + 1].to_empty(device="cpu")

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> list[Tensor]:
        maps, features = [], images
        for index, layer in enumerate(self.features):
            features = layer(features)
            if index in self.layers:
                maps.append(features)
        return maps

    def from_published(self, state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """torchvision's layout: the whole network, or its `features` alone."""
        named = {f"features.{k.removeprefix('features.')}": tensor for k, tensor in state.items()}
        own = self.state_dict()
        known = {name: tensor for name, tensor in named.items() if name in own}
        return known if known.keys() == own.keys() else None


def _heads(network: str) -> list[Float[Tensor, "c 1 1"]]:
    """The weights of the linear layers, one a channel."""
    place = files("torchmetrics") / "functional" / "image" / "lpips_models" / HEADS[network]
    with as_file(place) as path:
        state = torch.load(path, map_location="cpu", weights_only=True)
    return [tensor.flatten()[:, None, None] for _, tensor in sorted(state.items())]
