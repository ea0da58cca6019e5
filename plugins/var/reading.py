"""From contexts to tokens that know their places, as one Triton kernel.

The one idea to hold: a context has few numbers, so the product is short; what is added after it is
added where it is made.

Imported only for contexts on a GPU: triton takes its time, and is not there on every platform.
"""

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

import sandbox

TOKENS, CHANNELS = 16, 128
"""Of a tile."""
WIDEST = 128
"""Numbers of a context, at most."""


def read(
    contexts: Float[Tensor, "b n c"],
    weight: Float[Tensor, "d c"],
    bias: Float[Tensor, " d"],
    places: Float[Tensor, "1 n d"],
) -> Float[Tensor, "b n d"]:
    """The linear layer of contexts, which are rounded to its type before, and `places` added."""
    (b, n, c), d = contexts.shape, len(weight)
    contexts, places = contexts.contiguous(), places.contiguous()
    out = places.new_empty(b, n, d)
    with torch.cuda.device_of(contexts):
        _read[(triton.cdiv(b * n, TOKENS), triton.cdiv(d, CHANNELS))](
            contexts,
            weight.contiguous(),
            bias,
            places,
            out,
            b * n,
            n,
            c,
            d,
            max(16, triton.next_power_of_2(c)),
            TOKENS,
            CHANNELS,
            **sandbox.overlapping(contexts.device),
            num_warps=4,
        )
    return out


@triton.jit(do_not_specialize=["tokens", "n"])  # one build for all steps
def _read(
    contexts,
    weight,
    bias,
    places,
    out,
    tokens,
    n,
    C: tl.constexpr,  # noqa: N803
    D: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    TOKENS: tl.constexpr,  # noqa: N803
    CHANNELS: tl.constexpr,  # noqa: N803
    OVERLAPS: tl.constexpr,  # noqa: N803
):
    """Some channels of some tokens."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None]
    own = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    number = tl.arange(0, WIDTH)
    known, there = number < C, (token < tokens) & (own < D)
    x = tl.load(contexts + token * C + number[None, :], (token < tokens) & known[None, :], 0.0)
    w = tl.load(weight + own * C + number[:, None], (own < D) & known[:, None], 0.0)
    place = tl.load(places + token % n * D + own, there, 0.0).to(tl.float32)
    added = tl.load(bias + own, own < D, 0.0).to(tl.float32)
    total = tl.dot(x.to(w.dtype), w, input_precision="ieee") + added + place
    tl.store(out + token.to(tl.int64) * D + own, total.to(out.dtype.element_ty), there)
