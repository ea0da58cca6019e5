"""The task `bench`: how fast a recipe's own parts are, and how near to what the machine can do.

The one thing to hold in mind: only what the interfaces promise is called, so a stranger's parts are
measured like the built-in ones; what a part does not have is left out, with a reason.
"""

from .task import Bench

__all__ = ["Bench"]
