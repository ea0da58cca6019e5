"""A project in a folder and the command line run in it, as a user would, in this process."""

from collections.abc import Mapping
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from textwrap import dedent

from sandbox.cli import main


@dataclass(frozen=True)
class Outcome:
    """What a command left behind: 0 is done, 1 failed while running, 2 the user's mistake."""

    status: int
    out: str
    err: str


@dataclass(frozen=True)
class Project:
    """A folder in which `sandbox` can be called."""

    folder: Path

    def sandbox(self, *words: str) -> Outcome:
        """`project.sandbox("run", "recipe.yaml")`: run a command in the project's folder."""
        out, err = StringIO(), StringIO()
        with chdir(self.folder), redirect_stdout(out), redirect_stderr(err):
            try:
                status = main(words)
            except SystemExit as stop:  # the parser's way to say that words are wrong
                status = int(stop.code or 0)
        return Outcome(status, out.getvalue(), err.getvalue())


def sandbox_project(folder: Path, files: Mapping[str, str]) -> Project:
    """Write `files` (relative path to text, which is dedented) below `folder`."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text))
    return Project(folder)
