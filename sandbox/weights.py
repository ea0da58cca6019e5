"""Trained weights: where they come from, and whether they fit.

A source is a local file, the folder of another run, `package://package/file` (a file that an
installed package brings along) or `hf://owner/repository/file` with an optional `@revision`; each
may end in `#sha256=...`. Half-precision files load as they are, cast to the module's types. A
module that knows a published layout translates it itself, with `from_published(state) -> state |
None`, and puts a state in plain words with `describe(state)`.
"""

import hashlib
import logging
import pickle
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path, PurePosixPath
from zipfile import is_zipfile

import torch
from torch import Tensor, nn

from sandbox.checkpoint import read_tensors
from sandbox.errors import SandboxError, did_you_mean
from sandbox.values import Role


def load_weights(module: nn.Module, source: str, role: Role) -> str:
    """Load `source` into `module`, strictly; return the sha256 of the file's bytes.

    Raises SandboxError where the file is missing, damaged, changed, does not fit the module, or
    holds parameters that are not finite: what draws from NaN draws something, and says nothing.
    """
    path, expected = locate(source, role)
    digest = _sha256(path)
    if expected and digest != expected.lower():
        raise SandboxError(f"{path}: sha256 is {digest}, but {source!r} asks for {expected}")
    state = _read(path)
    if translate := getattr(module, "from_published", None):
        state = translate(state) or state
    _check_fit(module, state, path)
    _check_finite(module, state, path)
    try:
        module.load_state_dict(state, strict=True)
    except SandboxError as error:
        raise SandboxError(f"{path} does not fit: {error}") from None
    return digest


def locate(source: str, role: Role) -> tuple[Path, str | None]:
    """The local file that a source stands for (downloaded if need be), and its expected sha256."""
    place, _, digest = source.partition("#sha256=")
    if place.startswith("hf://"):
        return _download(place), digest or None
    if place.startswith("package://"):
        return _packaged(place), digest or None
    path = Path(place)
    if path.is_dir():
        path = path / "weights" / f"{role}.safetensors"
    if not path.is_file():
        raise SandboxError(
            f"{path}: no such weights file (set weights.{role} to a .safetensors or .pth file, to "
            "a run folder, to package://package/file, or to hf://owner/repository/file)"
        )
    return path, digest or None


def _packaged(place: str) -> Path:
    """The file of an installed package; packages in archives are not looked into."""
    package, _, name = place.removeprefix("package://").partition("/")
    words = PurePosixPath(name).parts
    if not package or not words or ".." in words or name.startswith("/"):
        raise SandboxError(f"{place}: expected package://package/path/to/file")
    try:
        root = files(package)
    except (ImportError, TypeError, ValueError):
        raise SandboxError(f"{place}: no package {package!r} is installed here") from None
    found = root.joinpath(*words)
    if isinstance(found, Path) and found.is_file():
        return found
    there = sorted(root.rglob("*.safetensors")) if isinstance(root, Path) else []
    names = [path.relative_to(str(root)).as_posix() for path in there]
    hint = did_you_mean(name, names) or (f" (there: {', '.join(names[:5])})" if names else "")
    raise SandboxError(f"{place}: the package {package!r} has no file {name!r}{hint}")


def _download(place: str) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    address, _, revision = place.removeprefix("hf://").partition("@")
    words = address.split("/")
    if len(words) < 3 or not all(words):
        raise SandboxError(f"{place}: expected hf://owner/repository/file[@revision]")
    repo, name, at = "/".join(words[:2]), "/".join(words[2:]), revision or "main"
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries say less than we do
    try:
        path = Path(hf_hub_download(repo, name, revision=at))
        etag = get_hf_file_metadata(hf_hub_url(repo, name, revision=at)).etag or ""
    except Exception as error:
        cached = _cached(repo, name, at)
        if cached:
            return cached
        raise SandboxError(
            f"cannot fetch {name} of {repo} ({type(error).__name__}); on a machine with a network "
            f"run `hf download {repo} {name} --revision {at} --local-dir weights`, copy the file "
            f"here, and set the path in place of {place}"
        ) from None
    if len(etag) == 64 and _sha256(path) != etag:  # large files carry their sha256 as the etag
        raise SandboxError(f"{path}: the downloaded bytes do not match the hub's sha256; delete it")
    return path


def _cached(repo: str, name: str, revision: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, name, revision=revision)
    return Path(found) if isinstance(found, str) else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    try:
        mmap = is_zipfile(path)  # files from before torch 1.6 are none
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SandboxError(
            f"{path}: truncated, or not a file of plain weights ({reason}); copy it again"
        ) from None
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise SandboxError(f"{path}: expected a mapping of names to tensors")
    return dict(state)


def _check_fit(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    ours = {name: tensor.shape for name, tensor in module.state_dict().items()}
    theirs = {name: tensor.shape for name, tensor in state.items()}
    if ours == theirs:
        return
    reasons = []
    if describe := getattr(module, "describe", None):
        here, there = describe(module.state_dict()), describe(state)
        reasons = [
            f"its {fact} is {there[fact]}, the recipe's is {here[fact]}"
            for fact in here
            if fact in there and there[fact] != here[fact]
        ]
    if not reasons:
        reasons += [f"it lacks {n}" for n in ours if n not in theirs][:3]
        reasons += [f"it has {n}, which is unknown here" for n in theirs if n not in ours][:3]
        both = [n for n in ours if n in theirs and ours[n] != theirs[n]][:3]
        reasons += [f"{n} is {tuple(theirs[n])} there, {tuple(ours[n])} here" for n in both]
    raise SandboxError(f"{path} does not fit: {'; '.join(reasons)}")


def _check_finite(module: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    names = [name for name, _ in module.named_parameters() if state[name].numel()]
    sick = [n for n in names if not torch.stack(state[n].aminmax()).isfinite().all()]
    if sick:
        raise SandboxError(
            f"{path}: of its {len(names)} parameters {len(sick)} are not finite (NaN or infinite), "
            f"{sick[0]} for one; take a checkpoint from before that"
        )
