"""What losses share that compare images by the feature maps of a frozen network.

The network keeps its weights and its evaluation mode whatever is done to what holds it; gradients
pass through it to the reconstruction.
"""

from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Float
from torch import Tensor, nn

import sandbox

EPSILON = 1e-8
"""Added to squared lengths, so that maps of zeros have a gradient."""


class Frozen(nn.Module):
    """A module that stays in evaluation mode; `freeze` a network once its weights are there."""

    def freeze(self, network: nn.Module) -> nn.Module:
        return network.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "Frozen":
        return super().train(False)


def load_frozen(network: nn.Module, source: str, loss: str, *, folders: bool = False) -> None:
    """`sandbox.load_weights`, with the setting `weights` of a loss named where nothing is there.

    `folders` says whether a run folder will do, whose `weights/features.safetensors` is taken.
    """
    path = Path(source.partition("#sha256=")[0])
    there = path.is_file() or (folders and (path / "weights" / "features.safetensors").is_file())
    if "://" not in source and not there:
        kinds = "a .safetensors or .pth file" + (
            ", to the folder of a run that has trained a classifier" if folders else ""
        )
        raise sandbox.SandboxError(
            f"image loss {loss!r}: weights: {source}: no weights there; set it to {kinds}, or to "
            "hf://owner/repository/file"
        )
    try:
        sandbox.load_weights(network, source, "features")
    except sandbox.SandboxError as error:
        raise sandbox.SandboxError(f"image loss {loss!r}: weights: {error}") from None


def squared_distances(
    one: Sequence[Float[Tensor, "b _c _h _w"]], other: Sequence[Float[Tensor, "b _c _h _w"]]
) -> list[Float[Tensor, "b _c _h _w"]]:
    """Squared differences of maps whose vectors are scaled to unit length, in float32, by layer."""
    return [(_unit(a.float()) - _unit(b.float())).square() for a, b in zip(one, other, strict=True)]


def _unit(features: Tensor) -> Tensor:
    return features * (features.square().sum(1, keepdim=True) + EPSILON).rsqrt()
