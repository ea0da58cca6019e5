"""The parts of the report, each from a run record to HTML; one with nothing to say is empty."""

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from . import charts
from .findings import direction, key_scores, kind_of, seconds_per_image, split_score
from .page import Html, bar, cell, facts, join, picture, rows_table, section, show, tag
from .record import RunRecord, TaskRecord
from .wording import columns_of, duration, is_table, number

_ARROW = {1: "higher is better", -1: "lower is better", 0: ""}
_NUM_TILES = 8
_NUM_EARLIER = 5
_EARLIER_PX = 340
_SHARES = ("usage", "residual", "ids_changed", "of_kmeans_alone", "of_kmeans")
_MEANINGS = {
    "used": "codes drawn",
    "usage": "their share of those that could have been",
    "perplexity": "as many codes, used evenly, would be as rich",
    "entropy": "the same in nats",
    "residual": "share of the features' variance still missing after the scale",
    "psnr_upto": "dB from the scales so far alone",
    "ids_changed": "share of the ids that differ from the measurement before",
    "kmeans_perplexity": "of as many k-means codes for this scale by itself",
    "kmeans_shared_perplexity": "of as many for all scales together",
    "of_kmeans_alone": "perplexity over kmeans_perplexity, the stricter measure",
    "of_kmeans": "perplexity over kmeans_shared_perplexity",
}


def header(run: RunRecord) -> Html:
    """Name, state, and the key numbers."""
    if run.error is not None:
        status = tag("span", "failed", class_="status failed")
    elif run.going or any(not task.ended for task in run.tasks.values()):
        status = tag("span", "not finished", class_="status going")
    else:
        status = tag("span", "finished", class_="status")
    when = (
        ""
        if run.started is None
        else f"{datetime.fromtimestamp(run.started, UTC):%Y-%m-%d %H:%M} UTC"
    )
    tasks = ", ".join(_state(task) for task in run.tasks.values())
    folder = run.folder.resolve().name
    where = "" if folder == run.title else f"folder {folder}"
    lines = [
        tag("h1", run.title, " ", status),
        tag("p", " - ".join(filter(None, [where, when, tasks])), class_="soft"),
    ]
    if run.error is not None:
        lines.append(tag("p", run.error or "stopped", class_="error"))
    lines += [tag("p", note, class_="soft") for note in run.notes]
    return join([*lines, _tiles(run), "\n"])


def _state(task: TaskRecord) -> str:
    if task.ended or not task.total:
        return task.label if task.ended else f"{task.label} (begun)"
    return f"{task.label} ({100 * task.done // task.total} %)"


def _tiles(run: RunRecord) -> Html:
    tiles = []
    main = {k: v for k, v in key_scores(run).items() if not split_score(k)[0].endswith("_std")}
    for name, value in list(main.items())[:_NUM_TILES]:
        stem, extractor = split_score(name)
        tiles.append((number(value), stem, extractor or _ARROW[direction(name)]))
    for task in run.tasks.values():
        if (seconds := seconds_per_image(task)) is not None:
            tiles.append((f"{number(1000 * seconds)} ms", "an image", task.name))
    if run.seconds:
        tiles.append((duration(run.seconds), "in all", ""))
    return tag(
        "div",
        *(
            tag("div", tag("b", value), tag("span", name), tag("span", note), class_="tile")
            for value, name, note in tiles
        ),
        class_="tiles",
    )


def pictures(run: RunRecord) -> Html:
    """Samples large, then strips, reconstructions and the rest; later tasks first."""
    kinds: dict[str, list[Html]] = {
        kind: [] for kind in ("Samples", "Coarse to fine", "Reconstructions", "Other pictures")
    }
    for task in reversed(run.tasks.values()):
        series: dict[str, list[Path]] = {}
        for path in task.pictures:
            series.setdefault(_series(path), []).append(path)
        for paths in series.values():
            kinds[kind_of(paths[-1])].append(_last_of(task, paths))
    return join(section(kind, *shown) for kind, shown in kinds.items())


def _series(path: Path) -> str:
    """Pictures that differ in their numbers alone show one thing at different times."""
    return re.sub(r"\d+", "#", path.stem)


