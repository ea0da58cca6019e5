"""Measure the recipe's generator and tokenizer on this machine; keeps `bench.json`.

What measures is a generator that stops after every row, so all that is known by then is kept. Only
when every row has its seconds does the profiler see one: it slows what its process does later.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from time import perf_counter
from typing import Any, Literal, get_args

import torch
from pydantic import Field, field_validator

import sandbox

from ..clock import Clock, Precision, attempt
from ..encoding import coding_precisions
from .ceilings import copy, matrix_product
from .comparing import add_ratios, add_shares
from .counting import HOW, Work, work_of
from .plot import plot
from .rows import Setting, decoding, encoding, generation, keep_trace, training
from .split import Split, seams
from .tables import brief, ceilings_table, split_table, table

JSON, PICTURE, TRACE = "bench.json", "bench.png", "trace.json"
Row = dict[str, Any]
Measured = Callable[[Setting], Row]
Rows = Iterator[tuple[str, Setting, Measured]]
"""Each row's part, how it is to be measured, and what measures it."""
Name = Literal["generation", "encoding", "decoding", "training"]
PARTS: tuple[Name, ...] = get_args(Name)


class Bench:
    """Speed and memory of generating, encoding, decoding and a training step, on this machine.

    Nothing is trained: the training steps' weights are put back. Weights may be random, and no
    images of a data set are read. `bench.json` holds every number, `bench.png` the curves. It is
    written after every row, so a bench that is stopped keeps the rows that it has made.
    """

    class Params(sandbox.Params):
        parts: tuple[Name, ...] = PARTS
        """What is measured."""
        batch_sizes: tuple[int, ...] | None = None
        """Images at a time; when absent 1, 8 and 64, on a CPU 1 and 8."""
        precision: tuple[Literal["auto", "float32", "bfloat16", "float16"], ...] = ("auto",)
        """Of the matrix work. `auto`: float32, on a GPU bfloat16 and float16 too."""
        fast: tuple[sandbox.Switch, ...] | None = None
        """How generation is measured: the generator's setting `fast`, one after the other. When
        absent off and on, on a CPU off alone."""
        repeats: int = Field(5, ge=1)
        """Timed calls of everything; the median and the quartiles are told."""
        warmup: int = Field(2, ge=1)
        """Calls before, which are not timed."""
        profile: bool = False
        """Also keep one generation as `trace.json`, which chrome://tracing and Perfetto show, and
        in `bench.json` the kernels of one call of every row: made again, compiled and recorded
        anew, when all have been timed."""
        compile: sandbox.Switch = "auto"
        """Whether encoding, decoding and training are measured compiled too, at the largest batch
        size: minutes, on a GPU, of compiling. `auto`: on a GPU."""

        @field_validator("batch_sizes")
        @classmethod
        def _positive(cls, sizes: tuple[int, ...] | None) -> tuple[int, ...] | None:
            if sizes is None:
                return None
            if min(sizes, default=0) < 1:
                raise ValueError("expected sizes from 1 up, as in 1,8,64")
            return tuple(dict.fromkeys(sizes))

        @field_validator("parts", "precision", "fast")
        @classmethod
        def _some(cls, asked: tuple[str, ...] | None) -> tuple[str, ...] | None:
            if asked is not None and not asked:
                raise ValueError("expected at least one")
            return asked

    def __init__(self, params: Params) -> None:
        self.params = params

    def plan(self, run: sandbox.Run) -> Mapping[str, str]:
        if not run.settings("generator") and not run.settings("tokenizer"):
            raise sandbox.SandboxError(
                f"{run.label}: the recipe has neither a generator nor a tokenizer to measure"
            )
        rows = {"device": sandbox.device_name(run.device)}
        for role in ("tokenizer", "generator"):
            if settings := run.settings(role):
                known = "weights from a file" if run.has_weights(role) else "random weights"
                rows[role] = f"{settings['name']}, {known}"
        sizes, precisions = self._sizes(run.device), self._precisions(run.device)
        if run.settings("generator"):
            rows["classes"] = str(run.num_classes)
        return rows | {
            "batch sizes": ", ".join(map(str, sizes)),
            "precisions": ", ".join(precisions),
            "repeats": f"{self.params.repeats}, after {self.params.warmup} to warm up",
        }

    def run(self, run: sandbox.Run) -> dict[str, Any]:
        found: dict[str, Any] = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": sandbox.device_name(run.device),
            "environment": _environment(run),
            "num_classes": run.num_classes if run.settings("generator") else None,
            "parts": {role: run.settings(role) for role in ("tokenizer", "generator")},
            "weights": {role: run.has_weights(role) for role in ("tokenizer", "generator")},
            "settings": self.params.model_dump(mode="json"),
            "how_counted": HOW,
        }
        for _ in self._measure(run, found):
            found["environment"] = _environment(run)  # with what was chosen meanwhile
            sandbox.write_json(run.folder / JSON, found)
        title = f"{run.settings('generator').get('name', 'no generator')} on {found['device']}"
        drawn = plot(run.folder / PICTURE, found["generation"], title)
        files = [JSON] + [PICTURE] * drawn + [TRACE] * (run.folder / TRACE).exists()
        return {
            "ceilings": ceilings_table(found["ceilings"]["matmul"], found["ceilings"]["copy"]),
            **{part: table(found[part]) for part in PARTS if found[part]},
            "split_%": split_table(found["generation"]),
            "training_split_%": split_table(found["training"]),
            **({"left_out": found["left_out"]} if found["left_out"] else {}),
            "files": ", ".join(str(run.folder / name) for name in files),
        }

    def _measure(self, run: sandbox.Run, found: dict[str, Any]) -> Iterator[None]:
        """Fill `found`, stopping after every row, and where it is complete."""
        clock, absent, start = Clock(run.device), dict[str, str](), perf_counter()
        found |= {"complete": False, **{part: [] for part in PARTS}, "left_out": absent}
        found["ceilings"] = {
            "matmul": [
                matrix_product(clock, p)
                for p in dict.fromkeys(("float32", *self._precisions(run.device)))
            ],
            "copy": copy(clock),
        }
        ended = perf_counter() - start
        rows = list[tuple[Row, Setting, Measured]]()
        for part, setting, measured in self._every_row(run, clock, absent):
            row = measured(setting)
            rows.append((row, setting, measured))
            found[part].append(row)
            row["began_seconds"], ended = ended, perf_counter() - start
            row["ended_seconds"] = ended
            run.say(brief(part, row))
            add_ratios(found[part])
            add_shares({part: [row]}, found["ceilings"], run.device)
            yield
        if self.params.profile:
            for row, setting, measured in rows:
                if "median_seconds" in row:
                    seen = measured(replace(setting, watched=True))
                    told = {key: seen[key] for key in seen if key.startswith("kernels")}
                    row |= told or {"kernels": seen.get("reason", seen["status"])}
                    yield
            self._trace(run, absent)
        if any(row.get("peak_bytes", 0) is None for part in PARTS for row in found[part]):
            absent["peak memory"] = "this system does not tell a process's peak anew"
        found["complete"] = True
        yield

    def _every_row(self, run: sandbox.Run, clock: Clock, absent: dict[str, str]) -> Rows:
        asked = self.params.parts
        absent |= dict.fromkeys((part for part in PARTS if part not in asked), "not asked for")
        if run.settings("generator"):
            if "generation" in asked:
                yield from self._generation(run, clock, absent)
        else:
            absent |= dict.fromkeys(("generation", "training"), "the recipe names no generator")
        if run.settings("tokenizer"):
            for part, measure in {"encoding": encoding, "decoding": decoding}.items():
                if part not in asked:
                    continue
                precisions = self._coding_precisions(run.device)
                yield from self._rows(run, part, measure, clock, precisions=precisions)
        else:
            absent |= dict.fromkeys(("encoding", "decoding"), "the recipe names no tokenizer")
        if run.settings("generator") and "training" in asked:
            yield from self._training(run, clock, absent)

    def _generation(self, run: sandbox.Run, clock: Clock, absent: dict[str, str]) -> Rows:
        parts, missing = seams(run)
        absent |= missing
        split, works = Split(clock, parts), dict[Precision, Work | None]()

        def work(precision: Precision) -> Work | None:
            """Counted when something was timed: counting draws, so all were warm."""
            if precision not in works:
                counted = attempt(lambda: {"work": work_of(run, precision)})
                works[precision] = made = counted.get("work")
                if made is None:
                    why = counted.get("reason", counted["status"])
                    absent[f"generation: FLOPs in {precision}"] = why
                elif made.weight_bytes is None:
                    absent["generation: bytes"] = (
                        "the network is no Backbone that makes a tokenizer's steps one by one"
                    )
            return works[precision]

        def row(run: sandbox.Run, clock: Clock, setting: Setting) -> dict[str, Any]:
            return generation(run, clock, setting, split, partial(work, setting.precision))

        yield from self._rows(run, "generation", row, clock)

    def _training(self, run: sandbox.Run, clock: Clock, absent: dict[str, str]) -> Rows:
        network = run.generator.network
        if not any(parameter.requires_grad for parameter in network.parameters()):
            absent["training"] = "the generator has nothing to train"
            return
        if "float16" in self._precisions(run.device):
            absent["training: float16"] = "it would need scaled losses, which no task here has"
        yield from self._rows(run, "training", training, clock, but="float16")

    def _rows(
        self,
        run: sandbox.Run,
        part: str,
        measure: Callable[[sandbox.Run, Clock, Setting], dict[str, Any]],
        clock: Clock,
        but: str = "",
        precisions: tuple[str, ...] = (),
    ) -> Rows:
        asked = [p for p in precisions or self._precisions(run.device) if p != but]
        sizes = self._sizes(run.device)
        modes = self._modes(run) if part == "generation" else (None,)
        settings = [
            self._setting(p, size, fast=fast) for p in asked for size in sizes for fast in modes
        ]
        if part != "generation" and self._compiles(run.device):
            settings += [self._setting(p, max(sizes), compiled=True) for p in asked]
        for setting in settings:
            yield part, setting, lambda how: measure(run, clock, how)

    def _trace(self, run: sandbox.Run, absent: dict[str, str]) -> None:
        """Keep one generation as a Chrome trace, a fast one if there is one."""
        if not run.settings("generator"):
            absent["profile"] = "the recipe names no generator"
        elif "generation" not in self.params.parts:
            absent["profile: trace.json"] = "it is of a generation, which was not asked for"
        else:
            where = self._precisions(run.device)[0], min(self._sizes(run.device))
            modes = self._modes(run)
            fast = next((mode for mode in modes if mode not in (None, "off")), modes[0])
            setting = self._setting(*where, fast=fast)
            kept = attempt(lambda: keep_trace(run, setting, run.folder / TRACE))
            if kept["status"] != "ok":
                absent["profile"] = kept.get("reason", kept["status"])

    def _setting(self, precision: str, size: int, **how: Any) -> Setting:
        return Setting(precision, size, self.params.repeats, self.params.warmup, **how)

    def _modes(self, run: sandbox.Run) -> tuple[sandbox.Switch | None, ...]:
        if not hasattr(run.generator, "fast"):
            return (None,)
        every: tuple[sandbox.Switch, ...] = ("off", "on") if run.device.type == "cuda" else ("off",)
        return every if self.params.fast is None else tuple(dict.fromkeys(self.params.fast))

    def _sizes(self, device: torch.device) -> tuple[int, ...]:
        return self.params.batch_sizes or ((1, 8, 64) if device.type == "cuda" else (1, 8))

    def _precisions(self, device: torch.device) -> tuple[Precision, ...]:
        every: tuple[Precision, ...] = get_args(Precision)
        auto = every if device.type == "cuda" else every[:1]
        asked = self.params.precision
        return tuple(p for p in every if p in asked or ("auto" in asked and p in auto))

    def _coding_precisions(self, device: torch.device) -> tuple[str, ...]:
        """Of encoder and decoder: those asked for and, with float32, TF32 where there is one."""
        found = []
        for precision in self._precisions(device):
            found.append(precision)
            if precision == "float32" and "tf32" in coding_precisions(device):
                found.append("tf32")
        return tuple(found)

    def _compiles(self, device: torch.device) -> bool:
        if self.params.compile == "auto":
            return device.type == "cuda"
        return self.params.compile == "on"


def _environment(run: sandbox.Run) -> Mapping[str, Any]:
    """What the run keeps of versions, machine and command."""
    path = run.folder / "environment.json"
    return json.loads(path.read_text()) if path.exists() else {}
