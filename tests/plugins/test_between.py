"""What stands between products, by Triton kernels: sums, norms and all gradients are torch's.

Where there is no GPU, Triton's interpreter checks the arithmetic, and blocks that learn by it.
"""

import pytest
import torch
from processes import python
from test_var_model import awake, build
from test_var_training_kernel import backend, block_of, lost
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sandbox import Layout, Mask
from sandbox_plugins.var import between
from sandbox_plugins.var.blocks import LAYER_NORM_EPS, Block

EXACT = 1e-5
HALF = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""The largest relative error of rounding to the type."""
NAMES = "x", "product", "bias", "gate", "scale", "shift"


def assert_joined(kernels, dtype, b, n, d, x_dtype=None, device="cpu"):
    """With a branch, a norm and both: what is made, and what gradients, against float64."""
    rng = torch.Generator().manual_seed(b * n * d)

    def made(*shape, dtype=dtype):
        return torch.randn(*shape, generator=rng).to(device, dtype)

    x, towards = (made(b, n, d, dtype=x_dtype or dtype) + 0.5 for _ in range(2))
    product, of = made(b, n, d), made(b, n, d)
    gate, _, scale, _, shift, _ = made(b, 1, 6, d, dtype=x.dtype).unbind(2)
    given = dict(
        zip(NAMES, (x, product, made(d, dtype=torch.float32), gate, scale, shift), strict=True)
    )
    exact = {name: each.double().requires_grad_() for name, each in given.items()}
    close = max(HALF.get(each, EXACT) for each in (dtype, x.dtype))
    summed = exact["x"] + (exact["product"] + exact["bias"]) * exact["gate"]
    for gated, normed in ((True, False), (False, True), (True, True)):
        branch = tuple(given[name] for name in NAMES[1:4]) if gated else None
        norm = (scale, shift, dtype) if normed else None
        added, h, moments = kernels.join(x, branch, norm)
        names = NAMES[: 4 if gated else 1] + (NAMES[4:] if normed else ())
        wanted = summed if gated else exact["x"]
        outputs, slopes = [wanted], [towards.double()]
        if gated:
            assert added.dtype == x.dtype and lost(added, wanted) < close
        if normed:
            h_wanted = F.layer_norm(wanted, (d,), eps=LAYER_NORM_EPS)
            h_wanted = h_wanted * (1 + exact["scale"]) + exact["shift"]
            assert h.dtype == dtype and lost(h, h_wanted) < 2 * close
            outputs, slopes = [*outputs, h_wanted], [*slopes, of.double()]
        leaves = [exact[name] for name in names]
        expected = torch.autograd.grad(outputs, leaves, slopes, retain_graph=True)
        expected = dict(zip(names, expected, strict=True))
        read = (of, x, moments, scale) if normed else None
        found = dict(zip(NAMES, kernels.gradients(towards, branch, read), strict=True))
        assert (found["x"] is None) == (not normed)
        for name, slope in found.items():
            assert (slope is None) == (name not in expected or (name == "x" and not normed))
            if slope is not None:
                assert slope.dtype == given[name].dtype and slope.shape == given[name].shape
                assert slope.is_contiguous()
                assert lost(slope, expected[name]) < 3 * close, (name, gated, normed)


def patched(dtype):
    """With the kernels, which make norms of this type; with None, without them."""
    patch = pytest.MonkeyPatch()
    patch.setattr(between, "norm_dtype", lambda *_: dtype)
    return patch


def learned(block, norms, call, cast=None, frozen=(), n=5):
    """What a block gives, and all gradients, with the kernels where `norms` is their type."""
    device, rng = block.attn.q_bias.device, torch.Generator().manual_seed(2)
    given = {
        "x": torch.randn(3, n, len(block.attn.q_bias), generator=rng),
        "modulation": torch.randn(3, 1, 6, len(block.attn.q_bias), generator=rng),
    }
    given = {name: each.to(device) for name, each in given.items()}
    for name in given.keys() - set(frozen):
        given[name].requires_grad_()
    block.zero_grad()
    patch = patched(norms)
    try:
        with torch.autocast(device.type, cast, enabled=cast is not None):
            out = call(given["x"], given["modulation"], Mask())
        (out.float() ** 2).mean().backward()
    finally:
        patch.undo()
        torch._dynamo.reset()
    found = {name: each.grad for name, each in given.items()} | {"out": out.detach()}
    found |= {name: p.grad for name, p in block.named_parameters()}
    return {name: each for name, each in found.items() if each is not None}


def assert_learns(norms, tolerance, device="cpu", compiler="aot_eager", cast=None, n=5, **shape):
    block = block_of(device=device, **shape)
    for bias in (block.attn.proj.bias, block.ffn.fc2.bias):
        torch.nn.init.normal_(bias)
    whole = torch.compile(block.forward, backend=compiler, dynamic=False, fullgraph=True)

    def again(*args):
        return checkpoint(block, *args, use_reentrant=False)

    def whole_again(*args):
        return checkpoint(whole, *args, use_reentrant=False)

    settings = [(call, ()) for call in (block, again, whole, whole_again)]
    settings += [(block, ("x",)), (whole, ("modulation",))]
    for call, frozen in settings:
        expected = learned(block, None, block, cast, frozen, n)
        found = learned(block, norms, call, cast, frozen, n)
        assert found.keys() == expected.keys() and len(found) == 13 - len(frozen)
        for name, each in found.items():
            assert each.dtype == expected[name].dtype
            assert lost(each, expected[name]) < tolerance, (name, call, frozen)


def assert_network_learns(tolerance, **settings):
    """A whole one, in training, whose paths are dropped alike with and without the kernels."""
    model = awake(build(Layout.pyramid((1, 1), (2, 2)), depth=2, drop_path=0.5, **settings))
    contexts = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(1))
    found = []
    for norms in (None, torch.float32):
        patch = patched(norms)
        torch.manual_seed(3)
        model.zero_grad()
        try:
            logits = model.train()(contexts, torch.tensor([0, 3, 4, 1]))
            logits.square().mean().backward()
        finally:
            patch.undo()
        found.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    for plain, other in zip(*found, strict=True):
        assert lost(other, plain) < tolerance


def assert_sound(device, dtype):
    """What `torch.library` asks of operators: true shapes, nothing changed, gradients traceable."""
    torch.manual_seed(0)
    x, product, of = (torch.randn(2, 3, 24, device=device, dtype=dtype) for _ in range(3))
    gate, scale, shift, *_ = torch.randn(2, 1, 6, 24, device=device, dtype=dtype).unbind(2)
    branch = product, torch.randn(24, device=device), gate
    _, moments = between._normed(x, scale, shift, dtype)
    for operator, args in [
        (between._normed, (x, scale, shift, dtype)),
        (between._normed_gradients, (x, of, x, moments, scale)),
        (between._added_gradients, (x, *branch)),
        (between._added_and_modulated_gradients, (x, of, x, moments, scale, *branch)),
    ]:
        torch.library.opcheck(operator, args)
    wanted = [each.detach().requires_grad_() for each in (x, *branch, scale, shift)]
    torch.library.opcheck(between._added, wanted[:4])
    torch.library.opcheck(between._added_and_modulated, wanted)


INTERPRETED = """
import sys

