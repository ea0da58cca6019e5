"""One self-contained HTML page for a run: what it is, what came out, and how.

The page is written from the run folder alone, so it can be made again at any time, and a folder
that another program wrote in the same form can stand beside it.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sandbox

from .compare import compare
from .page import document
from .record import read_run
from .sections import (
    background,
    codebooks,
    curves,
    header,
    messages,
    other_results,
    pictures,
    scores,
    timings,
)


def write_report(folder: Path, beside: Sequence[Path] = ()) -> Path:
    """Write `report.html` into a run folder and return its path.

    Args:
        folder: the run folder; raises FileNotFoundError if there is none.
        beside: run folders to compare with; one that is missing becomes a note in the page.
    """
    run = read_run(folder)
    page = document(
        run.title,
        header(run),
        compare(run, beside),
        pictures(run),
        scores(run),
        codebooks(run),
        curves(run),
        timings(run),
        other_results(run),
        messages(run),
        background(run),
    )
    path = folder / "report.html"
    unfinished = folder / "report.html.part"  # whoever reloads the page never sees half of it
    unfinished.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
    os.replace(unfinished, path)
    return path


class Report:
    """Writes the report after every task and at the end, well or not."""

    class Params(sandbox.Params):
        beside: tuple[Path, ...] = ()
        """Other run folders whose scores, times and samples are set beside this run's."""

    def __init__(self, params: Params) -> None:
        self.params = params

    def write(self, folder: Path) -> Path:
        """Write the report of any run folder, running or over."""
        return write_report(folder, self.params.beside)

    @sandbox.hookimpl(trylast=True)  # after whoever keeps the log this reads
    def task_ended(self, run: Any, task: str, result: Mapping[str, Any], skipped: bool) -> None:
        if not skipped:
            self.write(run.folder)

    @sandbox.hookimpl(trylast=True)
    def run_ended(self, run: Any, error: BaseException | None) -> None:
        self.write(run.folder)
