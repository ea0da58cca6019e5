"""Where the time of a generation goes: the parts' methods, timed while they are called by others.

The methods of the objects that a generator uses are replaced by ones that put a mark before and
after; results stay what they are, and nothing waits for a GPU. A method that another timed one
calls counts as that one's.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch

import sandbox

from ..clock import Clock
from ..replacing import replaced

REST = "rest"
"""What no part's method took: guidance, the loop, and what a generator does by itself."""
_NETWORK = ("begin", "step", "guided_step", "forward")
_TOKENIZER = {
    "render": "decoder",
    "decode": "decoder",
    "paint": "painting",
    "embed": "painting",
    "canvas": "painting",
    "context": "context",
    "contexts": "context",
}
_SAMPLER = {"draw": "sampling", "soften": "sampling"}


def seams(run: sandbox.Run) -> tuple[list[tuple[Any, Mapping[str, str]]], dict[str, str]]:
    """Objects with the part that each of their methods is, and why other parts are left out."""
    generator, absent = run.generator, {}
    network, sampler = generator.network, getattr(generator, "sampler", None)
    name = "transformer" if isinstance(network, sandbox.Backbone) else "network"
    found: list[tuple[Any, Mapping[str, str]]] = [(network, dict.fromkeys(_NETWORK, name))]
    if isinstance(sampler, sandbox.Sampler):
        found.append((sampler, _SAMPLER))
    else:
        absent["generation: sampling"] = "the generator has no sampler"
    if run.settings("tokenizer"):
        found.append((run.tokenizer, _TOKENIZER))
    else:
        absent["generation: decoder, painting, context"] = "the recipe names no tokenizer"
    return found, absent


@dataclass(frozen=True)
class _Span:
    """Once that a method ran."""

    part: str
    began: Any
    ended: Any
    replayed: bool
    """Whether it belongs to a CUDA graph, whose every replay it is of."""


class Split:
    """Times the methods of `seams` within `watching`."""

    def __init__(self, clock: Clock, found: list[tuple[Any, Mapping[str, str]]]) -> None:
        self.clock, self.found = clock, found
        self._spans: list[_Span] = []
        self._inside = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        self._spans = []
        with ExitStack() as stack:
            for owner, parts in self.found:
                for name, part in parts.items():
                    if method := getattr(owner, name, None):
                        stack.enter_context(replaced(owner, name, self._timed(part, method)))
            yield

    def forget(self) -> None:
        """What has been timed so far, but for what a replay would time anew."""
        self._spans = [span for span in self._spans if span.replayed]

    def seconds(self) -> dict[str, float]:
        """Seconds by part; the clock must have settled."""
        found: dict[str, float] = {}
        for _, parts in self.found:
            found |= dict.fromkeys(parts.values(), 0.0)
        for span in self._spans:
            found[span.part] += self.clock.seconds(span.began, span.ended)
        return found

    def _timed(self, part: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(*words: Any, **named: Any) -> Any:
            if self._inside:
                return method(*words, **named)
            self._inside = True
            recorded = self.clock.on_gpu and torch.cuda.is_current_stream_capturing()
            began = self.clock.mark()
            try:
                return method(*words, **named)
            finally:
                self._spans.append(_Span(part, began, self.clock.mark(), recorded))
                self._inside = False

        return call


def splits(split: Split, call: Callable[[], Any], repeats: int) -> list[dict[str, float]]:
    """Seconds by part of so many calls, each with `whole` and the rest.

    Of what is recorded as a CUDA graph a recording with marks in it is replayed. One call before
    the first sets up what is set up, and records.
    """
    found = []
    with sandbox.recorded_apart(), split.watching():
        call()
        for _ in range(repeats):
            split.forget()
            (whole,) = split.clock.time(call, 1)
            parts = split.seconds()
            rest = max(0.0, whole - sum(parts.values()))
            found.append({"whole": whole, **parts, REST: rest})
    return found
