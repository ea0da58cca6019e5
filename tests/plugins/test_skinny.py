"""The Triton products with few tokens give what the modules they stand for give.

Where there is no GPU, Triton's interpreter checks the arithmetic on narrow blocks.
"""

import copy
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from processes import python
from torch import nn
from torch.nn import functional as F

import sandbox
from sandbox import Mask
from sandbox_plugins.attention import CachedAttention
from sandbox_plugins.attention.plain import SdpaAttention
from sandbox_plugins.var import copies, few
from sandbox_plugins.var.blocks import Block
from sandbox_plugins.var.fused import of_few
from sandbox_plugins.var.pieces import Layer

HALF = [torch.bfloat16, torch.float16]
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Relative, of a token: about two steps between numbers of the type."""


def assert_close(found, exact, dtype):
    assert found.dtype == dtype and found.shape == exact.shape and found.isfinite().all()
    gap = (found.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert gap.max() < CLOSE[dtype], f"{gap.max():.2e}"


def operands(dtype, b, n, d, device):
    """What a block has: a residual stream off its centre, and six modulations, side by side."""
    rng = torch.Generator(device).manual_seed(0)

    def made(*shape):
        return torch.randn(*shape, generator=rng, device=device)

    sizes, centre = torch.logspace(-1, 2, b * n, device=device), 3 if dtype in HALF else 0.1
    x = (made(b, n, d) * sizes.view(b, n, 1) + centre).to(dtype)
    return made, x, made(b, 1, 6, d).to(dtype).unbind(2)


def assert_linear(skinny, dtype, b, n, d, num_out, gelu, device="cpu"):
    made, x, _ = operands(dtype, b, n, d, device)
    weight, bias = (made(num_out, d) / d**0.5).to(dtype), made(num_out).to(dtype)
    exact = F.linear(x.double(), weight.double(), bias.double())
    exact = F.gelu(exact, approximate="tanh") if gelu else exact
    found = skinny.linear(x, weight, bias, gelu)
    assert_close(found, exact, dtype)
    assert torch.equal(found, skinny.linear(x, weight, bias, gelu))


def assert_gated(skinny, dtype, b, n, heads, e, d, device="cpu"):
    made, x, six = operands(dtype, b, n, d, device)
    weight, bias = (made(d, heads * e) / e**0.5).to(dtype), made(d).to(dtype)
    for order in ((b, heads, n, e), (b, n, heads, e)):  # as attention may leave it
        y = made(*order).to(dtype)
        y = y if order[1] == heads and order[2] == n else y.transpose(1, 2)
        side_by_side = y.transpose(1, 2).reshape(b, n, heads * e)
        product = F.linear(side_by_side.double(), weight.double(), bias.double())
        for _ in range(2):  # what was counted is counted from zero again
            found = skinny.gated_linear(y, weight, bias, six[0], x)
            assert_close(found, x.double() + six[0].double() * product, dtype)
    assert not skinny._arrived(y.device).any()


def block_of(width, heads, mlp_width, dtype, device="cpu"):
    torch.manual_seed(0)
    settings = {"shared_adaln": False, "qk_norm": True, "dropout": 0.0}
    backend = SdpaAttention(SdpaAttention.Params())
    block = Block(width, heads, mlp_width=mlp_width, backend=backend, **settings)
    for bias in (block.attn.q_bias, block.attn.v_bias):
        nn.init.normal_(bias)
    return copies.cast_block(block.to(device).eval(), dtype).requires_grad_(False)


def stepped(block, dtype, batch, kernels=None, device="cpu"):
    """Its output of a step of one token and one of three, as they follow one another.

    The plain one, or that by the modules `kernel` and `skinny`.
    """
    rng, width = torch.Generator(device).manual_seed(0), block.norm.normalized_shape[0]
    heads, found = block.attn.num_heads, []
    modulation = torch.randn(batch, 1, 6, width, generator=rng, device=device).to(dtype)
    past = torch.zeros(2, batch, heads, 4, width // heads, dtype=dtype, device=device)
    bias = block.attn.bias().to(dtype)
    with torch.inference_mode(), torch.autocast(device, dtype, enabled=dtype != torch.float32):
        for span in (slice(0, 1), slice(1, 4)):
            shape = batch, span.stop - span.start, width
            x = torch.randn(shape, generator=rng, device=device).to(dtype)
            if kernels is None:
                found.append(block.forward(x, modulation, Mask(), (past, span, bias)))
            else:
                found.append(of_few(Layer(block, modulation, bias), x, past, span, *kernels))
    return torch.cat(found, 1)


INTERPRETED = """
import sys

