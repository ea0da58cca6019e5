"""What a block's products cost with few tokens: the library's against kernels of their own.

    python benchmarks/skinny.py --widths 1024 --tokens 2 8 18 32 50

A row is a width and the tokens of two images in all. Prints microseconds a block, the median of
`--repeats` replays of one CUDA graph over `--blocks` blocks, whose weights are too many to stay in
a GPU's cache, as in a generation. First all that a block does beside attention: `library`, its
products and a kernel between two of them; `own`, kernels for few tokens; `own, apart`, the same,
but no kernel starts before the last one's end. Then each product by itself: as `F.linear`, and by
its kernel with all that this does besides. Kernels of their own are for 32 tokens at most.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator

import torch
from timing import graphed, milliseconds
from torch import Tensor
from torch.nn import functional as F

import sandbox
from sandbox_plugins.attention.plain import SdpaAttention
from sandbox_plugins.var import few
from sandbox_plugins.var.blocks import Block
from sandbox_plugins.var.fused import linear_gelu

WHOLE = "library", "own", "own, apart"
PRODUCTS = "qkv", "proj", "fc1", "fc2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 1920])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2, 8, 18, 32, 50, 64, 72, 128])
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    if torch.device(options.device).type != "cuda":
        print("these kernels need a GPU: --device cuda")
        return
    print(f"bfloat16, {torch.cuda.get_device_name()}, torch {torch.__version__}, microseconds")
    print()
    named = [*WHOLE, *(f"{name}, {way}" for name in PRODUCTS for way in ("linear", "own"))]
    print("|", " | ".join(["width", "tokens", *named]), "|")
    print("|" + "---|" * (2 + len(named)))
    for width in options.widths:
        with torch.inference_mode():
            blocks = [block_of(width, options.device) for _ in range(options.blocks)]
            for tokens in options.tokens:
                times = []
                for number, call in enumerate(ways(blocks, width, tokens, options.device)):
                    if call and named[number].endswith("apart"):
                        with sandbox.one_by_one():
                            times.append(f"{microseconds(call, options):.1f}")
                    else:
                        times.append(f"{microseconds(call, options):.1f}" if call else "-")
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
    blocks: list[Block], width: int, tokens: int, device: str
) -> Iterator[Callable[[], object] | None]:
    """A row's calls, each of all blocks; None for what is left out."""
    from sandbox_plugins.var import gating, kernel, skinny

    b, n, heads = 2, tokens // 2, width // 64

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=device)

    x, modulation, past = made(b, n, width), made(b, 1, 6, width), made(2, b, heads, n, 64)
    seen, hidden = made(b, n, heads, 64).transpose(1, 2), made(b, n, 4 * width)
    gate1, gate2, scale1, scale2, shift1, shift2 = modulation.unbind(2)
    biases = [block.attn.bias().bfloat16() for block in blocks]

    def place(block: Block, made: Tensor) -> None:
        kernel.place(made, block.attn.log_scale(), past, 0)

    def library(block: Block, bias: Tensor) -> None:
        place(block, block.attn.product(x, bias))
        _, normed = gating.gated_norm(x, (block.attn.merge(seen), gate1), shift2, scale2)
        own = block.ffn
        branch = own.fc2(linear_gelu(normed, own.fc1.weight, own.fc1.bias))
        gating.gated_norm(x, (branch, gate2), shift1, scale1)

    def qkv(block: Block, bias: Tensor) -> Tensor:
        return skinny.linear(x, block.attn.mat_qkv.weight, bias)

    def proj(block: Block, _: Tensor) -> Tensor:
        own = block.attn.proj
        return skinny.gated_linear(seen, own.weight, own.bias, gate1, x)

    def fc1(block: Block, _: Tensor) -> Tensor:
        own = block.ffn.fc1
        return skinny.linear(x, own.weight, own.bias, gelu=True)

    def fc2(block: Block, _: Tensor) -> Tensor:
        own = block.ffn.fc2
        return skinny.gated_linear(hidden[:, None], own.weight, own.bias, gate2, x)

    def own(block: Block, bias: Tensor) -> None:
        gating.gated_norm(x, None, shift1, scale1)
        place(block, qkv(block, bias))
        proj(block, bias)
        gating.gated_norm(x, None, shift2, scale2)
        fc1(block, bias)
        fc2(block, bias)

    def over(call: Callable[[Block, Tensor], object]) -> Callable[[], object]:
        return lambda: [call(block, bias) for block, bias in zip(blocks, biases, strict=True)]

    side_by_side = seen.transpose(1, 2).flatten(2)
    able = tokens <= few.LIMIT
    yield over(library)
    yield from [over(own) if able else None] * 2
    yield over(lambda block, bias: F.linear(x, block.attn.mat_qkv.weight, bias))
    yield over(qkv) if able else None
    yield over(lambda block, _: block.attn.proj(side_by_side))
    yield over(proj) if able else None
    yield over(lambda block, _: block.ffn.fc1(x))
    yield over(fc1) if able else None
    yield over(lambda block, _: block.ffn.fc2(hidden))
    yield over(fc2) if able else None


if __name__ == "__main__":
    main()
