"""Another method in the place of an object's own, for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(owner: Any, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Let `owner` have another method within; objects that allow none are left as they are."""
    before = getattr(owner, "__dict__", {}).get(name)
    try:
        object.__setattr__(owner, name, method)
    except AttributeError:
        yield
        return
    try:
        yield
    finally:
        if before is None:
            object.__delattr__(owner, name)
        else:
            object.__setattr__(owner, name, before)
