"""How time and memory of predicting one image grow with its resolution, next-scale and raster.

    python benchmarks/growth.py --device cuda --resolutions 128 256 512 1024 --out runs/growth

The same transformer at equal width (random weights) predicts the tokens of an image of n x n cells:
next-scale in a few growing maps; raster one token a step, with a cache of keys and values; and
raster without one, where each step computes all tokens before it anew. No guidance, no sampling, no
decoder. Theory (arXiv 2404.02905, appendix D) counts attention alone: n^4 for next-scale, n^6 for
raster without a cache. Linear layers are two powers less, and lead until a token sees about six
times as many tokens as the model is wide; so the share of either in the FLOPs stands beside every
time. Keeps `growth.json`, row by row, and `growth.png`, and prints a table and the exponents:
slopes of a straight line through log(value) over log(n), and of its last piece. With `--resume`
what stands in `growth.json` of the same network on such a device is not measured again.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from sandbox import Layout, Mask, Part, Tokens, device_name, write_json
from sandbox_plugins.attention import SdpaAttention
from sandbox_plugins.schedules import Geometric
from sandbox_plugins.tasks.clock import Clock, attempt, forget_peak, peak_bytes
from sandbox_plugins.var.model import VAR

CELL_PX, CODE_DIM, VOCAB_SIZE, NUM_CLASSES = 16, 32, 4096, 1000
THEORY = {
    "next-scale": {"attention": 4, "linear": 2},
    "raster": {"attention": 4, "linear": 2},
    "raster, no cache": {"attention": 6, "linear": 4},
}
"""Powers of n by way of prediction, for large n."""
ENOUGH_SEC = 10.0


@dataclass(frozen=True)
class Work:
    """What one image takes: how often a token goes through the blocks, and how many it looks at."""

    steps: int
    tokens: int
    pairs: int

    def flops(self, width: int, depth: int) -> dict[str, int]:
        """Of matrix products in the blocks, whose MLPs are four times as wide."""
        linear = 24 * width**2 * depth * self.tokens
        return {"linear": linear, "attention": 4 * width * depth * self.pairs}


def work_of(way: str, layout: Layout) -> Work:
    """Counted over the spans of a layout."""
    length, steps = layout.seq_len, len(layout.steps)
    if way == "raster, no cache":
        tokens = length * (length + 1) // 2
        return Work(steps, tokens, tokens * (2 * length + 1) // 3)
    pairs = sum((span.stop - span.start) * span.stop for span in layout.spans)
    return Work(steps, length, pairs)


def layout_of(way: str, cells: int) -> Layout:
    """A pyramid whose sides grow by 16^(1/9) from map to map, as ten maps of 256 px do; or rows."""
    if way != "next-scale":
        return Layout.raster(cells, cells)
    num_scales = min(cells, round(1 + 9 * math.log(cells, 16)))
    return Geometric(Geometric.Params(height=cells, width=cells, num_scales=num_scales)).layout()


def network_of(layout: Layout, width: int, depth: int, device: torch.device) -> VAR:
    """Random weights, 64 channels a head where the width allows."""
    attention = Part("sdpa", SdpaAttention, SdpaAttention.Params())
    params = VAR.Params(depth=depth, width=width, attention=attention)
    tokens = Tokens(layout, VOCAB_SIZE, CODE_DIM, NUM_CLASSES)
    torch.manual_seed(0)
    return VAR(params, tokens).to(device).eval()


def stepwise(network: VAR, contexts: Tensor, labels: Tensor) -> None:
    """All steps, with a cache."""
    state = network.begin(labels)
    for step, span in enumerate(network.tokens.layout.spans):
        network.step(state, contexts[:, span], step)


def anew(network: VAR, contexts: Tensor, labels: Tensor) -> Tensor:
    """The logits of the last of these tokens, from all of them (`b l c`) and no cache."""
    cond, count = network.class_emb(labels), contexts.shape[1]
    x = torch.cat([network.read(cond), network.read(cond, contexts[:, 1:])], dim=1)
    x = x + network.places()[:, :count]
    modulations, _ = network.modulations(cond, network.blocks)
    for block, modulation in zip(network.blocks, modulations, strict=True):
        x = block.forward(x, modulation, Mask((1,) * count))
    return network.logits(x[:, -1:], cond)


def lengths(seq_len: int, count: int) -> list[int]:
    """The middles of `count` equal pieces of 1 to `seq_len`."""
    count = min(count, seq_len)
    return [int((piece + 0.5) * seq_len / count) + 1 for piece in range(count)]


def measured(way: str, cells: int, options: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """Seconds and bytes of one batch of images."""
    layout = layout_of(way, cells)
    network = network_of(layout, options.width, options.depth, clock.device)
    shape, rng = (options.batch_size, layout.seq_len, CODE_DIM), torch.Generator().manual_seed(0)
    contexts = torch.randn(shape, generator=rng).to(clock.device)
    labels = torch.zeros(options.batch_size, dtype=torch.long, device=clock.device)

    def timed(call: Callable[[], object]) -> float:
        (first,) = clock.time(call, 1)
        return median(clock.time(call, options.repeats if first < ENOUGH_SEC else 1))

    def seconds() -> float:
        if way != "raster, no cache":
            return timed(lambda: stepwise(network, contexts, labels))
        counts = lengths(layout.seq_len, options.uncached_steps)
        pieces = [timed(lambda n=n: anew(network, contexts[:, :n], labels)) for n in counts]
        return sum(pieces) * layout.seq_len / len(counts)

    anew(network, contexts[:, :1], labels)  # libraries take their own memory at the first call
    known = forget_peak(clock.device)
    before = peak_bytes(clock.device) if known else 0
    found: dict[str, Any] = {"seconds": seconds(), "repeats": options.repeats}
    if way == "raster, no cache":
        found["timed_steps"] = min(options.uncached_steps, layout.seq_len)
    return found | ({"bytes": max(0, peak_bytes(clock.device) - before)} if known else {})


def rows(
    options: argparse.Namespace, known: Sequence[dict[str, Any]] = ()
) -> Iterator[dict[str, Any]]:
    """One a way and resolution: a known one, or measured."""
    clock = Clock(torch.device(options.device))
    kept = {(row["way"], row["resolution_px"]): row for row in known if "seconds" in row}
    half = options.precision != "float32"
    for way in options.ways:
        for resolution in options.resolutions:
            if (way, resolution) in kept:
                yield kept[way, resolution]
                continue
            cells = resolution // CELL_PX
            work = work_of(way, layout_of(way, cells))
            flops = work.flops(options.width, options.depth)
            total = sum(flops.values()) * options.batch_size
            precise = (
                torch.autocast(options.device, getattr(torch, options.precision))
                if half
                else nullcontext()
            )
            with torch.no_grad(), precise:
                found = attempt(lambda w=way, c=cells: measured(w, c, options, clock))
            yield {
                "way": way,
                "resolution_px": resolution,
                "steps": work.steps,
                "tokens": work.tokens,
                "flops": total,
                "attention_share": flops["attention"] / sum(flops.values()),
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                **found,
            }


def exponents(found: Sequence[dict[str, Any]], value: str) -> dict[str, float] | None:
    """Slopes over log(n): of a line through all points, and through the last two."""
    points = [(row["resolution_px"], row[value]) for row in found if row.get(value)]
    if len(points) < 2:
        return None
    side, measure = np.log(np.array(points, dtype=float)).T
    last = (measure[-1] - measure[-2]) / (side[-1] - side[-2])
    return {"fitted": float(np.polyfit(side, measure, 1)[0]), "last": float(last)}


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By way of prediction: the exponents beside the theory, and what leads at the largest."""
    ways: dict[str, Any] = {}
    for way in dict.fromkeys(row["way"] for row in found):
        mine = [row for row in found if row["way"] == way]
        share = mine[-1]["attention_share"]
        ways[way] = {
            "theory": THEORY[way],
            **{value: exponents(mine, value) for value in ("seconds", "bytes", "flops")},
            "leading_flops": "attention" if share > 0.5 else "linear layers",
            "attention_share": share,
        }
    return ways


