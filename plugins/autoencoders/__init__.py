"""Autoencoders: images to a feature map and back. The quantizers stand between the two halves."""

from collections.abc import Callable

import sandbox

from .cnn import CNN
from .patch import Patch


@sandbox.hookimpl
def sandbox_register(register: Callable[..., None]) -> None:
    register(sandbox.Autoencoder, "cnn", CNN)
    register(sandbox.Autoencoder, "patch", Patch)
