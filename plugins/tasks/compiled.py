"""What compiling means for a generator that is trained.

The one thing to hold in mind: torch notes on a module that it is compiled and has no way back, so
what is compiled for a while only is undone here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

from torch import nn

import sandbox


def compiler_of(made: Any) -> Callable[[], None]:
    """What compiles a generator's training: its own `compile`, else its network's."""
    own = getattr(type(made), "compile", nn.Module.compile)
    return made.network.compile if own is nn.Module.compile else made.compile


@contextmanager
def compiled_generator(made: Any) -> Iterator[Any]:
    """A generator whose training is compiled, within this context; its network is the same one."""
    again = copy(made)  # what compiling notes in a generator goes with the copy
    with sandbox.compiling(spare_memory=True):
        try:
            compiler_of(again)()
            yield again
        finally:
            for module in again.network.modules():
                module._compiled_call_impl = None  # torch itself has no way back from compile()
