"""This run beside others in one table: scores, times, samples; the best of each score in bold."""

from collections.abc import Sequence
from pathlib import Path

from .findings import conditions, direction, key_scores, sample_picture, seconds_per_image
from .page import Html, cell, picture, section, tag
from .record import RunRecord, read_run
from .wording import duration

_SAMPLE_PX = 400


def compare(run: RunRecord, beside: Sequence[Path]) -> Html:
    """One column a run. A folder that is not there becomes a note."""
    runs, notes = [run], []
    for folder in beside:
        try:
            runs.append(read_run(folder))
        except FileNotFoundError:
            notes.append(tag("p", f"{folder}: not compared, there is no such run", class_="soft"))
    if len(runs) == 1:
        return section("Beside other runs", *notes)
    head = tag("tr", tag("th", ""), *(tag("th", _name(run), class_="number") for run in runs))
    rows = [*_score_rows(runs), *_image_time_rows(runs), *_time_rows(runs), *_sample_row(runs)]
    if unequal := _unequal(runs):
        notes.append(
            tag(
                "p",
                f"Scores taken under different conditions: {', '.join(unequal)}.",
                class_="soft",
            )
        )
    return section("Beside other runs", tag("table", head, *rows), *notes)


def _name(run: RunRecord) -> str:
    folder = run.folder.resolve().name
    return run.title if run.title == folder else f"{run.title} ({folder})"


def _unequal(runs: Sequence[RunRecord]) -> list[str]:
    """What differs between the conditions under which the runs' scores were taken."""
    found = [each for each in map(conditions, runs) if each]
    keys = dict.fromkeys(key for each in found for key in each)
    return [key for key in keys if any(each.get(key) != found[0].get(key) for each in found)]


def _score_rows(runs: Sequence[RunRecord]) -> list[Html]:
    found = [key_scores(run) for run in runs]
    rows = []
    for name in dict.fromkeys(name for each in found for name in each):
        values = [each.get(name) for each in found]
        known = [value for value in values if value is not None]
        sign = direction(name) if len(set(known)) > 1 else 0
        best = max(known, key=lambda value: sign * value) if sign else None
        cells = [cell(v, class_="best" if v is not None and v == best else None) for v in values]
        rows.append(tag("tr", tag("th", name), *cells))
    return rows


def _image_time_rows(runs: Sequence[RunRecord]) -> list[Html]:
    found = [{task.name: seconds_per_image(task) for task in run.tasks.values()} for run in runs]
    rows = []
    for name in dict.fromkeys(
        n for each in found for n, value in each.items() if value is not None
    ):
        seconds = [each.get(name) for each in found]
        cells = [cell("-" if value is None else 1000 * value, class_="number") for value in seconds]
        rows.append(tag("tr", tag("th", f"{name}, ms an image"), *cells))
    return rows


def _time_rows(runs: Sequence[RunRecord]) -> list[Html]:
    found = [{task.name: task.seconds for task in run.tasks.values()} for run in runs]
    rows = []
    for name in dict.fromkeys(name for each in found for name in each):
        times = [duration(each[name]) if name in each else "-" for each in found]
        cells = [cell(text, class_="number") for text in times]
        rows.append(tag("tr", tag("th", name), *cells))
    totals = [cell(duration(run.seconds), class_="number") for run in runs]
    return [*rows, tag("tr", tag("th", "in all"), *totals)]


def _sample_row(runs: Sequence[RunRecord]) -> list[Html]:
    samples = [sample_picture(run) for run in runs]
    if not any(samples):
        return []
    cells = [tag("td", picture(path, path.stem, _SAMPLE_PX) if path else "-") for path in samples]
    return [tag("tr", tag("th", "samples"), *cells)]