def _last_of(task: TaskRecord, paths: list[Path]) -> Html:
    *earlier, last = paths
    shown = picture(last, f"{last.stem} ({task.label})")
    if not earlier:
        return shown
    stride = max(1, -(-len(earlier) // _NUM_EARLIER))
    thumbnails = [picture(path, path.stem, _EARLIER_PX) for path in earlier[::stride]]
    return join([shown, tag("p", "earlier:", class_="soft"), tag("div", *thumbnails, class_="row")])


def scores(run: RunRecord) -> Html:
    """Every score, and under what conditions it was taken."""
    shown = []
    for task in run.tasks.values():
        values, provenance = task.result.get("scores"), task.result.get("provenance")
        if not isinstance(values, Mapping):
            continue
        rows = []
        for name, value in values.items():
            stem, extractor = split_score(str(name))
            rows.append(
                {
                    "score": stem,
                    "value": value,
                    "features of": extractor or "-",
                    "": _ARROW[direction(stem)],
                }
            )
        table = rows_table(rows) if is_table(rows) else show(values)
        taken = facts(provenance, "taken with") if isinstance(provenance, Mapping) else Html()
        shown += [tag("h3", task.label), tag("div", table, taken, class_="row")]
    return section("Scores", *shown)


def codebooks(run: RunRecord) -> Html:
    """How much of the codebook each scale uses."""
    shown = []
    for task in run.tasks.values():
        rows = task.result.get("codebook")
        if is_table(rows):
            shown += [tag("h3", task.label), rows_table(rows, bars=_SHARES), _legend(rows)]
    return section("Codebook by scale", *shown)


def _legend(rows: Sequence[Mapping[str, Any]]) -> Html:
    """What the columns that need it mean."""
    known = [f"{name}: {_MEANINGS[name]}" for name in columns_of(rows) if name in _MEANINGS]
    return tag("p", "; ".join(known), class_="soft") if known else Html()


def curves(run: RunRecord) -> Html:
    """The training curves of every task."""
    shown = []
    for task in run.tasks.values():
        grouped = charts.group(task.curves)
        drawn = [
            tag("div", Html(charts.draw(name, lines)), class_="narrow" if len(lines) == 1 else None)
            for name, lines in sorted(grouped.items(), key=lambda each: len(each[1]) == 1)
        ]
        if drawn:
            shown += [tag("h3", task.label), tag("div", *drawn, class_="charts")]
    return section("Curves", *shown)


def timings(run: RunRecord) -> Html:
    """Where the time went."""
    if not run.seconds:
        return Html()
    rows = []
    for task in run.tasks.values():
        per_image = seconds_per_image(task)
        share = task.seconds / run.seconds
        cells = [
            tag("td", task.label),
            tag("td", duration(task.seconds), class_="number"),
            tag("td", bar(share), f"{100 * share:.0f} %"),
            cell("-" if per_image is None else 1000 * per_image, class_="number"),
        ]
        rows.append(tag("tr", *cells))
    right = {"class_": "number"}
    head = tag(
        "tr", tag("th", "task"), tag("th", "time", **right), tag("th", "share"),
        tag("th", "ms an image", **right),
    )  # fmt: skip
    total = tag("tr", tag("th", "in all"), tag("th", duration(run.seconds), **right))
    return section("Time", tag("table", head, *rows, total))


def other_results(run: RunRecord) -> Html:
    """What tasks returned beyond what the page shows elsewhere."""
    shown = []
    for task in run.tasks.values():
        rest = {key: v for key, v in task.result.items() if not _shown_elsewhere(task, key)}
        if rest:
            shown.append(tag("div", tag("h3", task.label), facts(rest)))
    return section("Results", tag("div", *shown, class_="columns") if shown else "")


def _shown_elsewhere(task: TaskRecord, key: str) -> bool:
    value = task.result[key]
    if key == "codebook":
        return is_table(value)
    if key in ("scores", "provenance"):
        return isinstance(value, Mapping) and isinstance(task.result.get("scores"), Mapping)
    return key in ("seconds", "seconds_per_image") and isinstance(value, int | float)


def messages(run: RunRecord) -> Html:
    """What the tasks had to say, repetitions counted."""
    shown = []
    for task in run.tasks.values():
        for text, times in groupby(task.messages):
            count = len(list(times))
            shown.append(
                tag("li", f"{task.label}: {text}" + (f" ({count} times)" if count > 1 else ""))
            )
    return section("Messages", tag("ul", *shown) if shown else "")


def background(run: RunRecord) -> Html:
    """Plans, environment and recipe: what it takes to do it again."""
    plans = [
        tag("div", tag("h3", task.label), facts(task.plan))
        for task in run.tasks.values()
        if task.plan
    ]
    return join(
        [
            section("Plan", tag("div", *plans, class_="columns") if plans else ""),
            section("Environment", facts(run.environment)),
            section("Recipe", tag("pre", run.recipe) if run.recipe else ""),
        ]
    )
