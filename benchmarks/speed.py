"""The tables of docs/results/speed.md, from what `sandbox bench` kept.

    python benchmarks/speed.py docs/results/speed > tables.md

Reads the `*.json` of a folder, each the `bench.json` of one command (which stands in it), and
prints, as Markdown: every command with its machine and date; our column beside what the published
implementation reaches and what was aimed at; plain and fast side by side; raster-scan against
next-scale; what each precision of the encoder changes; and, row by row, the kernels that took
longest. A row that a file lacks is left out; a file that a stopped bench left says so.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KERNELS = 10
GIB = 2**30
SPLIT_ALIKE = 1.15
"""How much longer than a row's median a call may take that tells the row's parts."""


@dataclass(frozen=True)
class Goal:
    """A line of the table: which row of which file it is."""

    name: str
    file: str
    """Of the files called so, or so and more after a hyphen, the latest that has the row."""
    part: str
    where: Mapping[str, Any]
    published: str
    limit: str
    wanted: float
    unit: str
    """`ms` a batch, less is better; `img/s`; or `times` as fast as the plain path."""

    def reached(self, row: Mapping[str, Any]) -> float:
        if self.unit == "times":
            return float(row["times_as_fast"])
        return 1e3 * row["median_seconds"] if self.unit == "ms" else row["images_per_second"]

    def is_met(self, row: Mapping[str, Any]) -> bool:
        ours = self.reached(row)
        return ours <= self.wanted if self.unit == "ms" else ours >= self.wanted


def drawn(size: int) -> dict[str, Any]:
    return {"precision": "bfloat16", "batch_size": size, "fast": "on"}


def built(precision: str, size: int) -> dict[str, Any]:
    return {"precision": precision, "batch_size": size, "compiled": True}


GOALS = [
    Goal("VAR-d16, batch 1", "d16", "generation", drawn(1), "142 ms", "2 ms", 9, "ms"),
    Goal("batch 8", "d16", "generation", drawn(8), "48 img/s", "795 img/s", 330, "img/s"),
    Goal("batch 64", "d16", "generation", drawn(64), "141 img/s", "795 img/s", 450, "img/s"),
    Goal("VAR-d30, batch 1", "d30", "generation", drawn(1), "370 ms", "9 ms", 22, "ms"),
    Goal("batch 64", "d30", "generation", drawn(64), "58 img/s", "189 img/s", 115, "img/s"),
    Goal(
        *("decoder alone, batch 64", "coding", "decoding", built("bfloat16", 64)),
        *("367 img/s", "2006 img/s", 1000, "img/s"),
    ),
    Goal(
        *("tokenizing, bfloat16, batch 64", "coding", "encoding", built("bfloat16", 64)),
        *("444 img/s", "3670 img/s", 1400, "img/s"),
    ),
    Goal(
        *("tokenizing, TF32 (the caches' default)", "coding", "encoding", built("tf32", 64)),
        *("", "", 1000, "img/s"),
    ),
    Goal(
        *("d16 training step, batch 96", "training", "training", built("bfloat16", 96)),
        *("214 img/s, 65 GiB", "850 img/s", 500, "img/s"),
    ),
    Goal(
        *("the model in the box on a CPU, batch 50", "cpu", "generation"),
        *({"precision": "float32", "batch_size": 50, "fast": "on"}, "", "", 1.5, "times"),
    ),
]


def read(folder: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def found(
    measured: Mapping[str, Any], file: str, part: str, where: Mapping[str, Any]
) -> tuple[str, Any] | None:
    """The latest such row and its file; what `where` does not name is as in a plain row."""
    for name in of_kind(measured, file):
        for row in measured[name].get(part, []):
            plain = {"compiled": False, "fast": row.get("fast"), **where}
            told = {"compiled": False, **row}
            if "median_seconds" in row and all(told.get(key) == plain[key] for key in plain):
                return name, row
    return None


def of_kind(measured: Mapping[str, Any], file: str) -> list[str]:
    """The files of this kind, the latest first."""
    names = [name for name in measured if name == file or name.startswith(f"{file}-")]
    return sorted(names, key=lambda name: str(measured[name].get("date", "")), reverse=True)


def table(header: str, rows: Iterator[str]) -> Iterator[str]:
    lines = list(rows)
    if lines:
        yield f"| {header} |"
        yield "|---" * (header.count("|") + 1) + "|"
        yield from lines
        yield ""


def commands(measured: Mapping[str, Any]) -> Iterator[str]:
    for file, kept in measured.items():
        if "environment" in kept:
            top = [f"{r['flops_per_second'] / 1e12:.3g}" for r in kept["ceilings"]["matmul"][-1:]]
            copied = kept["ceilings"]["copy"].get("bytes_per_second", 0) / 1e12
            name = file if kept.get("complete", True) else f"{file} (stopped before its end)"
            yield (
                f"| {name} | `{kept['environment'].get('command', '')}` | {machine(kept)} "
                f"| {kept['date'][:10]} | {top[0]} | {copied:.2f} |"
            )


def machine(kept: Mapping[str, Any]) -> str:
    """The GPU, or the processor and how many of its cores."""
    if kept["device"] != "CPU":
        return str(kept["device"])
    facts = kept["environment"]
    return f"{facts['CPU threads of torch']} cores of {facts['CPU']}; torch {facts['torch']}"


def goals(measured: Mapping[str, Any]) -> Iterator[str]:
    for goal in GOALS:
        if that := found(measured, goal.file, goal.part, goal.where):
            file, row = that
            value = goal.reached(row)
            ours = f"{value:{'.3g' if value < 1000 else '.0f'}} {goal.unit}"
            if goal.part == "training":
                ours += f", {row['peak_bytes'] / GIB:.1f} GiB"
            low, high = (1e3 * row[name] for name in ("q1_seconds", "q3_seconds"))
            yield (
                f"| {goal.name} | {goal.published} | {goal.limit} | {goal.wanted} {goal.unit} "
                f"| **{ours}** | {file} | {low:.4g} to {high:.4g} "
                f"| {'yes' if goal.is_met(row) else 'no'} |"
            )


def timed(measured: Mapping[str, Any], part: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a part that could be measured, with their files."""
    for file, kept in measured.items():
        for row in kept.get(part, []):
            if "median_seconds" in row:
                yield file, row