import pytest
import torch
from test_skinny import *

assert "sandbox_plugins.var.skinny" not in sys.modules  # nor, by it, triton
from sandbox_plugins.var import kernel, skinny

for dtype in (torch.float32, torch.float16):  # the interpreter has no products in bfloat16
    for b, n in ((2, 1), (3, 6), (1, 32)):
        assert_linear(skinny, dtype, b, n, 256, 128, gelu=b == 2)
        assert_gated(skinny, dtype, b, n, 4, 32, 128)
    assert skinny.plan(2, 1536, 128, whole=False).splits == 3
    assert_gated(skinny, dtype, 2, 1, 1, 1536, 128)
    assert_gated(skinny, dtype, 2, 10, 12, 128, 128)
assert_linear(skinny, torch.float16, 1, 31, 128, 384, gelu=True)

x, up, bias = torch.zeros(2, 3, 128), torch.zeros(256, 128), torch.zeros(256)
shift = x[:, :1]
for args in [(x, up[:200], bias[:200]), (x, up, bias[:128]), (x.repeat(1, 6, 1), up, bias),
             (x, up, bias.half()), (x[..., :64], up, bias), (x[:, :0], up, bias)]:
    with pytest.raises(ValueError, match="no product of"):
        skinny.linear(*args)
square, seen = up[:128], x.view(2, 1, 3, 128)
for args in [(x[:, None], up, bias, shift, x), (seen, square, bias[:128], shift[:1], x),
             (seen, square, bias[:128], shift, x[:, :2]), (seen, square.T, bias[:128], shift, x)]:
    with pytest.raises(ValueError, match="no product of"):
        skinny.gated_linear(*args)
spoilt = x.clone()
spoilt[1, 1] = torch.nan
bad = skinny.linear(spoilt, up, bias, True).isnan()
assert bad[1, 1].all() and bad.sum() == 256

for dtype in (torch.float32, torch.float16):
    block = block_of(128, 2, 640, dtype)
    plain = stepped(block, dtype, 2).double()
    assert_close(stepped(block, dtype, 2, (kernel, skinny)), plain, dtype)
