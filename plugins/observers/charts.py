"""A task's curves as SVG charts: curves whose names share their first word share a chart.

`loss`, `loss/scale1`, `loss/scale2` and `validation/loss` are one chart named "loss": the whole in
black, its parts in colour (scales from dark to light, coarse to fine), validation dashed beside
training.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

_VALIDATION = {"validation", "valid", "val"}
_SPLITS = _VALIDATION | {"train", "training"}
_PALETTE = ["#3b6ea5", "#c8643c", "#5b8c5a", "#8d6aa9", "#b08a2e", "#4d9aa0", "#b0567c", "#777777"]
_NUM_POINTS = 300
_LOG_RATIO = 20.0
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sandbox",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.grid": True,
    "grid.color": "#eeeeee",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "axes.labelcolor": "#555555",
}
_NO_METADATA: dict[str, Any] = dict.fromkeys(["Creator", "Date", "Format", "Type"])


@dataclass(frozen=True)
class Line:
    """One curve of a chart."""

    part: str
    """What of the whole it is, as in `scale3`; empty for the whole."""
    validation: bool
    points: Mapping[int, float]

    @property
    def scale(self) -> int | None:
        found = re.fullmatch(r"(?:scale|step)[ _-]?(\d+)", self.part)
        return int(found[1]) if found else None


def group(curves: Mapping[str, Mapping[int, float]]) -> dict[str, list[Line]]:
    """The charts to draw, by title. A curve with fewer than two points is left out."""
    charts: dict[str, list[Line]] = {}
    for name, points in curves.items():
        if len(points) < 2:
            continue
        words = [word for word in name.split("/") if word]
        split = {word.lower() for word in words} & _SPLITS
        words = [word for word in words if word.lower() not in _SPLITS] or words
        for word in _SPLITS if not split else ():  # also `val_loss` and `loss_val`
            bare = re.sub(rf"^{word}_|_{word}$", "", words[0])
            if bare != words[0]:
                words[0], split = bare, {word}
        line = Line(" ".join(words[1:]), bool(split & _VALIDATION), points)
        charts.setdefault(words[0] if words else name, []).append(line)
    return charts


def draw(title: str, lines: Sequence[Line]) -> str:
    """One chart as an inline `<svg>`, narrow for a single line. The same curves, the same bytes."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.6, 2.9) if len(lines) > 1 else (3.7, 2.4), layout="constrained")
        axes = figure.add_subplot()
        for line in sorted(lines, key=lambda line: (line.scale or 0, line.part, line.validation)):
            _plot(axes, line, lines)
        axes.set_title(_escape(title), loc="left", fontsize=10, fontweight="bold")
        axes.set_xlabel("images seen")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        values = [value for line in lines for value in line.points.values()]
        if "loss" in title and min(values) > 0 and max(values) > _LOG_RATIO * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
        if len(lines) > 1:
            figure.legend(loc="outside right upper", frameon=False, fontsize=8, handlelength=1.6)
        svg = StringIO()
        with warnings.catch_warnings():  # the browser has the letters that matplotlib's font lacks
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            figure.savefig(svg, format="svg", metadata=_NO_METADATA, transparent=True)
    return _embeddable(svg.getvalue())


def _plot(axes: Axes, line: Line, lines: Sequence[Line]) -> None:
    others = sorted({(each.scale or 0, each.part) for each in lines if each.part})
    parts = [part for _, part in others]
    if not line.part:
        color: Any = "#222222"
    elif line.scale is not None:
        position = parts.index(line.part) / max(1, len(parts) - 1)
        color = matplotlib.colormaps["viridis"](0.9 * position)
    else:
        color = _PALETTE[parts.index(line.part) % len(_PALETTE)]
    done, values = _thinned(line.points)
    axes.plot(
        done,
        values,
        color=color,
        linewidth=1.0 if line.part else 1.6,
        linestyle="--" if line.validation and _has_train(lines) else "-",
        marker="o" if len(done) < 8 else "",
        markersize=3,
        label=_legend(line, lines),
    )


def _legend(line: Line, lines: Sequence[Line]) -> str:
    """What a line is called; a dashed part beside its solid twin needs no name of its own."""
    part = _escape(re.sub(r"^(scale|step)[_-]?(\d+)$", r"\1 \2", line.part)) if line.part else ""
    twins = [each for each in lines if each.part == line.part]
    if not part:
        return "validation" if line.validation else "train" if len(twins) > 1 else "all"
    if line.validation and len(twins) > 1:
        return "_nolegend_"
    return f"{part} (validation)" if line.validation and _has_train(lines) else part


def _has_train(lines: Sequence[Line]) -> bool:
    return any(not line.validation for line in lines)


def _thinned(points: Mapping[int, float]) -> tuple[np.ndarray, np.ndarray]:
    """At most `_NUM_POINTS` points: means over neighbours, so that no extreme is singled out."""
    done = np.array(sorted(points), dtype=np.float64)
    values = np.array([points[int(each)] for each in done])
    if len(done) <= _NUM_POINTS:
        return done, values
    return (
        np.array([chunk.mean() for chunk in np.array_split(done, _NUM_POINTS)]),
        np.array([chunk.mean() for chunk in np.array_split(values, _NUM_POINTS)]),
    )


def _escape(text: str) -> str:
    """Keep matplotlib from reading a name as mathematics or hiding it from the legend."""
    printable = "".join(letter if letter.isprintable() else "?" for letter in text)
    return printable.replace("$", r"\$").lstrip("_") or "-"


def _embeddable(svg: str) -> str:
    """The bare element, without the ids that nothing refers to: a page has many charts."""
    svg = svg[svg.index("<svg") :]
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    return svg.replace("<svg", '<svg role="img"', 1).replace("\n", "")
