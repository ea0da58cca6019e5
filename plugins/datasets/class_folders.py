"""Which image files stand in a folder, of which class, and which of them are held out.

The one thing to hold in mind: files are sorted by name, so that the same folder is the same data
set on every machine.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

import sandbox

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_LAYOUT = (
    "lay the images out as ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg (ImageNet: "
    "https://image-net.org/download), as ROOT/CLASS/*.jpg, or without classes as ROOT/*.jpg"
)


@dataclass(frozen=True)
class Files:
    """The files of a split; `labels` index the class names of the data set."""

    paths: list[str]
    labels: list[int]


def splits(
    root: Path, validation_share: float, seed: int
) -> tuple[list[str], dict[sandbox.Split, Files]]:
    """Class names and the files of both splits.

    `root` holds folders train and val, or class folders or loose images, of which `seed` and
    `validation_share` (in (0, 1), at least one image) say what is held out. Raises SandboxError
    where the folder is missing, empty or ambiguous.
    """
    if not root.is_dir():
        raise sandbox.SandboxError(f"image-folder: no folder {root}; {_LAYOUT}")
    if not (root / "train").is_dir():
        class_names, files = _listed(root)
        return class_names, _divided(root, files, validation_share, seed)
    if not (root / "val").is_dir():
        raise sandbox.SandboxError(
            f"image-folder: {root} has a folder train but no val: add it, or set root to "
            f"{root / 'train'} to have a share of it held out"
        )
    class_names, train = _listed(root / "train")
    val_names, val = _listed(root / "val")
    if unknown := sorted(set(val_names) - set(class_names)):
        raise sandbox.SandboxError(
            f"image-folder: {root / 'val'} has classes that {root / 'train'} has not, such as "
            f"{unknown[0]!r}: remove them or add them there"
        )
    labels = [class_names.index(val_names[label]) for label in val.labels]
    return class_names, {"train": train, "validation": Files(val.paths, labels)}


def _listed(folder: Path) -> tuple[list[str], Files]:
    """Class names (the subfolders, sorted) and all files in them, or one class of loose files."""
    loose = _images_in(folder, deep=False)
    folders = sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    members = {f.name: _images_in(f, deep=True) for f in folders}
    if loose and any(members.values()):
        raise sandbox.SandboxError(
            f"image-folder: {folder} holds both images ({Path(loose[0]).name}) and class folders "
            f"({next(name for name, paths in members.items() if paths)}): move one of them away"
        )
    if loose:
        members = {"image": loose}
    if not any(members.values()):
        raise sandbox.SandboxError(f"image-folder: no images in {folder}; {_LAYOUT}")
    if empty := [name for name, paths in members.items() if not paths]:
        raise sandbox.SandboxError(
            f"image-folder: the class folder {folder / empty[0]} has no images "
            f"({', '.join(_SUFFIXES)}): fill or remove it"
        )
    labels = [label for label, paths in enumerate(members.values()) for _ in paths]
    return list(members), Files([p for paths in members.values() for p in paths], labels)


def _images_in(folder: Path, deep: bool) -> list[str]:
    """The image files in a folder, sorted; also those further down where `deep`."""
    found: list[str] = []
    for path, folders, names in os.walk(folder, followlinks=True):
        found += [
            os.path.join(path, name)
            for name in names
            if name.lower().endswith(_SUFFIXES) and not name.startswith(".")
        ]
        if not deep:
            folders.clear()
    return sorted(found)


def _divided(
    root: Path, files: Files, validation_share: float, seed: int
) -> dict[sandbox.Split, Files]:
    """Hold a seeded share out; each split keeps the order of the files."""
    num = len(files.paths)
    if num < 2:
        raise sandbox.SandboxError(
            f"image-folder: {root} has one image, but training and validation need one each"
        )
    num_held_out = min(max(round(validation_share * num), 1), num - 1)
    order = torch.randperm(num, generator=torch.Generator().manual_seed(seed)).tolist()
    parts = {"train": order[num_held_out:], "validation": order[:num_held_out]}
    return {
        split: Files(
            [files.paths[i] for i in sorted(part)], [files.labels[i] for i in sorted(part)]
        )
        for split, part in parts.items()
    }
