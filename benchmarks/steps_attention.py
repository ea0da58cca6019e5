"""How the kernels for a mask of steps should be tiled: each alone, beside cuDNN under the mask.

    python benchmarks/steps_attention.py --forward 128,64,8,3 64,64,4,3 --keys 64,64,4,3,168

A tiling is queries, keys, warps, loads under way and, if it is limited, registers of a thread. By
default it is a layer of VAR-d16 in training: 96 images, 16 heads of 64 channels, 680 tokens. Prints
of the forward pass, of the queries' gradients and of those of keys and values the microseconds, the
median of `--repeats`, and the TFLOP/s of the scores that are seen (of two, three and four products;
of cuDNN's backward pass five, as it computes weights once); or why there are none.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import cache, partial
from itertools import accumulate

import torch
from timing import milliseconds

from sandbox import Mask
from sandbox_plugins.attention import CudnnAttention

FORWARD = ["128,64,8,3", "128,64,4,3", "64,64,4,3", "128,128,8,2", "128,32,4,3", "64,128,4,2"]
QUERIES = ["128,64,8,3,128", "64,64,4,3", "64,64,4,2,128", "64,32,4,3", "128,32,8,3", "64,128,4,2"]
KEYS = ["64,64,4,3,168", "64,64,4,3", "32,64,4,3", "32,64,4,3,128", "64,128,8,3", "32,128,8,3,128"]
PUBLISHED = [side**2 for side in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--forward", nargs="*", default=FORWARD)
    parser.add_argument("--queries", nargs="*", default=QUERIES)
    parser.add_argument("--keys", nargs="*", default=KEYS)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--step-lens", type=int, nargs="+", default=PUBLISHED)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    if torch.device(options.device).type != "cuda":
        print("these kernels need a GPU: --device cuda")
        return
    from sandbox_plugins.attention import steps_gradients, steps_kernel

    b, heads, e, lens = options.batch, options.heads, options.head_dim, tuple(options.step_lens)
    shape, scale = (b, sum(lens), heads, e), 0.125
    q, k, v, pull = (
        torch.randn(shape, device=options.device, dtype=getattr(torch, options.dtype))
        .transpose(1, 2)
        .requires_grad_(i < 3)
        for i in range(4)
    )
    seen = sum(length * end for length, end in zip(lens, accumulate(lens), strict=True))
    product = 2 * b * heads * e * seen
    device = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    print(f"{b} x {heads} heads of {e}, {sum(lens)} tokens, {options.dtype}, {device}")
    print(f"{seen / sum(lens) ** 2:.0%} of the scores are seen")
    print()

    def told(what: str, tiling: str, products: int, call: Callable[[], object]) -> float:
        """A row of the table, and its milliseconds."""
        try:
            ms = statistics.median(milliseconds(call, options))
            found = f"{1e3 * ms:.0f} | {products * product / ms / 1e9:.0f}"
        except Exception as error:  # out of shared memory, most of all
            ms, found = float("inf"), f"{' '.join(f'{error}'.split())[:60]} | -"
        print(f"| {what} | {tiling} | {found} |", flush=True)
        return ms

    print("| what | tiling | microseconds | TFLOP/s |")
    print("|---|---|---|---|")
    cudnn = CudnnAttention(CudnnAttention.Params())
    forward = partial(cudnn.compute, q, k, v, Mask(lens), scale)
    whole, again = cache(forward), {"retain_graph": True}
    told("cudnn, forward", "", 2, forward)
    told("cudnn, backward", "", 5, lambda: torch.autograd.grad(whole(), (q, k, v), pull, **again))
    best = []
    with torch.no_grad():
        ends, starts = steps_kernel.bounds(lens, q.device)
        tiles = steps_kernel.tiles(e, q.dtype)
        out, sums = steps_kernel.look(q, k, v, ends, scale, tiles.forward)
        row = pull, q, k, v, out, sums, ends, scale
        _, deltas = steps_gradients.pull_queries(*row, tiles.queries)
        column = pull, q, k, v, sums, deltas, starts, scale
        for what, tilings, products, kernel, call in [
            ("forward", options.forward, 2, steps_kernel.look, (q, k, v, ends, scale)),
            ("queries", options.queries, 3, steps_gradients.pull_queries, row),
            ("keys", options.keys, 4, steps_gradients.pull_keys, column),
        ]:
            times = []
            for tiling in tilings:
                tile = steps_kernel.Tile(*map(int, tiling.split(",")))
                times.append(told(what, tiling, products, partial(kernel, *call, tile)))
            best.append(min(times, default=float("nan")))
    print()
    print(f"the best of each together: {1e3 * sum(best):.0f} microseconds")


if __name__ == "__main__":
    main()
