"""Where picks are kept from one run to the next: a JSON file beside torch's own caches.

The one idea to hold: whoever comes first measures, alone; others, of the same or of later runs,
take over what it found. A file that cannot be read or written costs a new measurement, not a run.
"""

import fcntl
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import sandbox


@dataclass(frozen=True)
class Pick:
    """A backend's name, and what speaks for it; `certain` unless nothing could be measured."""

    name: str
    why: str
    certain: bool = True


def settled(
    device: torch.device, names: Iterable[str], case: str, measure: Callable[[], Pick]
) -> Pick:
    """The pick among `names` known for such a GPU and these versions, or else measured now."""
    path = place()
    machine = (
        f"{sandbox.device_name(device)}, torch {torch.__version__}, xformers {_xformers()}, "
        f"among {' '.join(names)}, timed in graphs"
    )
    with _alone_with(path):
        known = _read(path)
        with suppress(LookupError, TypeError):
            return Pick(**known[machine][case])
        pick = measure()
        if pick.certain:
            kept = {"name": pick.name, "why": pick.why}
            try:
                mine = {**known.get(machine, {}), case: kept}
                sandbox.write_json(path, {**known, machine: mine})
            except sandbox.RunError:
                pick = replace(pick, why=f"{pick.why}; {path} cannot be written")
        return pick


def place() -> Path:
    """`~/.cache/torch/var-sandbox/attention.json`, or where XDG_CACHE_HOME or TORCH_HOME say."""
    return Path(torch.hub.get_dir()).parent / "var-sandbox" / "attention.json"


@contextmanager
def _alone_with(path: Path) -> Iterator[None]:
    """Keep other processes waiting, where the system lets us."""
    with ExitStack() as stack:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(path.with_suffix(".lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
            stack.callback(fcntl.flock, lock, fcntl.LOCK_UN)  # a fork may still have it open
        yield


def _read(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _xformers() -> str:
    try:
        return version("xformers")
    except PackageNotFoundError:
        return "not installed"
