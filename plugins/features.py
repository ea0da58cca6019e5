"""The networks whose features a score reads.

A score means nothing without its extractor, so each has a label that stands in the score's name.
`inception` is the literature's, for natural images; `classifier` is trained by the sandbox on the
data set itself, for small or drawn images of which Inception knows nothing; `random` only shows
that an evaluation runs.
"""

import io
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import timm
import torch
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor, nn
from torch_fidelity import FeatureExtractorInceptionV3

import sandbox


def _to_uint8(images: Float[Tensor, "b 3 h w"]) -> UInt8[Tensor, "b 3 h w"]:
    """[-1, 1] to 0..255, rounded to the nearest; exact for images that came from a file."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class _InceptionNetwork(FeatureExtractorInceptionV3):
    """torch-fidelity's network with random weights, built without a file and without a download.

    The constructor of the base class insists on loading a file, and would unpickle it. It is handed
    an empty one; what it then loads is ignored.
    """

    _constructed = False

    def __init__(self) -> None:
        empty = io.BytesIO()
        torch.save({}, empty)
        empty.seek(0)
        super().__init__("inception-v3-compat", ["2048", "logits_unbiased"], empty)
        self._constructed = True

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        if self._constructed:
            return super().load_state_dict(state_dict, strict, assign)
        return super().load_state_dict(self.state_dict())

    def train(self, mode: bool = True) -> "_InceptionNetwork":
        """Stays in evaluation mode: it is a measuring instrument."""
        return super().train(False)


class Inception:
    """The Inception-v3 of the published FID (TensorFlow's graph of 2015-12-05), 2048 features.

    Images are rounded to 8 bits and resized to 299 px as TensorFlow 1 did it, without
    anti-aliasing. The logits are those of its 1008 ImageNet outputs, not the data set's classes,
    and without their bias, as in the published Inception score. The weights are those known as
    `pt_inception-2015-12-05-6726825d.pth`; none are downloaded here.
    """

    label = "inception"
    needs_weights = True

    class Params(sandbox.Params):
        """No settings."""

    def __init__(self, params: Params, image_size: tuple[int, int], num_classes: int) -> None:
        self.params = params
        self.network = _InceptionNetwork()

    def features(
        self, images: Float[Tensor, "b 3 h w"]
    ) -> tuple[Float[Tensor, "b 2048"], Float[Tensor, "b 1008"]]:
        """Features (after the last pooling) and logits, float32, without gradients."""
        with torch.no_grad():
            return self.network(_to_uint8(images))


class Classifier:
    """A small residual network (ResNet-D, timm) that the sandbox trains on the data set's classes.

    The stem keeps images of up to 32 px at full size, halves those of up to 64 px and quarters
    larger ones, as ResNets for ImageNet do. Four stages, each at half the resolution and twice the
    channels of the one before. `width: 64, blocks: 2` makes the ResNet-18 of the CIFAR literature.
    """

    label = "classifier"
    needs_weights = True

    class Params(sandbox.Params):
        width: int = Field(default=16, ge=4, multiple_of=2)
        """Channels of the first stage; there are 8 times as many features."""
        blocks: int = Field(default=1, ge=1, le=16)
        """Residual blocks a stage."""

    def __init__(self, params: Params, image_size: tuple[int, int], num_classes: int) -> None:
        self.params = params
        self.network = timm.create_model(
            "resnet18",
            pretrained=False,
            num_classes=num_classes,
            layers=(params.blocks,) * 4,
            channels=tuple(params.width * 2**stage for stage in range(4)),
            stem_type="deep",
            stem_width=params.width // 2,
            avg_down=True,
        )
        if max(image_size) <= 64:
            self.network.maxpool = nn.Identity()
        if max(image_size) <= 32:
            self.network.conv1[0].stride = (1, 1)
        self.network.eval()

    def features(
        self, images: Float[Tensor, "b 3 h w"]
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b k"]]:
        """Pooled features before the last layer, and logits; gradients only in training mode."""
        with torch.set_grad_enabled(self.network.training and torch.is_grad_enabled()):
            maps = self.network.forward_features(images)
            features = self.network.forward_head(maps, pre_logits=True)
            return features, self.network.get_classifier()(features)


class _RandomNetwork(nn.Module):
    """Strided convolutions, averaged over the image, with a linear layer on top."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        widths = [3, width, width, width]
        convolutions = [
            nn.Conv2d(before, after, 3, stride=2, padding=1) for before, after in pairwise(widths)
        ]
        self.layers = nn.Sequential(*(m for conv in convolutions for m in (conv, nn.GELU())))
        self.head = nn.Linear(width, num_classes)
        self.eval().requires_grad_(False)

    def draw_weights(self, rng: torch.Generator) -> "_RandomNetwork":
        for parameter in self.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else len(parameter)
            nn.init.normal_(parameter, std=fan_in**-0.5, generator=rng)
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.layers(images).mean(dim=(2, 3))
        return features, self.head(features)

    def forward_intermediates(
        self, images: Tensor, intermediates_only: bool = False
    ) -> tuple[Tensor, list[Tensor]] | list[Tensor]:
        """The map after every convolution, as timm's networks give them; the last one before."""
        maps, last = [], images
        for layer in self.layers:
            last = layer(last)
            if isinstance(layer, nn.GELU):
                maps.append(last)
        return maps if intermediates_only else (last, maps)

    def forward_head(self, last: Tensor) -> Tensor:
        """The logits, from the last map."""
        return self.head(last.mean(dim=(2, 3)))


class RandomFeatures:
    """An untrained convolutional network, for smoke tests: its scores say nothing of quality."""

    label = "random-conv"
    needs_weights = False

    class Params(sandbox.Params):
        width: int = Field(default=64, ge=1)
        """How many features."""
        seed: int = Field(default=0, ge=0)
        """Which random weights; two evaluations compare only with equal seeds."""

    def __init__(self, params: Params, image_size: tuple[int, int], num_classes: int) -> None:
        self.params = params
        rng = torch.Generator().manual_seed(params.seed)
        with torch.device("meta"):  # PyTorch's own initialisation would draw global random numbers
            network = _RandomNetwork(params.width, num_classes)
        self.network = network.to_empty(device="cpu").draw_weights(rng)

    def features(
        self, images: Float[Tensor, "b 3 h w"]
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b k"]]:
        """Features and (meaningless) logits, without gradients."""
        with torch.no_grad():
            return self.network(images.float())


@sandbox.hookimpl
def sandbox_register(register: Callable[[type, str, type], None]) -> None:
    register(sandbox.FeatureExtractor, "inception", Inception)
    register(sandbox.FeatureExtractor, "classifier", Classifier)
    register(sandbox.FeatureExtractor, "random", RandomFeatures)
