"""What a result depends on besides its recipe: versions, machine, code state, parts' choices."""

import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "timm", "einops", "xformers", "torchmetrics", "pluggy", "pydantic")

Listener = Callable[[str, str, str, str], None]
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


def chose(what: str, case: str, chosen: str, why: str) -> None:
    """Tell the run, if there is one, what a part chose by itself: the kernel of a shape, say.

    It is kept in `environment.json` under `choices`, `what` and `case`; `why` is told the person
    who watches. Parts choose so only where no choice changes what is computed.
    """
    if listener := _listener.get():
        listener(what, case, chosen, why)


@contextmanager
def choices_told_to(listener: Listener) -> Iterator[None]:
    """Let `listener` hear of each `chose` within this context."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def environment(device: torch.device, command: str) -> dict[str, str]:
    """Label to text, for `environment.json` and the report."""
    facts = {
        "command": command,
        "device": device_name(device),
        "CPU": processor(),
        "CPU cores": str(os.cpu_count()),
        "CPU threads of torch": str(torch.get_num_threads()),
        "memory": f"{memory_bytes() / 2**30:.0f} GiB",
        "platform": platform.platform(),
        "python": platform.python_version(),
        "git": git_state(),
    }
    return facts | {name: _version(name) for name in PACKAGES}


def device_name(device: torch.device) -> str:
    """The GPU's name, or `CPU`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def processor() -> str:
    """What the system calls its processor, with family and model, as clouds tell little else."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not on every system
        return platform.processor() or platform.machine()
    facts = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    name = facts.get("model name") or platform.processor() or platform.machine()
    known = [f"{key.split()[-1]} {facts[key]}" for key in ("cpu family", "model") if key in facts]
    return ", ".join([name, *known])


def memory_bytes() -> int:
    """Physical memory of this machine, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def git_state() -> str:
    """Commit of the source, marked where files differ from it; empty outside a checkout."""
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        return commit + (" with local changes" if _git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "no git checkout"


def _git(*words: str) -> str:
    folder = Path(__file__).parent
    run = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True)
    return run.stdout.strip()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
