"""Labelled images: procedural shapes, folders of image files, CIFAR-10, the MNIST family.

A row of a batch depends on its index and on the generator that the batch is given, on nothing
else, so a run that is resumed at an image count sees the images it would have seen.
"""

from collections.abc import Callable

import sandbox

from .shapes import Shapes


@sandbox.hookimpl
def sandbox_register(register: Callable[[type, str, type], None]) -> None:
    register(sandbox.Dataset, "shapes", Shapes)