print("agreed")
"""


def test_interpreted_they_are_the_products_of_a_block():
    pytest.importorskip("triton", reason="triton is not there on this platform")
    assert python(INTERPRETED, TRITON_INTERPRET="1") == "agreed\n"


def test_a_plan_divides_what_it_cuts_and_fills_a_processor():
    pytest.importorskip("triton", reason="triton is not there on this platform")
    from sandbox_plugins.var import skinny

    for tokens in (1, 16, 17, few.LIMIT):
        for d in range(128, 4097, 128):
            for num_in, num_out, whole in [(d, 3 * d, True), (d, d, False), (4 * d, d, False)]:
                cut = skinny.plan(tokens, num_in, num_out, whole=whole)
                assert cut.splits == 1 or not whole
                assert cut.rows >= tokens and num_out % cut.channels == 0
                assert num_in % (cut.splits * few.CHUNK) == 0
                read = cut.channels + cut.rows
                assert 2 * read * few.CHUNK * skinny.STAGES <= 114 * 1024


def test_few_tokens_of_16_bits_in_even_widths_have_them(monkeypatch):
    asked = []
    monkeypatch.setattr(few, "_skinny", lambda *kind: asked.append(kind) or "skinny")
    block = SimpleNamespace(
        training=False,
        attn=SimpleNamespace(num_heads=2),
        ffn=SimpleNamespace(fc1=SimpleNamespace(weight=torch.zeros(256, 128).bfloat16())),
    )

    def found(shape=(2, 13, 128), dtype=torch.bfloat16, **changes):
        b, n, width = shape
        modulation = torch.zeros(b, 1, 6, width, dtype=dtype)
        return few.products_for(SimpleNamespace(**{**vars(block), **changes}), b * n, modulation)

    assert found() == "skinny"
    assert asked == [(torch.device("cpu"), torch.bfloat16, 32, 2, 128, 256)]
    assert found((32, 1, 128)) and found((1, 1, 128))
    assert found((33, 1, 128)) is None and found((2, 13, 64)) is None
    assert found((2, 13, 1408)) is None
    assert found(dtype=torch.float32) is None and found(dtype=torch.float16) is None
    assert found(training=True) is None
    narrow = SimpleNamespace(fc1=SimpleNamespace(weight=torch.zeros(200, 128).bfloat16()))
    assert found(ffn=narrow) is None


KIND = torch.device("cpu"), torch.bfloat16, 16, 2, 128, 256


def test_kernels_that_fail_their_trial_are_told_of_and_done_without():
    pytest.importorskip("triton", reason="triton is not there on this platform")
    with pytest.warns(UserWarning, match="without their Triton kernels, so slower"):
        assert few._skinny.__wrapped__(*KIND) is None


def test_without_triton_torch_does_it(monkeypatch):
    import sandbox_plugins.var as package

    monkeypatch.delattr(package, "skinny", raising=False)
    monkeypatch.setitem(sys.modules, "sandbox_plugins.var.skinny", None)
    assert few._skinny.__wrapped__(*KIND) is None


def the_kernels(dtype, tokens, heads, width):
    device = torch.zeros(1, device="cuda").device
    skinny = few._skinny(device, dtype, few.padded(tokens), heads, width, 4 * width)
    assert skinny is not None
    return skinny


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("width", [1024, 1152, 1280])
@pytest.mark.parametrize(("b", "n"), [(1, 1), (2, 1), (17, 1), (2, 13), (1, 30), (32, 1), (4, 8)])
def test_on_a_gpu_they_are_the_products_of_a_block(dtype, width, b, n):
    skinny, heads = the_kernels(dtype, b * n, width // 64, width), width // 64
    assert_linear(skinny, dtype, b, n, width, 3 * width, False, "cuda")
    assert_linear(skinny, dtype, b, n, width, 4 * width, True, "cuda")
    assert_gated(skinny, dtype, b, n, heads, 64, width, "cuda")
    assert_gated(skinny, dtype, b, n, 1, 4 * width, width, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("width", [128, 1024, 1152])
@pytest.mark.parametrize("batch", [1, 2, 10])
def test_on_a_gpu_a_block_of_few_tokens_is_the_plain_one(width, batch):
    from sandbox_plugins.var import kernel

    heads = width // 64
    skinny = the_kernels(torch.bfloat16, 3 * batch, heads, width)
    block = block_of(width, heads, 4 * width, torch.bfloat16, "cuda")
    plain = stepped(block, torch.bfloat16, batch, device="cuda").double()
    found = stepped(block, torch.bfloat16, batch, (kernel, skinny), "cuda")
    assert_close(found, plain, torch.bfloat16)


@pytest.mark.gpu
def test_a_recording_gives_what_it_was_recorded_of_again_and_again():
    skinny = the_kernels(torch.bfloat16, 8, 16, 1024)
    made, x, six = operands(torch.bfloat16, 2, 4, 1024, "cuda")
    y, weight = made(2, 1, 4, 4096).bfloat16(), made(1024, 4096).bfloat16()
    assert skinny.plan(8, 4096, 1024, whole=False).splits > 1
    bias, graph = weight[:, 0].contiguous(), torch.cuda.CUDAGraph()
    plain = skinny.gated_linear(y, weight, bias, six[0], x)
    with torch.cuda.graph(graph):
        found = skinny.gated_linear(y, weight, bias, six[0], x)
    for _ in range(200):
        found.zero_()
        graph.replay()
        assert torch.equal(found, plain)


def test_each_stream_counts_for_itself_and_what_is_recorded_alone_is_not_kept(monkeypatch):
    pytest.importorskip("triton", reason="triton is not there on this platform")
    from sandbox_plugins.var import skinny

    monkeypatch.setattr(skinny, "_counts", {})

    def arrived(stream, recorded=False):
        monkeypatch.setattr(skinny, "_stream", lambda device: (stream, recorded))
        return skinny._arrived(torch.device("cpu"))

    first, other = arrived(1), arrived(2)
    assert arrived(1) is first and arrived(2) is other and other is not first
    assert not first.any() and not other.any()
    assert arrived(2, recorded=True) is other
    recorded = arrived(3, recorded=True)  # zeros only while what was recorded is replayed
    assert arrived(3, recorded=True) is not recorded
    assert arrived(3) is not recorded and arrived(3) is arrived(3)


@pytest.mark.gpu
def test_two_streams_at_a_time_draw_what_each_draws_alone():
    skinny = the_kernels(torch.bfloat16, 8, 16, 1024)
    made, x, six = operands(torch.bfloat16, 2, 4, 1024, "cuda")
    weight = made(1024, 4096).bfloat16()
    bias, ys = weight[:, 0].contiguous(), [made(2, 1, 4, 4096).bfloat16() for _ in range(2)]
    assert skinny.plan(8, 4096, 1024, whole=False).splits > 1
    compute = [lambda inputs, rng, y=y: skinny.gated_linear(y, weight, bias, six[0], x) for y in ys]
    plain, rng = [each(None, None) for each in compute], torch.Generator("cuda")
    streams, recordings = [torch.cuda.Stream() for _ in ys], [sandbox.Recordings() for _ in ys]
    zero, found = torch.zeros(1, device="cuda"), [[], []]
    again = [
        lambda each=each, kept=kept: kept.run(each, zero, rng, key=0, at_once=True)
        for each, kept in zip(compute, recordings, strict=True)
    ]
    for draw in ([partial(each, None, None) for each in compute], again):
        for index in range(2):  # built and recorded by themselves
            draw[index]()
        torch.cuda.synchronize()
        for _ in range(100):
            for index, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    found[index].append(draw[index]())
        torch.cuda.synchronize()
    for index, expected in enumerate(plain):
        assert all(torch.equal(each, expected) for each in found[index])


@pytest.mark.gpu
@pytest.mark.parametrize("width", [1024, 1152])
@pytest.mark.parametrize(("batch", "n"), [(1, 1), (2, 4), (2, 9), (2, 16)])
def test_kernels_that_overlap_give_bit_for_bit_what_they_give_one_by_one(width, batch, n):
    from sandbox_plugins.var import kernel

    if not sandbox.overlapping(torch.device("cuda"))["OVERLAPS"]:
        pytest.skip("kernels of this GPU, or of this Triton, do not overlap")
    heads, span = width // 64, slice(3, 3 + n)
    skinny = the_kernels(torch.bfloat16, batch * n, heads, width)
    rng = torch.Generator("cuda").manual_seed(0)
    made = lambda *shape: torch.randn(*shape, generator=rng, device="cuda").bfloat16()  # noqa: E731
    block = block_of(width, heads, 4 * width, torch.bfloat16, "cuda")
    block.attn.backend = CachedAttention(CachedAttention.Params())
    blocks = [copy.deepcopy(block) for _ in range(4)]
    for parameter in (p for each in blocks for p in each.parameters() if p.ndim == 2):
        parameter.normal_(std=width**-0.5, generator=rng)  # other weights, so other places to read
    layers = [Layer(each, made(batch, 1, 6, width), each.attn.bias().bfloat16()) for each in blocks]
    x = made(batch, n, width)

    def chain(caches):
        y = x.clone()  # no kernel comes before the first one of ours
        for layer, past in [*zip(layers, caches, strict=True)] * 3:
            y = F.layer_norm(of_few(layer, y, past, span, kernel, skinny), (width,))
        for layer, past in [*zip(layers, caches, strict=True)] * 2:  # none but ours
            y = of_few(layer, y, past, span, kernel, skinny)
        return y

    graph, caches = torch.cuda.CUDAGraph(), [made(2, batch, heads, 64, 64) for _ in layers]
    apart = [past.clone() for past in caches]
    with torch.inference_mode():
        with sandbox.one_by_one():
            chain(apart)
        chain(caches)  # builds all that is recorded
        with torch.cuda.graph(graph):
            found = chain(caches)
        for _ in range(50):
            x.normal_(generator=rng)
            with sandbox.one_by_one():
                expected = chain(apart)
            graph.replay()
            assert expected.isfinite().all() and torch.equal(found, expected)
            for one, other in zip(caches, apart, strict=True):
                assert torch.equal(one, other)


@pytest.mark.gpu
def test_one_build_is_for_all_steps_of_a_plan():
    skinny = the_kernels(torch.bfloat16, 16, 2, 128)
    kernels = skinny.kernels.linear, skinny.kernels.gated_linear
    built = lambda: [sum(len(each[0]) for each in k.device_caches.values()) for k in kernels]  # noqa: E731
    before = built()
    for b, n in [(1, 1), (2, 1), (2, 4), (1, 16), (16, 1)]:
        assert_linear(skinny, torch.bfloat16, b, n, 128, 512, True, "cuda")
        assert_gated(skinny, torch.bfloat16, b, n, 2, 64, 128, "cuda")
    assert built() == before
