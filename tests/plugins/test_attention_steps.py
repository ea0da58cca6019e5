"""`steps` gives what the formula gives, and its gradients, and reads nothing beyond the tokens.

Where there is no GPU, Triton's interpreter checks the arithmetic on small shapes.
"""

import dataclasses
import sys

import pytest
import torch
from processes import python
from torch.utils.checkpoint import checkpoint

from sandbox import AttentionRequest, Mask
from sandbox_plugins.attention import MathAttention, SdpaAttention, StepsAttention, plain, steps
from sandbox_plugins.var.blocks import Block

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CLOSE = {torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Of the largest: in 16 bits about two steps, as weights are rounded before they are summed."""
PUBLISHED = tuple(side**2 for side in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
STRADDLING = 5, 40, 3, 50, 31
"""Steps that begin and end within tiles of 32 tokens, and one that begins and ends in one."""
REQUEST = AttentionRequest("cuda", torch.bfloat16, 64, 14, 14, Mask((1, 4, 9)), True)


def build(cls=StepsAttention):
    return cls(cls.Params())


def drawn(b, heads, lens, e, dtype, device="cpu", seed=0):
    """Queries, keys and values as parts of one product, with NaN before and after the tokens; and
    the gradient of what is seen, which lies heads beside channels."""
    rng = torch.Generator(device).manual_seed(seed)
    n = sum(lens)
    product = torch.randn(b, n + 6, 3, heads, e, generator=rng, device=device).to(dtype)
    product[:, :3] = product[:, -3:] = torch.nan
    pull = torch.randn(b, n, heads, e, generator=rng, device=device).to(dtype)
    return *product[:, 3:-3].permute(2, 0, 3, 1, 4), pull.transpose(1, 2)


def formula(q, k, v, pull, lens, scale):
    """What is seen and the gradients of queries, keys and values, in float64."""
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out = build(MathAttention).attend(*exact, Mask(tuple(lens)), scale)
    return [out.detach(), *torch.autograd.grad(out, exact, pull.double())]


def attended(q, k, v, pull, lens, scale):
    """The same by the operators, whatever the device."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = build().compute(*inputs, Mask(tuple(lens)), scale)
    return [out.detach(), *torch.autograd.grad(out, inputs, pull)]


def assert_close(*call):
    names = "out", "dq", "dk", "dv"
    for name, one, other in zip(names, attended(*call), formula(*call), strict=True):
        assert one.dtype == call[0].dtype and one.shape == other.shape
        assert one.transpose(1, 2).is_contiguous(), name
        off = (one.double() - other).abs().max() / other.abs().max().clamp_min(1e-30)
        assert off <= CLOSE[one.dtype], (name, tuple(one.shape), call[-2:], float(off))


def assert_sound(device, dtype):
    """What `torch.library` asks of operators: true shapes, nothing changed, gradients traceable."""
    q, k, v, pull = drawn(2, 2, (1, 4, 9), 16, dtype, device)
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(steps._attend, (*inputs, [1, 4, 9], 0.3))
    out, sums = steps._attend(q, k, v, [1, 4, 9], 0.3)
    torch.library.opcheck(steps._gradients, (pull, q, k, v, out, sums, [1, 4, 9], 0.3))


class Untried(StepsAttention):
    """On whatever device."""

    def limit(self, request):
        return None


def trained(backend, lens, device="cpu", compiler=None, again=False, dtype=None, width=64):
    """What a block gives, and all gradients; compiled in one piece, computed again or not."""
    torch.manual_seed(0)
    settings = {"mlp_width": 64, "shared_adaln": False, "qk_norm": True, "dropout": 0.0}
    block = Block(width, 2, backend=backend, **settings).to(device)
    x = torch.randn(2, sum(lens), width).to(device).requires_grad_()
    modulation = torch.randn(2, 1, 6, width).to(device)
    call = block
    if compiler:
        call = torch.compile(block.forward, backend=compiler, dynamic=False, fullgraph=True)
    with torch.autocast(torch.device(device).type, dtype, enabled=dtype is not None):
        if again:
            out = checkpoint(call, x, modulation, Mask(lens), use_reentrant=False)
        else:
            out = call(x, modulation, Mask(lens))
        loss = (out.float() ** 2).mean()
    loss.backward()
    torch._dynamo.reset()
    gradients = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": x.grad, **gradients}


def assert_trains(tolerance, backend, lens, device="cpu", compiler="aot_eager", **settings):
    expected = trained(build(SdpaAttention), lens, device, **settings)
    for how in [{}, {"again": True}, {"compiler": compiler}, {"compiler": compiler, "again": True}]:
        found = trained(backend, lens, device, **how, **settings)
        assert found.keys() == expected.keys()
        for name in found:
            off = (found[name] - expected[name]).float().norm() / expected[name].float().norm()
            assert off < tolerance, (name, how, float(off))


INTERPRETED = """
import sys

import torch
from test_attention_steps import (
    STRADDLING, Untried, assert_close, assert_sound, assert_trains, attended, drawn, formula
)

full, half = torch.float32, torch.float16  # interpreted, bits of bfloat16 are multiplied
assert "sandbox_plugins.attention.steps_kernel" not in sys.modules  # nor, by it, triton
for lens, e, dtype in [((1, 4, 9), 16, full), (STRADDLING, 32, full), ((7,), 64, full),
                       ((70,), 16, full), ((1,) * 35, 16, full), ((32, 32), 128, full),
                       ((1, 4, 9), 64, half), (STRADDLING, 16, half), ((60, 68, 1), 128, half),
                       ((3, 200, 130), 64, half), ((128, 128), 32, half)]:
    assert_close(*drawn(1, 2, lens, e, dtype), lens, 0.3)
lens = 5, 30, 4
q, k, v, pull = drawn(2, 2, lens, 32, full)
whole, channels = [x.contiguous() for x in (q, k, v, pull)], slice(None, None, 2)
for call in [whole,
             (q[:1].expand_as(q), k[:, :1].expand_as(k), v[:1, :1].expand_as(v), pull),
             (q[..., channels], k[..., channels], v[..., :16], pull[..., 16:]),
             (q, whole[1], v, pull[:1, :1, :1, :1].expand_as(pull))]:
    assert_close(*call, lens, 0.3)
for scale in (-0.2, 0.0):
    assert_close(q, k, v, pull, lens, scale)
large = 9 * q, 9 * k, v, pull, lens, 0.3  # powers that float32 has no numbers for
for one, other in zip(attended(*large), formula(*large)):
    torch.testing.assert_close(one.double(), other, rtol=0, atol=1e-3 * float(other.abs().max()))
assert_sound("cpu", full)
assert_trains(1e-5, Untried(Untried.Params()), lens)
print("agreed")
"""


def test_interpreted_it_gives_what_the_formula_gives_and_trains():
    pytest.importorskip("triton", reason="triton is not there on this platform")
    assert python(INTERPRETED, TRITON_INTERPRET="1") == "agreed\n"


def test_its_kernels_are_not_imported_before_they_are_needed():
    code = "import sys, sandbox_plugins.attention as a; print(hasattr(a, 'steps_kernel'))"
    assert python(code) == "False\n"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "cpu"}, "CUDA devices only, not on cpu"),
        ({"dtype": torch.float64}, "no kernels for steps of torch.float64"),
        ({"head_dim": 48}, "not 48"),
        ({"head_dim": 256}, "not 256"),
        ({"mask": Mask()}, "not: full"),
        ({"mask": Mask((14,))}, "not: full"),
        ({"mask": Mask((1,) * 14)}, "not: causal"),
        ({"mask": Mask(dense=torch.ones(14, 14, dtype=torch.bool))}, "not: dense"),
    ],
)
def test_it_says_what_it_cannot_honour(change, reason):
    assert reason in build().refusal(dataclasses.replace(REQUEST, **change))