def table(found: Sequence[dict[str, Any]], ways: dict[str, Any]) -> str:
    """Markdown: what was measured, then the exponents."""
    lines = ["| way | px | steps | tokens | ms | MiB | TFLOP/s | attention, % of FLOPs |"]
    lines.append("|---" * 8 + "|")
    for row in found:
        speed = memory = rate = row["status"]
        if "seconds" in row:
            speed, rate = (
                f"{1e3 * row['seconds']:.4g}",
                f"{row['flops'] / row['seconds'] / 1e12:.3g}",
            )
            memory = f"{row['bytes'] / 2**20:.4g}" if "bytes" in row else "unknown"
        lines.append(
            f"| {row['way']} | {row['resolution_px']} | {row['steps']} | {row['tokens']:,} "
            f"| {speed} | {memory} | {rate} | {100 * row['attention_share']:.1f} |"
        )
    lines += ["", "| way | time | memory | FLOPs | theory: attention, linear | leading FLOPs |"]
    lines.append("|---" * 6 + "|")
    for way, known in ways.items():
        slopes = " | ".join(
            f"{slope['fitted']:.2f} (last {slope['last']:.2f})" if slope else "unknown"
            for slope in (known["seconds"], known["bytes"], known["flops"])
        )
        theory = f"{known['theory']['attention']}, {known['theory']['linear']}"
        lines.append(f"| {way} | {slopes} | {theory} | {known['leading_flops']} |")
    return "\n".join(lines)