import torch
from test_between import (
    EXACT, Mask, assert_joined, assert_learns, assert_network_learns, assert_sound, between
)
from test_var_training_kernel import block_of

assert "sandbox_plugins.var.between_kernels" not in sys.modules  # nor, by it, triton
from sandbox_plugins.var import between_kernels as kernels, operators

kernels.PROGRAMS, kernels.COLUMNS = 6, 32
for b, n, d in [(1, 1, 8), (2, 7, 40), (7, 2, 32)]:
    assert_joined(kernels, torch.float32, b, n, d)
for x_dtype in (torch.float16, torch.float32):
    assert_joined(kernels, torch.float16, 2, 3, 40, x_dtype)
assert_learns(torch.float32, EXACT)
assert_network_learns(EXACT)
assert_network_learns(EXACT, shared_adaln=True, recompute=True)
assert_sound("cpu", torch.float32)

# Of one output alone: the other's gradient is zeros.
x, scale, shift = torch.randn(2, 3, 8, requires_grad=True), *torch.randn(2, 2, 1, 8)
same, normed = between.modulated(x, scale, shift, x.dtype)
assert same.data_ptr() == x.data_ptr()
same.sum().backward()
assert torch.equal(x.grad, torch.ones_like(x))

# What decides is traced with the rest, and the trial made meanwhile.
block, found = block_of(), []
for half in (lambda *_: torch.float16, lambda *_: None):
    operators.half = half
    between._kernels.cache_clear()
    compiled = torch.compile(block.forward, backend="aot_eager", dynamic=False, fullgraph=True)
    with torch.autocast("cpu", torch.float16):
        out = compiled(torch.ones(2, 3, 64), torch.ones(2, 1, 6, 64), Mask())
    found.append((out.dtype, between._kernels.cache_info().currsize))
