"""From an autoencoder's features to images in [-1, 1], the plain way or by kernels built for it.

The one thing to hold in mind: nothing is kept of the weights, so nothing can be stale. What is
built reads them at every call, in one pass each, as the precision and the memory order want them.
"""

from collections.abc import Callable
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from sandbox.compiler import compiling
from sandbox.interfaces import Autoencoder


def render(
    autoencoder: Autoencoder, features: Float[Tensor, "b c h w"], *, fused: bool = False
) -> Float[Tensor, "b 3 H W"]:
    """The images, float32. `fused` runs kernels that are built for each size of the features.

    They keep the channels of convolutions in the fastest axis of memory, round otherwise in the
    last digits, and give no gradients.
    """
    if not fused:
        return _images(autoencoder, features)
    # Of the several modes without gradients always the same one, or it would be built for each.
    with compiling(), torch.inference_mode(False), torch.no_grad():
        return fused_images()(autoencoder, features)


@cache
def fused_images() -> Callable[[Autoencoder, Tensor], Tensor]:
    """What `render` computes, compiled: once for all autoencoders that are built alike."""
    return torch.compile(_images, dynamic=False)


def _images(
    autoencoder: Autoencoder, features: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b 3 H W"]:
    return autoencoder.decode(features).float().clamp(-1, 1)
