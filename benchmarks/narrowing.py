"""What top-k and top-p cost by sorting, and by the search that the sampler does.

    python benchmarks/narrowing.py --device cuda --graph --rows 512 2048 8192

A row is one token's logits; the largest scale of 8 images has 2,048 of them. Prints a table of
milliseconds (the median of `--repeats`, on a GPU between CUDA events) and by how many ids of a row
the two differ at most: sums in float32, as sorting has them, may err about the last id kept.
`--graph` replays narrowing as a CUDA graph, so that launches do not count; drawing never is one.
"""

import argparse
import statistics

import torch
from timing import graphed, milliseconds
from torch import Tensor

from sandbox_plugins.samplers import TopKTopP


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
    print("| rows | top-k | sort, ms | search, ms | times | differ | multinomial, ms | race, ms |")
    print("|---|---|---|---|---|---|---|---|")
    for rows in options.rows:
        for top_k in options.top_k:
            print(row(rows, top_k, options), flush=True)


def row(rows: int, top_k: int, options: argparse.Namespace) -> str:
    """One line of the table."""
    rng = torch.Generator(options.device).manual_seed(0)
    logits = torch.randn(1, rows, options.codes, device=options.device, generator=rng) * 3
    part = TopKTopP(TopKTopP.Params(top_k=top_k, top_p=options.top_p))
    everything = TopKTopP(TopKTopP.Params(top_k=0, top_p=1.0))

    def sort() -> Tensor:
        return sorted_out(logits, top_k, options.top_p)

    def search() -> Tensor:
        return part._narrowed(logits)

    narrowed = search()
    differ = int((sort().isinf() != narrowed.isinf()).sum(-1).max())

    def multinomial() -> Tensor:
        return torch.multinomial(narrowed.softmax(-1)[0], 1, replacement=True, generator=rng)

    def race() -> Tensor:
        return everything.draw(narrowed, 0.5, rng)

    pair = [graphed(call) if options.graph else call for call in (sort, search)]
    by_sort, by_search = (statistics.median(milliseconds(call, options)) for call in pair)
    by_multinomial, by_race = (
        statistics.median(milliseconds(call, options)) for call in (multinomial, race)
    )
    return (
        f"| {rows} | {top_k or 'off'} | {by_sort:.2f} | {by_search:.2f} | {by_sort / by_search:.1f}"
        f" | {differ} | {by_multinomial:.2f} | {by_race:.2f} |"
    )


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