assert found == [(torch.float32, 1), (torch.float32, 0)]
print("agreed")
"""


def test_interpreted_they_agree_and_blocks_learn_by_them():
    pytest.importorskip("triton", reason="triton is not there on this platform")
    assert python(INTERPRETED, TRITON_INTERPRET="1") == "agreed\n"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_cpu_it_is_for_nothing(monkeypatch, dtype):
    monkeypatch.setattr(between, "_runs", None)
    x, modulation = torch.zeros(1, 2, 8, dtype=dtype), torch.zeros(1, 1, 6, 8, dtype=dtype)
    assert between.norm_dtype(x, modulation, torch.nn.Parameter(torch.zeros(8, 8))) is None


def test_dropout_stands_between_a_product_and_its_gate(monkeypatch):
    monkeypatch.setattr(between, "norm_dtype", None)
    settings = {"mlp_width": 8, "shared_adaln": False, "qk_norm": True, "backend": backend()}
    block = Block(8, 1, dropout=0.5, **settings)
    x, modulation = torch.randn(1, 2, 8), torch.randn(1, 1, 6, 8)
    assert not torch.equal(block(x, modulation, Mask()), block(x, modulation, Mask()))


KIND = torch.device("cpu"), torch.bfloat16, torch.bfloat16, torch.bfloat16, 64


def test_kernels_that_fail_their_trial_are_told_of_and_done_without():
    pytest.importorskip("triton", reason="triton is not there on this platform")
    with pytest.warns(UserWarning, match="without their Triton kernels, so slower"):
        assert between._kernels.__wrapped__(*KIND) is None


@pytest.mark.gpu
def test_a_gpu_has_them_for_what_they_can_do():
    weight = torch.nn.Parameter(torch.zeros(64, 64, device="cuda"))

    def asked(x_dtype, rows_dtype=torch.bfloat16, d=64, rows=2):
        x = torch.zeros(2, 3, d, device="cuda", dtype=x_dtype)
        modulation = torch.zeros(rows, 1, 6, d, device="cuda", dtype=rows_dtype)
        return between.norm_dtype(x, modulation, weight)

    assert asked(torch.bfloat16) is None  # what is multiplied is float32
    with torch.autocast("cuda", torch.bfloat16):
        assert asked(torch.bfloat16) is asked(torch.float32) is torch.bfloat16
        assert asked(torch.float32, torch.float32) is torch.bfloat16
        for others in [
            (torch.float16,),
            (torch.bfloat16, torch.float32),
            (torch.bfloat16, torch.bfloat16, 4104),
            (torch.bfloat16, torch.bfloat16, 64, 1),
        ]:
            assert asked(*others) is None
        with torch.no_grad():
            assert asked(torch.bfloat16) is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("d", [64, 200, 1024, 1920, 4096])
def test_a_gpu_joins(dtype, d):
    from sandbox_plugins.var import between_kernels

    for b, n in [(1, 1), (2, 13), (5, 680), (530, 3)]:
        assert_joined(between_kernels, dtype, b, n, d, device="cuda")
    assert_joined(between_kernels, dtype, 2, 37, d, torch.float32, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
def test_a_gpu_has_sound_operators(dtype):
    assert_sound("cuda", dtype)


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # the compiler's own affairs
def test_blocks_on_a_gpu_learn_as_without():
    """About a dozen roundings follow upon one another on the way through a block and back."""
    shape = {"width": 256, "heads": 4, "mlp_width": 512, "n": 130}
    assert_learns(torch.bfloat16, 12 * 2**-8, "cuda", "inductor", torch.bfloat16, **shape)


@pytest.mark.gpu
def test_sums_are_the_same_every_time():
    from sandbox_plugins.var import between_kernels as kernels

    torch.manual_seed(0)
    x, product, of, towards = torch.randn(4, 12, 680, 1024, device="cuda").bfloat16()
    gate, scale, shift, *_ = torch.randn(12, 1, 6, 1024, device="cuda").bfloat16().unbind(2)
    branch = product, torch.randn(1024, device="cuda"), gate
    *_, moments = kernels.join(x, branch, (scale, shift, x.dtype))
    read = of, x, moments, scale
    once, again = (kernels.gradients(towards, branch, read) for _ in range(2))
    assert all(map(torch.equal, once, again))


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # the compiler's own affairs
def test_by_itself_a_compiled_block_takes_them():
    """The trial runs while the block is traced; what it decides is part of the compiled code."""
    between._kernels.cache_clear()
    block = block_of(device="cuda")
    x = torch.randn(2, 5, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    modulation = torch.randn(2, 1, 6, 64, device="cuda", dtype=torch.bfloat16)
    call = torch.compile(block.forward, dynamic=False, fullgraph=True)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        torch.autocast("cuda", torch.bfloat16),
        torch.profiler.profile(activities=activities, acc_events=True) as profile,
    ):
        call(x, modulation, Mask()).float().sum().backward()
    torch._dynamo.reset()
    names = {event.key for event in profile.key_averages()}
    operators = {"normed", "added_and_modulated", "added"}
    operators |= {f"{name}_gradients" for name in operators}
    assert {f"var_sandbox::{name}" for name in operators} <= names
