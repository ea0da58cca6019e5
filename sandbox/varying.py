"""A recipe measured with each of several values of its settings: backends, layouts, widths.

Each is a process of its own, so that none profits from what another has built or left in memory,
and a folder of its own, which holds what `sandbox bench` keeps; beside them stands all of it.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from sandbox.bench import LISTS
from sandbox.checkpoint import write_json
from sandbox.errors import SandboxError

KEPT = "bench.json"


def measure_each(
    words: Sequence[str], folder: Path, arguments: argparse.Namespace, say: Callable[[str], None]
) -> int:
    """Measure with every combination of the values, and return the worst exit status.

    `words` are as after `--vary`: `KEY=VALUE,...`. What an earlier measurement of this kind left in
    the folder is replaced as it is met. Raises SandboxError for words that cannot be read, and for
    a folder that holds anything else.
    """
    choices = [_choices(each) for each in words]
    if folder.exists() and not _is_ours(folder):
        raise SandboxError(
            f"--out {folder}: holds something other than such measurements; choose another"
        )
    names = _names(choices)
    found, worst = list[dict[str, Any]](), 0
    write_json(folder / KEPT, {"variants": found})  # so that one that is stopped can begin anew
    for chosen in product(*choices):
        settings = dict(chosen)
        name = names[len(found)]
        say(f"== {name}")
        place = folder / f"{len(found) + 1}-{''.join(c if c.isalnum() else '-' for c in name)[:60]}"
        sets = [word for key, value in chosen for word in ("--set", f"{key}={json.dumps(value)}")]
        command = [sys.executable, "-m", "sandbox", "bench", *_forwarded(arguments), *sets]
        status = subprocess.run([*command, "--out", str(place)], check=False).returncode
        worst = max(worst, abs(status))  # of one that was killed it is negative
        kept = {"name": name, "settings": settings, "folder": place.name, "status": status}
        if status == 0:
            kept["measured"] = json.loads((place / KEPT).read_text())
        found.append(kept)
        write_json(folder / KEPT, {"variants": found})
    say("\n".join([*_table(found), f"everything is in {folder}"]))
    return worst


def _choices(word: str) -> list[tuple[str, Any]]:
    """A key with each of its values."""
    key, equals, values = word.partition("=")
    try:
        read = yaml.safe_load(f"[{values}]")
    except yaml.YAMLError:
        read = None
    if key == "generator.fast":
        raise SandboxError(f"--vary {word}: give --fast {values} instead, which times all in turn")
    if not key or not equals or not read:
        raise SandboxError(
            f"--vary {word}: expected KEY=VALUE,VALUE, as in generator.backbone.depth=8,12"
        )
    try:
        json.dumps(read)
    except TypeError as error:
        raise SandboxError(f"--vary {word}: {error}; put such a value in quotes") from None
    return [(key, value) for value in read]


def _is_ours(folder: Path) -> bool:
    """Whether it is empty, or holds what was measured here before."""
    if not folder.is_dir():
        return False
    kept = folder / KEPT
    try:
        known = json.loads(kept.read_text()) if kept.is_file() else {}
    except ValueError:
        return False
    return not any(folder.iterdir()) or (isinstance(known, dict) and "variants" in known)


def _names(choices: Sequence[Sequence[tuple[str, Any]]]) -> list[str]:
    """One of every combination, as short as tells them apart."""
    for short in (True, False):
        names = [
            ", ".join(_name(key, value, short=short) for key, value in chosen)
            for chosen in product(*choices)
        ]
        if len(set(names)) == len(names):
            break
    return names


def _name(key: str, value: Any, *, short: bool) -> str:
    """`attention=sdpa` of `generator.backbone.attention.name` or, in full, that."""
    if not short:
        return f"{key}={json.dumps(value)}"
    last = key.removesuffix(".name").rpartition(".")[2]
    if isinstance(value, dict) and "name" in value:
        return f"{last}={value['name']}"
    return f"{last}={value if isinstance(value, str) else json.dumps(value)}"


def _forwarded(arguments: argparse.Namespace) -> list[str]:
    """The command line of one measurement, but for what is varied and where it goes."""
    words = [str(arguments.recipe)]
    for flag in ("full", "preview", "profile"):
        words += [f"--{flag}"] * bool(getattr(arguments, flag))
    for key in (*LISTS, "repeats", "compile"):
        if (value := getattr(arguments, key)) is not None:
            words += [f"--{key.replace('_', '-')}", value]
    for key, values in (("--plugins", arguments.plugins), ("--set", arguments.set)):
        words += [word for value in values for word in (key, str(value))]
    return words


def _table(found: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Every row of all, with where it was measured."""
    header = ("variant", "part", "precision", "batch", "how", "ms", "images/s", "GiB")
    lines = [header]
    for each in found:
        measured = each.get("measured", {"settings": {"parts": []}})
        rows = [(part, row) for part in measured["settings"]["parts"] for row in measured[part]]
        lines += [(each["name"], *_cells(part, row)) for part, row in rows]
        if not rows:
            why = f"failed ({each['status']})" if each["status"] else "nothing measured"
            lines.append((each["name"], why, *[""] * 6))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        yield "  ".join(cells).rstrip()


def _cells(part: str, row: dict[str, Any]) -> tuple[str, ...]:
    how = "compiled" if row.get("compiled") else f"fast: {row['fast']}" if "fast" in row else ""
    how += f" ({row['status']})" * (row["status"] != "ok")
    where = (part, row["precision"], str(row["batch_size"]), how.strip())
    if "median_seconds" not in row:
        return (*where, "", "", "")
    peak = row.get("peak_bytes")
    gib = "" if peak is None else f"{peak / 2**30:.2f}"
    return (*where, f"{1e3 * row['median_seconds']:.4g}", f"{row['images_per_second']:.4g}", gib)
