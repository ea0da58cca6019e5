"""The built-in observers: progress on a terminal, events as JSON lines, TensorBoard, a report.

An observer only watches: a run's numbers are the same whichever of them a recipe names.
"""

from typing import Any

import sandbox

from .console import Console
from .jsonl import JsonLines
from .report import Report, write_report
from .tensorboard import TensorBoard

__all__ = ["Console", "JsonLines", "Report", "TensorBoard", "write_report"]


@sandbox.hookimpl
def sandbox_register(register: Any) -> None:
    register(sandbox.Observer, "console", Console)
    register(sandbox.Observer, "jsonl", JsonLines)
    register(sandbox.Observer, "tensorboard", TensorBoard)
    register(sandbox.Observer, "report", Report)
