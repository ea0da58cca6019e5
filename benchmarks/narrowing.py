"""What top-k and top-p cost by sorting, by the search in torch, and as the sampler does it.

    python benchmarks/narrowing.py --device cuda --graph --rows 512 2048 8192

A row is one token's logits; the largest scale of 8 images has 2,048 of them. Prints a table of
milliseconds (the median of `--repeats`, on a GPU between CUDA events) and by how many ids of a row
the two differ at most: sums in float32, as sorting has them, may err about the last id kept.
The sampler has a kernel for it on a GPU, which also draws; elsewhere it searches. Drawing is of
logits narrowed before, but for `both`: there the sampler narrows and draws. `--graph` replays
narrowing as a CUDA graph, so that launches do not count; drawing never is one.
"""

import argparse
import statistics

import torch
from timing import graphed, milliseconds
from torch import Tensor

from sandbox_plugins.samplers import TopKTopP
from sandbox_plugins.samplers.likeliest import search


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 128, 512, 2048])
    parser.add_argument("--codes", type=int, default=4096)
    parser.add_argument("--top-k", type=int, nargs="+", default=[900, 0])
    parser.add_argument("--top-p", type=float, default=0.96)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--graph", action="store_true")
    options = parser.parse_args()
    if torch.device(options.device).type == "cuda":
        device = torch.cuda.get_device_name()
    else:
        device = f"{torch.get_num_threads()} CPU threads"
    how = ", narrowing as a CUDA graph" if options.graph else ""
    print(f"{options.codes} codes, top-p {options.top_p}, {device}, torch {torch.__version__}{how}")
    print()
    print(
        "| rows | top-k | sort, ms | search, ms | sampler, ms | times | differ"
        " | multinomial, ms | race, ms | both, ms |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for rows in options.rows:
        for top_k in options.top_k:
            print(row(rows, top_k, options), flush=True)


def row(rows: int, top_k: int, options: argparse.Namespace) -> str:
    """One line of the table."""
    rng = torch.Generator(options.device).manual_seed(0)
    logits = torch.randn(1, rows, options.codes, device=options.device, generator=rng) * 3
    part = TopKTopP(TopKTopP.Params(top_k=top_k, top_p=options.top_p))

    def by_sort() -> Tensor:
        return sorted_out(logits, top_k, options.top_p)

    def by_search() -> Tensor:
        return search(logits, top_k, options.top_p)

    def by_sampler() -> Tensor:
        return part._narrowed(logits)

    narrowed = by_sampler()
    assert torch.equal(narrowed, by_search())
    differ = int((by_sort().isinf() != narrowed.isinf()).sum(-1).max())

    def multinomial() -> Tensor:
        return torch.multinomial(narrowed.softmax(-1)[0], 1, replacement=True, generator=rng)

    def race() -> Tensor:
        noise = torch.empty_like(narrowed).exponential_(generator=rng)
        return (narrowed.softmax(-1) / noise).argmax(-1)

    def both() -> Tensor:
        return part.draw(logits, 0.5, rng)

    ways = [by_sort, by_search, by_sampler]
    calls = [*(graphed(way) if options.graph else way for way in ways), multinomial, race, both]
    times = [statistics.median(milliseconds(call, options)) for call in calls]
    narrowing, drawing = (" | ".join(f"{ms:.2f}" for ms in some) for some in (times[:3], times[3:]))
    gain = times[0] / times[2]
    return f"| {rows} | {top_k or 'off'} | {narrowing} | {gain:.1f} | {differ} | {drawing} |"


def sorted_out(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Narrowed as the published code does it (FoundationVision/VAR, `models/helpers.py`)."""
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1).values.amin(dim=-1, keepdim=True)
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ascending, order = logits.sort(dim=-1)
        cut = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        cut[..., -1] = False
        logits = logits.masked_fill(cut.scatter(-1, order, cut), -torch.inf)
    return logits


if __name__ == "__main__":
    main()
