"""Labelled images: procedural shapes, folders of image files, CIFAR-10, the MNIST family.

A row of a batch depends on its index and on the generator that the batch is given, on nothing
else, so a run that is resumed at an image count sees the images it would have seen.
"""

from collections.abc import Callable

import sandbox

from .cifar10 import Cifar10
from .idx import Idx
from .image_folder import ImageFolder
from .shapes import Shapes


@sandbox.hookimpl
def sandbox_register(register: Callable[[type, str, type], None]) -> None:
    register(sandbox.Dataset, "shapes", Shapes)
    register(sandbox.Dataset, "image-folder", ImageFolder)
    register(sandbox.Dataset, "cifar10", Cifar10)
    register(sandbox.Dataset, "idx", Idx)