KIND = "cpu", torch.float32, 32


def test_kernels_that_fail_their_trial_are_told_of_and_a_refusal():
    pytest.importorskip("triton", reason="triton is not there on this platform")
    with pytest.warns(UserWarning, match="without its Triton kernels, so slower"):
        assert "triton is not there, or cannot" in steps._untried.__wrapped__(*KIND)


def test_without_triton_it_refuses(monkeypatch):
    import sandbox_plugins.attention as package

    for name in ("steps_kernel", "steps_gradients", "steps_gradients_kernels"):
        monkeypatch.delattr(package, name, raising=False)
        monkeypatch.setitem(sys.modules, f"sandbox_plugins.attention.{name}", None)
    assert "triton is not there" in steps._untried.__wrapped__(*KIND)


def test_what_watches_all_operations_sees_sdpa():
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v, _ = drawn(1, 2, (1, 4), 16, torch.float32)
    with FlopCounterMode(display=False):
        out = build().compute(q, k, v, Mask((1, 4)), 1.0)
    assert torch.equal(out, build(SdpaAttention).compute(q, k, v, Mask((1, 4)), 1.0))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("e", plain.HEAD_DIMS)
def test_a_gpu_attends_with_heads_of_all_sizes(dtype, e):
    assert build().refusal(dataclasses.replace(REQUEST, dtype=dtype, head_dim=e)) is None
    for lens in [(1, 4, 9), STRADDLING, (1, 1, 127, 129), (64, 64, 128), (1, 300), (300, 1)]:
        assert_close(*drawn(2, 3, lens, e, dtype, "cuda"), lens, e**-0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("b", "scale"), [(1, 1.0), (5, -0.1), (24, 0.125)])
