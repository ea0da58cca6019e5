"""The names that recipes may use, and the classes they stand for."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic_core import PydanticCustomError

from sandbox.errors import SandboxError, did_you_mean
from sandbox.parts import Params


@dataclass(frozen=True)
class Entry:
    """One registered class."""

    interface: type
    name: str
    cls: Any
    plugin: str

    @property
    def where(self) -> str:
        """`file:line` of the class."""
        try:
            return f"{inspect.getsourcefile(self.cls)}:{inspect.getsourcelines(self.cls)[1]}"
        except (OSError, TypeError):
            return str(self.cls.__qualname__)


class Registry:
    """A table of (interface, name) -> class. Each pair is given out once."""

    def __init__(self) -> None:
        self._entries: dict[tuple[type, str], Entry] = {}
        self.broken: dict[str, Exception] = {}
        """Plugins that could not be loaded, and why."""

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def add(self, interface: type, name: str, cls: type, plugin: str) -> None:
        """Register `cls`; a clash of names, a missing method or missing `Params` is an error."""
        entry = Entry(interface, name, cls, plugin)
        here = f"{interface.__name__} {name!r} of plugin {plugin!r}"
        if other := self._entries.get((interface, name)):
            raise SandboxError(
                f"two plugins register the {interface.__name__} {name!r}: {plugin!r} at "
                f"{entry.where} and {other.plugin!r} at {other.where}; rename or remove one"
            )
        if missing := sorted(_methods(interface) - set(dir(cls))):
            raise TypeError(f"{here} lacks {', '.join(missing)}: {entry.where}")
        if not issubclass(getattr(cls, "Params", type(None)), Params):
            raise TypeError(f"{here} needs a nested `Params(sandbox.Params)`: {entry.where}")
        self._entries[interface, name] = entry

    def remove_plugin(self, plugin: str) -> None:
        """Forget what a plugin registered before it broke."""
        self._entries = {k: e for k, e in self._entries.items() if e.plugin != plugin}

    def find(self, interface: type, name: str) -> Any:
        """Look a class up; a miss becomes an error at the recipe line that asked."""
        if entry := self._entries.get((interface, name)):
            return entry.cls
        known = sorted(n for i, n in self._entries if i is interface)
        hint = did_you_mean(name, known) or f" (known: {', '.join(known) or 'none'})"
        for plugin, error in self.broken.items():
            hint += f"; plugin {plugin!r} did not load: {type(error).__name__}: {error}"
        raise PydanticCustomError(
            "unknown_part",
            "no {interface} is named '{name}'{hint}",
            {"interface": interface.__name__, "name": name, "hint": hint},
        )


def _methods(interface: type) -> set[str]:
    inherited = (vars(base) for base in interface.__mro__[:-1])
    return {
        name
        for members in inherited
        for name, value in members.items()
        if inspect.isfunction(value) and not name.startswith("_")
    }