def plot(path: Path, found: Sequence[dict[str, Any]], ways: dict[str, Any], title: str) -> None:
    """Time and memory over the resolution, both logarithmic."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, value, factor, label in zip(
        figure.subplots(1, 2),
        ("seconds", "bytes"),
        (1e3, 2**-20),
        ("ms a batch", "MiB beyond the weights"),
        strict=True,
    ):
        for way, known in ways.items():
            points = [
                (row["resolution_px"], factor * row[value])
                for row in found
                if row["way"] == way and row.get(value)
            ]
            if points:
                slope = known[value]
                name = way + (f", n^{slope['fitted']:.1f}" if slope else "")
                axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
        axes.set(xscale="log", yscale="log", xlabel="resolution, px", ylabel=label)
        ticks = sorted({row["resolution_px"] for row in found})
        axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
        axes.minorticks_off()
        axes.grid(color="#eeeeee")
        if axes.lines:  # a CPU may tell of no memory that grew
            axes.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, format="png", dpi=120)


def known_rows(path: Path, kept: dict[str, Any]) -> list[dict[str, Any]]:
    """What was measured before; raises SystemExit where that was something else."""
    if not path.exists():
        return []
    before = json.loads(path.read_text())
    settings = "width", "depth", "batch_size", "precision"
    same = all(before["settings"][key] == kept["settings"][key] for key in settings)
    if not same or any(before[key] != kept[key] for key in ("device", "torch")):
        raise SystemExit(
            f"{path}: of another network, device or torch: choose another --out, or leave out "
            "--resume to measure all anew"
        )
    return list(before["rows"])


def merged(
    found: Sequence[dict[str, Any]], known: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """All rows, one a way and resolution, in that order."""
    every = {(row["way"], row["resolution_px"]): row for row in [*known, *found]}
    ways = list(THEORY)
    return [every[at] for at in sorted(every, key=lambda at: (ways.index(at[0]), at[1]))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--precision", default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--resolutions", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--ways", nargs="+", choices=list(THEORY), default=list(THEORY))
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--uncached-steps", type=int, default=64, help="steps timed of raster without a cache"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/growth"))
    parser.add_argument("--resume", action="store_true", help="keep what --out already has")
    options = parser.parse_args()
    options.resolutions = sorted(options.resolutions)
    device, found = device_name(torch.device(options.device)), list[dict[str, Any]]()
    kept = {
        "complete": False,
        "device": device,
        "torch": torch.__version__,
        "settings": {
            key: value for key, value in vars(options).items() if key not in ("out", "resume")
        },
        "how_counted": "median seconds of a batch, the network alone; bytes at the peak beyond "
        "what was held before (weights and contexts); raster without a cache: some of its steps, "
        "evenly spaced, times how many there are; FLOPs of the blocks' matrix products",
        "rows": found,
    }
    known = known_rows(options.out / "growth.json", kept) if options.resume else []
    options.out.mkdir(parents=True, exist_ok=True)
    for row in rows(options, known):
        found.append(row)
        kept["rows"] = merged(found, known)
        said = row.get("seconds", row["status"])
        print(f"{row['way']}, {row['resolution_px']} px: {said}", flush=True)
        kept["complete"] = len(found) == len(options.ways) * len(options.resolutions)
        kept["ways"] = ways = summary(kept["rows"])
        write_json(options.out / "growth.json", kept)
    title = f"width {options.width}, depth {options.depth}, batch {options.batch_size}, {device}"
    plot(options.out / "growth.png", kept["rows"], ways, title)
    print(f"\n{table(kept['rows'], ways)}\n\n{options.out}/growth.json, growth.png")


if __name__ == "__main__":
    main()
