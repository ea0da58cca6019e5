"""Finds plugins: the built-in folder, folders given by the user, then installed packages.

A folder's modules are imported as `sandbox_plugins.<name>`, so a plugin may be one file or a
package with relative imports, and its classes pickle. An installed package offers a module through
the entry-point group "sandbox". A plugin that fails to load is kept in `Registry.broken`: it
stops only the runs that ask for something it should have offered.
"""

import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

import pluggy

import sandbox_plugins
from sandbox.errors import SandboxError
from sandbox.hooks import PluginHooks
from sandbox.registry import Registry

BUILT_IN = tuple(sandbox_plugins.__path__)


def load_plugins(folders: Sequence[Path] = (), strict: bool = False) -> Registry:
    """Load every plugin there is and collect what they offer.

    Raises SandboxError for a missing folder or two plugins that claim one name. Any other failure
    is kept in `Registry.broken`, or raised when `strict`.
    """
    manager = pluggy.PluginManager("sandbox")
    manager.add_hookspecs(PluginHooks)
    registry = Registry()
    for name, load in [*_in_folders(folders), *_installed()]:
        try:
            plugin = load()
            manager.register(plugin, name)
            manager.check_pending()  # a misspelled hook is an error, not a no-op
            hooks = manager.hook.sandbox_register.get_hookimpls()
            found = [impl for impl in hooks if impl.plugin_name == name]
            if not found and hasattr(plugin, "sandbox_register"):
                raise TypeError("sandbox_register lacks its decorator, @sandbox.hookimpl")
            for impl in found:
                impl.function(register=partial(_add, registry, name))
        except SandboxError:
            raise  # two plugins disagree: no run can be trusted until that is settled
        except Exception as error:
            if strict:
                raise
            registry.broken[name] = error
            registry.remove_plugin(name)
            if manager.has_plugin(name):
                manager.unregister(name=name)
    return registry


def _add(registry: Registry, plugin: str, interface: type, name: str, cls: type) -> None:
    registry.add(interface, name, cls, plugin)


def _in_folders(folders: Sequence[Path]) -> Iterator[tuple[str, Callable[[], ModuleType]]]:
    for folder in folders:
        if not folder.is_dir():
            raise SandboxError(f"--plugins {folder}: no such folder")
    sandbox_plugins.__path__ = [*BUILT_IN, *(str(folder.resolve()) for folder in folders)]
    importlib.invalidate_caches()
    seen: dict[str, str] = {}
    for path in sandbox_plugins.__path__:
        for module in pkgutil.iter_modules([path]):
            if module.name == "conftest" or module.name.startswith("test_"):
                continue  # a plugin's tests may stand beside it
            if other := seen.get(module.name):
                raise SandboxError(
                    f"two plugins are called {module.name!r}, in {other} and in {path}: rename one"
                )
            seen[module.name] = path
            yield module.name, partial(importlib.import_module, f"sandbox_plugins.{module.name}")


def _installed() -> Iterator[tuple[str, Callable[[], ModuleType]]]:
    for entry in importlib.metadata.entry_points(group="sandbox"):
        yield entry.name, entry.load
