"""What a result depends on besides its recipe: versions, machine, code state."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("torch", "timm", "einops", "xformers", "torchmetrics", "pluggy", "pydantic")


def environment(device: torch.device, command: str) -> dict[str, str]:
    """Label to text, for `environment.json` and the report."""
    facts = {
        "command": command,
        "device": device_name(device),
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
