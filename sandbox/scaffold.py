"""Writes the skeleton of a plugin: one small working part and the test that holds it to its laws.

The skeletons are plugins with placeholders for names, kept as text in `sandbox/templates`.
"""

import keyword
from importlib.resources import files
from pathlib import Path

from sandbox.errors import SandboxError, did_you_mean

INTERFACE_OF_KIND = {
    "sampler": "Sampler",
    "schedule": "ScaleSchedule",
    "tokenizer": "Tokenizer",
    "codebook": "Codebook",
    "autoencoder": "Autoencoder",
    "backbone": "Backbone",
    "attention": "AttentionBackend",
    "generator": "Generator",
    "objective": "Objective",
    "image-loss": "ImageLoss",
    "adversary": "Adversary",
    "dataset": "Dataset",
    "features": "FeatureExtractor",
    "metric": "Metric",
    "observer": "Observer",
    "task": "Task",
}


def write_plugin(folder: Path, name: str, kind: str) -> list[Path]:
    """Write `folder/NAME.py`, a part of that kind, and `folder/test_NAME.py`; return the two.

    The part is registered as the name with hyphens: the plugin `my_sampler` offers `my-sampler`.
    Raises SandboxError for a name that is no module's, an unknown kind, and a file that is there.
    """
    if kind not in INTERFACE_OF_KIND:
        known = ", ".join(INTERFACE_OF_KIND)
        hint = did_you_mean(kind, INTERFACE_OF_KIND)
        raise SandboxError(f"--kind {kind}: unknown kind{hint} (known: {known})")
    if not (name.isascii() and name.isidentifier() and name.islower()) or keyword.iskeyword(name):
        raise SandboxError(
            f"{name!r} cannot name a plugin: use small letters, digits and underscores, as in "
            "my_sampler"
        )
    if name.startswith("test_"):
        raise SandboxError(f"{name!r} would be taken for a test: leave out the test_")
    written = {
        folder / f"{name}.py": _filled(kind, name, kind),
        folder / f"test_{name}.py": _filled("test", name, kind),
    }
    for path in written:
        if path.exists():
            raise SandboxError(f"{path} exists already: choose another name or --folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in written.items():
            path.write_text(text)
    except OSError as error:
        raise SandboxError(f"cannot write the plugin to {folder}: {error.strerror}") from None
    return list(written)


def _filled(template: str, name: str, kind: str) -> str:
    """A template with its placeholders replaced."""
    text = (files("sandbox") / "templates" / f"{template}.py.txt").read_text("utf-8")
    words = {
        "sandbox.Interface": f"sandbox.{INTERFACE_OF_KIND[kind]}",
        "def test_skeleton": f"def test_{name}",
        "Skeleton": "".join(word.capitalize() for word in name.split("_")),
        "skeleton": name.strip("_").replace("_", "-"),
    }
    for placeholder, word in words.items():
        text = text.replace(placeholder, word)
    return text
