"""What attention costs by backend, for the calls of training and of sampling VAR.

    python benchmarks/attention.py --device cuda --json attention.json
    python benchmarks/attention.py --device cuda --graph --calls sampling

A row is a kind of call: in training one layer's whole sequence under the published mask; in
sampling one layer's ten steps, every query looking at all keys so far (with guidance, so twice as
many rows as images). Prints one table of milliseconds, the median of `--repeats`, on a GPU between
CUDA events; then why a backend is missing, and what `auto` picked. `--shrink` divides all batches.
`--graph` replays what is forward only as a CUDA graph, so that launches do not count.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path

import torch
from timing import graphed, milliseconds
from torch import Tensor

import sandbox
from sandbox import AttentionBackend, AttentionRequest, Mask
from sandbox.plugins import load_plugins
from sandbox.provenance import choices_told_to

PUBLISHED = tuple(side**2 for side in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
"""256 pixels: 680 tokens."""
SMALL = tuple(side**2 for side in (1, 2, 3, 4, 6, 8))
"""130 tokens."""
FORWARD, BOTH = "forward", "forward and backward"


@dataclass(frozen=True)
class Call:
    """The attention of one layer."""

    name: str
    lens: tuple[int, ...]
    heads: int
    batch: int
    passes: str
    stepwise: bool = False
    e: int = 64

    def parts(self, shrink: int) -> Iterator[tuple[int, int, int, Mask]]:
        """Batch, queries, keys and mask of each of its calls."""
        batch = max(1, self.batch // shrink)
        if not self.stepwise:
            yield batch, sum(self.lens), sum(self.lens), Mask(self.lens)
        else:
            for n, p in zip(self.lens, accumulate(self.lens), strict=True):
                yield batch, n, p, Mask()


CALLS = [
    Call(f"{name}, {passes}", lens, heads, batch, passes)
    for name, lens, heads, batch in (
        ("training d16 256 px", PUBLISHED, 16, 96),
        ("training small", SMALL, 8, 512),
    )
    for passes in (FORWARD, BOTH)
] + [
    Call(f"sampling d{depth} 256 px, {images} images", PUBLISHED, depth, 2 * images, FORWARD, True)
    for depth in (16, 30)
    for images in (1, 8, 64)
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", nargs="+", help="default: bfloat16, on a CPU float32")
    parser.add_argument("--backends", nargs="+", help="default: all that are registered")
    parser.add_argument("--calls", default="", help="only those whose name has this in it")
    parser.add_argument("--shrink", type=int, help="default: 1, on a CPU 48")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--graph", action="store_true")
    parser.add_argument("--json", type=Path, help="where to keep all numbers")
    options = parser.parse_args()
    on_gpu = torch.device(options.device).type == "cuda"
    options.shrink = options.shrink or (1 if on_gpu else 48)
    backends = {
        e.name: e.cls(e.cls.Params())
        for e in load_plugins()
        if e.interface is AttentionBackend and e.name in (options.backends or [e.name])
    }
    threads = f"{torch.get_num_threads()} CPU threads"
    device = torch.cuda.get_device_name() if on_gpu else threads
    print(f"attention on {device}, torch {torch.__version__}, batches / {options.shrink}, ms")
    print()
    print("| call | batch | dtype | " + " | ".join(backends) + " |")
    print("|" + "---|" * (3 + len(backends)))
    rows, picks = [], dict[str, tuple[str, str]]()
    with choices_told_to(lambda what, case, chosen, why: picks.update({case: (chosen, why)})):
        for dtype in options.dtypes or ["bfloat16" if on_gpu else "float32"]:
            for call in CALLS:
                if options.calls in call.name:
                    rows.append(measure(call, getattr(torch, dtype), backends, options))
                    print(line(rows[-1]), flush=True)
    print()
    reasons = (f"{name}: {why}" for row in rows for name, why in row["missing"].items())
    print("\n".join(dict.fromkeys(reasons)))
    for case, (name, why) in picks.items():
        print(f"auto: {name} for {case} ({why})")
    if options.json:
        found = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": device,
            "torch": torch.__version__,
            "settings": vars(options) | {"json": str(options.json)},
            "rows": rows,
            "picks": picks,
        }
        sandbox.write_json(options.json, found)


def line(row: dict) -> str:
    """One line of the table."""
    cells = [f"{statistics.median(ms):.3g}" if ms else "-" for ms in row["milliseconds"].values()]
    return f"| {row['name']} | {row['batch']} | {row['dtype']} | {' | '.join(cells)} |"


def measure(
    call: Call,
    dtype: torch.dtype,
    backends: dict[str, AttentionBackend],
    options: argparse.Namespace,
) -> dict:
    """Milliseconds of each backend, none where it is missing."""
    needs_grad = call.passes == BOTH
    found: dict[str, list[float]] = {}
    missing: dict[str, str] = {}
    for name, backend in backends.items():
        found[name] = []
        if reason := refusal(call, dtype, backend, options):
            missing[name] = reason
            continue
        try:
            run = attending(call, dtype, backend, options)
            if options.graph and not needs_grad:
                run = graphed(run)
            found[name] = milliseconds(run, options)
        except RuntimeError as error:  # no memory, say
            missing[name] = " ".join(f"{type(error).__name__}: {error}".split())[:120]
        if torch.device(options.device).type == "cuda":
            torch.cuda.empty_cache()
    return {
        **asdict(call),
        "batch": next(call.parts(options.shrink))[0],
        "dtype": str(dtype).removeprefix("torch."),
        "milliseconds": found,
        "missing": missing,
    }


def refusal(
    call: Call, dtype: torch.dtype, backend: AttentionBackend, options: argparse.Namespace
) -> str | None:
    """The first of its calls' refusals."""
    needs_grad = call.passes == BOTH
    device = str(torch.empty(0, device=options.device).device)
    requests = (
        AttentionRequest(device, dtype, call.e, n, p, mask, needs_grad)
        for _, n, p, mask in call.parts(options.shrink)
    )
    return next(filter(None, map(backend.refusal, requests)), None)


def attending(
    call: Call, dtype: torch.dtype, backend: AttentionBackend, options: argparse.Namespace
) -> Callable[[], None]:
    """All its calls; tensors stand in memory as the network has them."""
    rng = torch.Generator(options.device).manual_seed(0)
    needs_grad = call.passes == BOTH
    parts: list[tuple[list[Tensor], Mask]] = []
    for batch, n, p, mask in call.parts(options.shrink):
        q, k, v = (
            torch.randn(batch, m, call.heads, call.e, generator=rng, device=options.device)
            .to(dtype)
            .transpose(1, 2)
            .requires_grad_(needs_grad)
            for m in (n, p, p)
        )
        parts.append(([q, k, v], mask))

    def run() -> None:
        for tensors, mask in parts:
            out = backend.attend(*tensors, mask, 0.125)
            if needs_grad:
                torch.autograd.grad(out, tensors, out.detach())

    return run


if __name__ == "__main__":
    main()