def modes(measured: Mapping[str, Any]) -> Iterator[str]:
    for file, row in timed(measured, "generation"):
        yield (
            f"| {file} | {row['precision']} | {row['batch_size']} | {row.get('fast', '-')} "
            f"| {1e3 * row['median_seconds']:.4g} | {row['images_per_second']:.4g} "
            f"| {optional(row, 'times_as_fast', '.2f')} | {row['first_seconds']:.3g} "
            f"| {row['peak_bytes'] / GIB:.1f} | {percent(row, 'share_of_matmul')} "
            f"| {percent(row, 'share_of_copy')} | {split(row)} |"
        )


def optional(row: Mapping[str, Any], name: str, form: str) -> str:
    return format(row[name], form) if row.get(name) is not None else ""


def percent(row: Mapping[str, Any], name: str) -> str:
    return f"{100 * row[name]:.1f}" if row.get(name) is not None else ""


def split(row: Mapping[str, Any]) -> str:
    """Transformer, sampling, decoder and the rest, in percent; nothing where what was split took
    much longer than the row, as a generation does that is not recorded."""
    if not row.get("splits"):
        return ""
    parts = {name: statistics.median(s[name] for s in row["splits"]) for name in row["splits"][0]}
    whole = parts.pop("whole")
    if whole > SPLIT_ALIKE * row["median_seconds"]:
        return ""
    named = [parts.pop(name, 0) for name in ("transformer", "sampling", "decoder")]
    return ", ".join(f"{100 * part / whole:.0f}" for part in [*named, sum(parts.values())])


def coding(measured: Mapping[str, Any]) -> Iterator[str]:
    for part in ("encoding", "decoding"):
        for file, row in timed(measured, part):
            changed = percent(row, "ids_changed") if part == "encoding" else ""
            yield (
                f"| {file} | {part} | {row['precision']} "
                f"| {'yes' if row.get('compiled') else 'no'} "
                f"| {row['images_per_second']:.4g} | {changed} | {row['peak_bytes'] / GIB:.1f} |"
            )


