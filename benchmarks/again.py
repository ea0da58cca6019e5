"""The rows of docs/results/speed.md measured anew: every bench that its JSON keeps, as it stands.

    python benchmarks/again.py docs/results/speed runs/again --only d16 raster

Each command's `bench.json` becomes NAME.json in the new folder as soon as it ends, so that what is
stopped half way leaves what it has measured; `benchmarks/speed.py` makes the tables of them. What
was measured on a CPU is measured on a CPU again. Ends with 1 if a command failed.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, help="the folder of JSON")
    parser.add_argument("now", type=Path, help="a folder for the new")
    parser.add_argument("--only", nargs="+", help="names of files, without .json")
    options = parser.parse_args()
    kept = {path.stem: json.loads(path.read_text()) for path in options.before.glob("*.json")}
    kept = {name: each for name, each in kept.items() if "environment" in each}  # of a bench
    names = options.only or sorted(kept)
    if unknown := [name for name in names if name not in kept]:
        parser.error(f"{options.before} has no {unknown[0]}.json; it has {', '.join(sorted(kept))}")
    options.now.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in names:
        folder = options.now / "folders" / name
        words = command(kept[name], folder)
        print(shlex.join(words), flush=True)
        if subprocess.run([sys.executable, "-m", *words], check=False).returncode:
            failed.append(name)
        if (folder / "bench.json").exists():  # also of one that failed on the way
            shutil.copy(folder / "bench.json", options.now / f"{name}.json")
    for name in failed:
        print(f"failed: {name}", file=sys.stderr)
    return 1 if failed else 0


def command(kept: Mapping[str, Any], folder: Path) -> list[str]:
    """What made this file, with its rows in another folder."""
    words = shlex.split(kept["environment"]["command"])
    if "--out" in words:
        at = words.index("--out")
        del words[at : at + 2]
    if kept["device"] == "CPU" and "device=cpu" not in words:
        words += ["--set", "device=cpu"]
    return [*words, "--out", str(folder)]


if __name__ == "__main__":
    sys.exit(main())
