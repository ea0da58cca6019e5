"""The one exception a user should ever see: a message, never a traceback."""

from collections.abc import Iterable
from difflib import get_close_matches


class SandboxError(Exception):
    """The user's mistake: says what is wrong, where, and how to fix it. Exit status 2."""


class RunError(Exception):
    """A run that failed while running (NaN loss, full disk). One line, exit status 1."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"`, or `""` when nothing is close."""
    close = get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
