"""What a block's products cost with few tokens: compiled halves against kernels of their own.

    python benchmarks/skinny.py --widths 1024 --tokens 2 8 18 32 50

A row is a width and the tokens of two images in all. Prints microseconds a block, the median of
`--repeats` replays of one CUDA graph over `--blocks` blocks, whose weights are too many to stay in
a GPU's cache, as in a generation. First all that a block does beside attention, in both ways; then
each product by itself, as `F.linear` and with all that its kernel does besides. Kernels of their
own are for 64 tokens at most. `--compile-for` seconds after the start no more rows are compiled.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from timing import graphed, milliseconds
from torch import Tensor
from torch.nn import functional as F

import sandbox
from sandbox_plugins.attention.plain import SdpaAttention
from sandbox_plugins.var import few
from sandbox_plugins.var.blocks import Block
from sandbox_plugins.var.pieces import Layer
from sandbox_plugins.var.pieces import compiled as pieces

PRODUCTS = "qkv", "proj", "fc1", "fc2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 1920])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2, 8, 18, 32, 50, 64, 72, 128])
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--compile-for", type=float, default=35)
    options = parser.parse_args()
    if torch.device(options.device).type != "cuda":
        print("these kernels need a GPU: --device cuda")
        return
    print(f"bfloat16, {torch.cuda.get_device_name()}, torch {torch.__version__}, microseconds")
    print()
    named = [f"{name}, {way}" for name in PRODUCTS for way in ("linear", "own")]
    print("|", " | ".join(["width", "tokens", "compiled", "own", *named]), "|")
    print("|" + "---|" * (4 + len(named)))
    started = time.perf_counter()
    for width in options.widths:
        with torch.inference_mode(), sandbox.compiling():
            blocks = [block_of(width, options.device) for _ in range(options.blocks)]
            for tokens in options.tokens:
                compiled = time.perf_counter() - started < options.compile_for
                calls = ways(blocks, width, tokens, compiled, options.device)
                times = [f"{microseconds(call, options):.1f}" if call else "-" for call in calls]
                print("|", " | ".join([str(width), str(tokens), *times]), "|", flush=True)


def block_of(width: int, device: str) -> Block:
    settings = {"shared_adaln": True, "qk_norm": True, "dropout": 0.0}
    backend = SdpaAttention(SdpaAttention.Params())
    with torch.device(device):
        block = Block(width, width // 64, mlp_width=4 * width, backend=backend, **settings)
    return block.eval().requires_grad_(False).to(torch.bfloat16)


def microseconds(call: Callable[[], object], options: argparse.Namespace) -> float:
    """Of one block."""
    times = milliseconds(graphed(call), options)
    return 1e3 * statistics.median(times) / options.blocks


def ways(
    blocks: list[Block], width: int, tokens: int, compiled: bool, device: str
) -> Iterator[Callable[[], object] | None]:
    """A row's calls, each of all blocks; None for what is left out."""
    from sandbox_plugins.var import kernel, skinny

    b, n, heads = 2, tokens // 2, width // 64

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=device)

    x, modulation, past = made(b, n, width), made(b, 1, 6, width), made(2, b, heads, n, 64)
    seen, hidden = made(b, n, heads, 64).transpose(1, 2), made(b, 1, n, 4 * width)
    gate1, gate2, scale1, scale2, shift1, shift2 = modulation.unbind(2)
    biases = [block.attn.bias().bfloat16() for block in blocks]
    layers = [Layer(block, modulation, bias) for block, bias in zip(blocks, biases, strict=True)]
    between = pieces(dynamic=False).between

    def halves() -> None:
        for layer, following in zip(layers, layers[1:] + layers[:1], strict=True):
            _, qkv = between(layer, following, x, seen, False)
            kernel.place(qkv, following.block.attn.log_scale(), past, 0)

    def qkv(block: Block, bias: Tensor) -> Tensor:
        return skinny.normed_linear(x, shift1, scale1, block.attn.mat_qkv.weight, bias)

    def proj(block: Block, bias: Tensor) -> Tensor:
        own = block.attn.proj
        return skinny.gated_linear(seen, own.weight, own.bias, gate1, x)

    def fc1(block: Block, bias: Tensor) -> Tensor:
        own = block.ffn.fc1
        return skinny.normed_linear(x, shift2, scale2, own.weight, own.bias, gelu=True)

    def fc2(block: Block, bias: Tensor) -> Tensor:
        own = block.ffn.fc2
        return skinny.gated_linear(hidden, own.weight, own.bias, gate2, x)

    def all_four(block: Block, bias: Tensor) -> None:
        kernel.place(qkv(block, bias), block.attn.log_scale(), past, 0)
        for product in (proj, fc1, fc2):
            product(block, bias)

    def over(call: Callable[[Block, Tensor], object]) -> Callable[[], object]:
        return lambda: [call(block, bias) for block, bias in zip(blocks, biases, strict=True)]

    able = tokens <= few.LIMIT
    yield halves if compiled else None
    yield over(all_four) if able else None
    side_by_side = seen.transpose(1, 2).flatten(2)
    yield over(lambda block, bias: F.linear(x, block.attn.mat_qkv.weight, bias))
    yield over(qkv) if able else None
    yield over(lambda block, _: block.attn.proj(side_by_side))
    yield over(proj) if able else None
    yield over(lambda block, _: block.ffn.fc1(x))
    yield over(fc1) if able else None
    yield over(lambda block, _: block.ffn.fc2(hidden[:, 0]))
    yield over(fc2) if able else None


if __name__ == "__main__":
    main()