def training(measured: Mapping[str, Any]) -> Iterator[str]:
    for file, row in timed(measured, "training"):
        parts = {
            name: 1e3 * statistics.median(each[name] for each in row["splits"])
            for name in row["splits"][0]
        }
        yield (
            f"| {file} | {row['batch_size']} | {'yes' if row.get('compiled') else 'no'} "
            f"| {row['images_per_second']:.4g} | {row['peak_bytes'] / GIB:.1f} "
            f"| {', '.join(f'{ms:.0f}' for ms in parts.values())} "
            f"| {percent(row, 'share_of_matmul')} |"
        )


def drawn_by(measured: Mapping[str, Any], kind: str, mode: str) -> dict[int, Any]:
    """By batch size, the rows that count."""
    files = {name: measured[name] for name in of_kind(measured, kind)}
    sizes = {row["batch_size"] for _, row in timed(files, "generation") if row.get("fast") == mode}
    rows = {
        size: found(measured, kind, "generation", {"batch_size": size, "fast": mode})
        for size in sizes
    }
    return {size: that[1] for size, that in rows.items() if that}


def ratio(measured: Mapping[str, Any]) -> Iterator[str]:
    """At batch 1, and of each at its own best batch, where both were measured at several."""
    for mode in ("off", "on"):
        mine, theirs = (drawn_by(measured, kind, mode) for kind in ("d16", "raster"))
        if 1 not in mine or 1 not in theirs:
            continue
        latency = [1e3 * rows[1]["median_seconds"] for rows in (mine, theirs)]
        line = (
            f"| {mode} | {latency[0]:.4g} | {latency[1]:.4g} | **{latency[1] / latency[0]:.1f}** "
        )
        if min(len(mine), len(theirs)) == 1:
            yield f"{line}| | | |"
            continue
        rates = [
            {size: row["images_per_second"] for size, row in rows.items()}
            for rows in (mine, theirs)
        ]
        best = [max(of, key=lambda size: of[size]) for of in rates]
        cells = [f"{of[size]:.4g} ({size})" for of, size in zip(rates, best, strict=True)]
        times = rates[0][best[0]] / rates[1][best[1]]
        yield f"{line}| {' | '.join(cells)} | **{times:.2g}** |"


def kernels(measured: Mapping[str, Any]) -> Iterator[str]:
    """A small table for each line of the table of goals."""
    for goal in GOALS:
        file, row = found(measured, goal.file, goal.part, goal.where) or ("", {})
        if not isinstance(row.get("kernels"), list):
            continue
        whole, busy = 1e3 * row["median_seconds"], 1e3 * row["kernels_seconds"]
        yield f"**{file}, {goal.name}**: {whole:.4g} ms, kernels {busy:.4g} ms"
        yield ""
        yield from table(
            "ms | % | calls | kernel",
            (
                f"| {1e3 * k['seconds']:.3g} | {1e5 * k['seconds'] / busy:.0f} | {k['calls']} "
                f"| `{k['name'][:100]}` |"
                for k in row["kernels"][:KERNELS]
            ),
        )


SECTIONS: list[tuple[str, str, Callable[[Mapping[str, Any]], Iterator[str]]]] = [
    (
        "Commands",
        "file | command | machine | date | matrix product, TFLOP/s | copy, TB/s",
        commands,
    ),
    (
        "Goals",
        " | published | limit | aimed at | ours | file | quartiles, ms a batch | reached",
        goals,
    ),
    (
        "Generation",
        "file | precision | batch | fast | ms | img/s | times as fast | first, s | GiB "
        "| % of product | % of copy | transformer, sampling, decoder, rest, %",
        modes,
    ),
    (
        "Next-scale and raster-scan",
        "fast | batch 1, ms | raster | ratio | best batch, img/s | raster | ratio",
        ratio,
    ),
    ("Tokenizer", "file | part | precision | compiled | img/s | ids changed, % | GiB", coding),
    (
        "Training",
        "file | batch | compiled | img/s | GiB | forward, backward, optimizer, ms | % of product",
        training,
    ),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    measured = read(parser.parse_args().folder)
    for title, header, rows in SECTIONS:
        if lines := list(table(header, rows(measured))):
            print("\n".join([f"## {title}\n", *lines]))
    print("## Kernels\n")
    print("\n".join(kernels(measured)))


if __name__ == "__main__":
    main()