def test_a_gpu_attends_to_the_published_schedule(dtype, b, scale):
    assert_close(*drawn(b, 16, PUBLISHED, 64, dtype, "cuda"), PUBLISHED, scale)


@pytest.mark.gpu
def test_a_gpu_reads_tensors_however_they_lie_in_memory():
    lens = 5, 90, 60
    q, k, v, pull = drawn(4, 6, lens, 64, torch.bfloat16, "cuda")
    away = torch.empty(k.numel() + 1, dtype=k.dtype, device="cuda")[1:].view(k.shape).copy_(k)
    whole = [x.contiguous() for x in (q, k, v, pull)]
    for call in [
        whole,
        (q, away, v, pull),
        (q[:1].expand_as(q), k[:, :1].expand_as(k), v, pull[:1, :1, :1, :1].expand_as(pull)),
        (q[..., ::2], k[..., 1::2], v[..., 32:], pull[..., ::2]),
        (q[:1, :1], k[:1, :1], v[:1, :1], pull[:1, :1]),
    ]:
        assert_close(*call, lens, 0.2)


@pytest.mark.gpu
def test_a_gpu_attends_beyond_the_reach_of_32_bits():
    lens = 5, 90, 60
    product = torch.zeros(3, 400, 3, 16, 64 * 1024, dtype=torch.float16, device="cuda")
    few = product[2:, 245:, :, :, -64:].normal_()
    q, k, v = few.permute(2, 0, 3, 1, 4)
    assert_close(q, k, v, torch.randn_like(q), lens, 0.2)


@pytest.mark.gpu
def test_its_gradients_are_the_same_every_time():
    call = *drawn(8, 16, PUBLISHED, 64, torch.bfloat16, "cuda"), PUBLISHED, 0.125
    assert all(map(torch.equal, attended(*call), attended(*call)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gpu_has_sound_operators(dtype):
    assert_sound("cuda", dtype)


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # the compiler's own affairs
def test_compiled_blocks_on_a_gpu_train_as_plain_ones():
    """In one piece: nothing is compiled around it."""
    settings = {"dtype": torch.bfloat16, "width": 128}
    assert_trains(4 * 2**-8, build(), PUBLISHED, "cuda", "inductor", **settings)


@pytest.mark.gpu
def test_one_build_is_for_all_numbers_of_tokens_and_heads():
    from sandbox_plugins.attention import steps_gradients_kernels as pulling
    from sandbox_plugins.attention import steps_kernel

    def built(*sizes):
        for b, heads, lens in sizes:
            attended(*drawn(b, heads, lens, 64, torch.bfloat16, "cuda"), lens, 1.0)
        kernels = steps_kernel._look, pulling.pull_queries, pulling.pull_keys
        return [sum(len(each[0]) for each in k.device_caches.values()) for k in kernels]

    before = built((2, 16, (1, 4, 9)))
    assert built((1, 1, (3, 1)), (3, 5, PUBLISHED), (16, 2, (16, 16))) == before
