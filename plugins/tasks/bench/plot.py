"""Latency and throughput of generation against the batch size, as one picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, NullLocator

import sandbox

_LINES = {"off": "--", "auto": ":", "on": "-"}
_COLOURS = {"float32": "#3b6ea5", "bfloat16": "#c8643c", "float16": "#5b8c5a"}


def plot(path: Path, rows: Sequence[Mapping[str, Any]], title: str) -> bool:
    """Write the picture; False, and nothing written, where no row was measured."""
    measured = [row for row in rows if "median_seconds" in row]
    if not measured:
        return False
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    latency, throughput = figure.subplots(1, 2)
    curves: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in measured:
        curves.setdefault((row["precision"], row.get("fast", "off")), []).append(row)
    for (precision, fast), rows_of_it in curves.items():
        found = sorted(rows_of_it, key=lambda row: row["batch_size"])
        sizes = [row["batch_size"] for row in found]
        middle = [1000 * row["median_seconds"] for row in found]
        low = [1000 * (row["median_seconds"] - row["q1_seconds"]) for row in found]
        high = [1000 * (row["q3_seconds"] - row["median_seconds"]) for row in found]
        style = {"color": _COLOURS[precision], "marker": "o", "markersize": 4}
        style["linestyle"] = _LINES[fast]
        style["label"] = precision if fast == "off" else f"{precision}, fast {fast}"
        latency.errorbar(sizes, middle, yerr=[low, high], capsize=3, **style)
        throughput.plot(sizes, [row["images_per_second"] for row in found], **style)
    ticks = sorted({row["batch_size"] for row in measured})
    for axes, label in ((latency, "ms a batch (quartiles)"), (throughput, "images/s")):
        axes.set(xscale="log", yscale="log", xlabel="batch size", ylabel=label)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter())
        axes.grid(color="#eeeeee")
    latency.legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    with sandbox.atomic(path) as draft:
        figure.savefig(draft, format="png", dpi=120)
    return True
