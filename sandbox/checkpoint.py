"""Files that are either whole or not there, and training states in them.

A state is a nest of dicts, lists, numbers, strings and tensors. Its tensors go into a safetensors
file and the rest as JSON into that file's header: one file, no pickle, replaced atomically.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sandbox.errors import RunError, SandboxError


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a temporary path to write; it takes the place of `path` only when all went well."""
    draft = path.with_name(f".{path.name}.draft")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            draft.unlink()
        raise RunError(
            f"cannot write {path}: {error} (free some space or check the folder's permissions, "
            "then run the same command again: it goes on from the last checkpoint)"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    with atomic(path) as draft:
        draft.write_text(json.dumps(value, indent=2, default=str) + "\n")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None
) -> None:
    """Write tensors (moved to the CPU) and string facts as safetensors, atomically."""
    header = {key: str(value) for key, value in (facts or {}).items()}
    with atomic(path) as draft:
        save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, draft, header)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and facts of a safetensors file. Raises SandboxError where it is cut short."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:
        raise SandboxError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise SandboxError(
            f"{path}: truncated or not a safetensors file ({error}); copy it again, or delete it "
            "to go on without it"
        ) from None


class Checkpoints:
    """The training states of one task, named by images seen; the newest `keep` stay."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def save(self, num_images: int, state: Mapping[str, Any]) -> Path:
        tensors: dict[str, Tensor] = {}
        frame = _flatten(state, "", tensors)
        path = self.folder / f"{num_images:012d}.safetensors"
        for stray in self.folder.glob(".*"):  # left behind by a process that was killed
            stray.unlink()
        write_tensors(path, tensors, {"state": json.dumps(frame)})
        for old in self._paths()[: -self.keep]:
            old.unlink()
        return path

    def newest(self) -> dict[str, Any] | None:
        """The last state saved, or None. Raises SandboxError where its file is damaged."""
        if not (paths := self._paths()):
            return None
        tensors, facts = read_tensors(paths[-1])
        if "state" not in facts:
            raise SandboxError(f"{paths[-1]}: not a checkpoint; delete it to go on without it")
        state: dict[str, Any] = _restore(json.loads(facts["state"]), tensors)
        return state

    def clear(self) -> None:
        """Delete all states: the task is done and its result kept elsewhere."""
        for path in self._paths():
            path.unlink()

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))


def _flatten(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name += f"#{len(tensors)}"  # unique also where keys hold slashes, or 0 and "0" are two
        # safetensors refuses shared storage and strides: store plain copies
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, Mapping):
        items = [
            [key, _flatten(item, f"{name}/{key}" if name else str(key), tensors)]
            for key, item in value.items()
        ]
        return {"dict": items}
    if isinstance(value, list | tuple):
        items = [_flatten(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise TypeError(f"a checkpoint cannot hold {type(value).__name__} at {name!r}")


def _restore(frame: dict[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    ((kind, content),) = frame.items()
    match kind:
        case "tensor":
            return tensors[content]
        case "dict":
            return {key: _restore(item, tensors) for key, item in content}
        case "list":
            return [_restore(item, tensors) for item in content]
        case "tuple":
            return tuple(_restore(item, tensors) for item in content)
    return content


def random_states() -> dict[str, Tensor]:
    """The states of torch's global generators, for a checkpoint."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: Mapping[str, Tensor]) -> None:
    """Take up the global random streams where `random_states` saw them."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
