"""In training, the Triton kernels give what `SelfAttention.project` gives, and its gradients.

Where there is no GPU, Triton's interpreter checks the arithmetic on a few tokens, in float32.
"""

import math
import sys

import pytest
import torch
from processes import python
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sandbox import Mask
from sandbox_plugins.attention.plain import SdpaAttention
from sandbox_plugins.var import operators
from sandbox_plugins.var.blocks import Block, SelfAttention

EXACT = 1e-5
HALF = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""The largest relative error of rounding to the type."""


def backend():
    return SdpaAttention(SdpaAttention.Params())


def attention(heads, e, device="cpu"):
    torch.manual_seed(0)
    attn = SelfAttention(heads * e, heads, True, 0.0, backend())
    for bias in (attn.q_bias, attn.v_bias):
        nn.init.normal_(bias)
    # from below 1 to beyond the cap
    attn.scale_mul_1H11.data.copy_(torch.linspace(-1, 6, heads).view(1, -1, 1, 1))
    return attn.to(device)


def patched(kernels):
    """With the kernels whatever the tensors are, or else without them."""
    patch = pytest.MonkeyPatch()
    patch.setattr(operators, "suits", lambda *_: kernels)
    return patch


def projected(attn, x, kernels, dtype=None):
    """Queries, keys and values of `x`, and all gradients of their products with random numbers."""
    x = x.detach().requires_grad_()
    attn.zero_grad()
    patch = patched(kernels)
    try:
        with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
            made = attn.project(x)
    finally:
        patch.undo()
    rng = torch.Generator(x.device).manual_seed(1)
    weights = [torch.randn(m.shape, generator=rng, device=x.device).to(m.dtype) for m in made]
    torch.autograd.backward(made, weights)
    gradients = {name: p.grad for name, p in attn.named_parameters() if p.grad is not None}
    return made, {"x": x.grad, **gradients}


def lost(found, expected):
    """The norm of the difference, over that of what was expected."""
    found, expected = found.detach().float(), expected.detach().float()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def assert_projects(heads, e, b, n, tolerance, device="cpu", dtype=None):
    """Vectors, and the sums over them that gradients are, as vectors: their norms of difference."""
    attn = attention(heads, e, device)
    x = torch.randn(b, n, heads * e, generator=torch.Generator().manual_seed(0)).to(device)
    made, gradients = projected(attn, x, True, dtype)
    plain, expected = projected(attn, x, False, dtype)
    for one, other in zip(made, plain, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert one.transpose(1, 2).is_contiguous() and lost(one, other) < tolerance
    names = {"x", "mat_qkv.weight", "q_bias", "v_bias", "scale_mul_1H11"}
    assert gradients.keys() == expected.keys() == names
    for name in names:
        assert gradients[name].dtype == expected[name].dtype
    for name in names - {"scale_mul_1H11"}:
        # What is summed over few tokens of few channels may cancel, and then errors stand out.
        close = 4 * tolerance if name == "q_bias" else tolerance
        assert lost(gradients[name], expected[name]) < close, name
    # A head's one number may cancel as well: it is held to the size of what it is a sum of, and
    # the worst of many heads to thrice what is asked of all together.
    size = attn.scale_mul_1H11.detach().exp() * (b * n) ** 0.5
    change = gradients["scale_mul_1H11"] - expected["scale_mul_1H11"]
    assert (change.abs() < 3 * tolerance * size).all()
    capped = attn.scale_mul_1H11 > 4.7
    assert not gradients["scale_mul_1H11"][capped].any()
    assert heads == 1 or capped.any()


def parted(product, bias, log_scale):
    """What `operators.part` makes, by torch."""
    qkv = (product + bias).unflatten(-1, (3, log_scale.shape[1], -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return (
        F.normalize(q, dim=-1) * log_scale.clamp_max(math.log(100)).exp(),
        F.normalize(k, dim=-1),
        v,
    )


def assert_parts(heads, e, b, n, tolerance, dtype, device="cpu"):
    """All that is made, and all gradients, against float64; sums over tokens by their terms."""
    rng = torch.Generator().manual_seed(n)
    product = torch.randn(b, n, 3 * heads * e, generator=rng).to(device, dtype)
    bias = torch.randn(3 * heads * e, generator=rng).to(device)
    log_scale = torch.linspace(-1, 6, heads, device=device).view(1, -1, 1, 1)
    ours = [x.requires_grad_() for x in (product, bias, log_scale)]
    exact = [x.detach().double().requires_grad_() for x in ours]
    made, expected = operators.part(*ours), parted(*exact)
    weights = [torch.randn(m.shape, generator=rng).to(m) for m in made]
    torch.autograd.backward(made, weights)
    torch.autograd.backward(expected, [w.double() for w in weights])
    for one, other in zip([*made, product.grad], [*expected, exact[0].grad], strict=True):
        assert one.dtype == dtype and lost(one, other) < tolerance
    assert bias.grad.dtype == log_scale.grad.dtype == torch.float32
    terms = exact[0].grad.square().sum((0, 1)).view(3, -1)
    for third in range(3):
        change = (bias.grad - exact[1].grad).view(3, -1)[third]
        assert change.norm() < tolerance * terms[third].sum().sqrt(), third
    size = log_scale.detach().clamp_max(math.log(100)).exp() * (b * n) ** 0.5
    assert ((log_scale.grad - exact[2].grad).abs() < 3 * tolerance * size).all()


def block_of(width=64, heads=2, device="cpu", mlp_width=64):
    torch.manual_seed(0)
    settings = {"shared_adaln": False, "qk_norm": True, "dropout": 0.0, "backend": backend()}
    return Block(width, heads, mlp_width=mlp_width, **settings).to(device)


def trained(block, kernels, compiler=None, again=False, dtype=None, n=5):
    """What a block gives, and all gradients; compiled with `compiler`, computed again or not."""
    device = block.attn.q_bias.device
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(3, n, len(block.attn.q_bias), generator=rng).to(device).requires_grad_()
    modulation = torch.randn(3, 1, 6, x.shape[-1], generator=rng).to(device)
    call = torch.compile(block.forward, backend=compiler, dynamic=False) if compiler else block
    block.zero_grad()
    patch = patched(kernels)
    try:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            if again:
                out = checkpoint(call, x, modulation, Mask(), use_reentrant=False)
            else:
                out = call(x, modulation, Mask())
            loss = (out.float() ** 2).mean()
        loss.backward()
    finally:
        patch.undo()
        torch._dynamo.reset()
    gradients = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    return {"out": out.detach(), "x": x.grad, **gradients}


def assert_trains(tolerance, device="cpu", compiler="aot_eager", dtype=None, **shape):
    n = shape.pop("n", 5)
    block = block_of(device=device, **shape)
    expected = trained(block, False, dtype=dtype, n=n)
    for settings in [{}, {"again": True}, {"compiler": compiler}]:
        found = trained(block, True, dtype=dtype, n=n, **settings)
        assert found.keys() == expected.keys()
        for name in found:
            assert lost(found[name], expected[name]) < tolerance, (name, settings)
    both = trained(block, True, compiler, again=True, dtype=dtype, n=n)
    for name in both:
        assert lost(both[name], expected[name]) < tolerance, name


def saved(kernels):
    """Numbers that a compiled block saves for its gradients, by storage, largest first."""
    block, storages = block_of(mlp_width=32), {}
    call = torch.compile(block.forward, backend="aot_eager_decomp_partition", dynamic=False)

    def seen(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.itemsize, x
        return x

    patch = patched(kernels)
    try:
        with torch.autograd.graph.saved_tensors_hooks(seen, lambda x: x):
            out = call(torch.randn(3, 65, 64), torch.randn(3, 1, 6, 64), Mask())
        out.sum().backward()
    finally:
        patch.undo()
        torch._dynamo.reset()
    return sorted((size for size, _ in storages.values()), reverse=True)


def assert_sound(device, dtype):
    """What `torch.library` asks of operators: true shapes, nothing changed, gradients traceable."""
    product = torch.randn(2, 3, 3 * 2 * 16, device=device, dtype=dtype).requires_grad_()
    bias = torch.randn(3 * 2 * 16, device=device, dtype=dtype).requires_grad_()
    scale = torch.tensor([-1.0, 2.0], device=device).view(1, 2, 1, 1).requires_grad_()
    torch.library.opcheck(operators._part, (product, bias, scale))
    q, k, v, norms = operators._part(*(x.detach() for x in (product, bias, scale)))
    rows = (torch.randn_like(q), k.contiguous(), v.expand_as(v), q, k, norms, scale.detach())
    torch.library.opcheck(operators._gather, rows)


INTERPRETED = """
import sys

import pytest
import torch
from test_var_training_kernel import (
    EXACT, assert_parts, assert_projects, assert_sound, assert_trains, operators, saved
)

assert "sandbox_plugins.var.training_kernel" not in sys.modules  # nor, by it, triton
for heads, e, b, n in [(1, 8, 2, 3), (2, 32, 2, 5), (5, 128, 1, 2), (9, 64, 1, 1)]:
    assert_projects(heads, e, b, n, EXACT)
assert_projects(2, 16, 2, 3, 2 * 2**-8, dtype=torch.bfloat16)
kernels = sys.modules["sandbox_plugins.var.training_kernel"]
for kernels.PROGRAMS in (1, 528):
    for heads, e, b, n in [(1, 8, 1, 1), (3, 32, 2, 5), (2, 256, 1, 2)]:
        assert_parts(heads, e, b, n, EXACT, torch.float32)
    assert_parts(3, 32, 2, 5, 2 * 2**-11, torch.float16)
assert_trains(EXACT)
assert_sound("cpu", torch.float32)

x = 3 * 65 * 64  # more than a weight has; the product is 3 x, queries and keys were copies of it
ours, plain = saved(True), saved(False)
assert plain[0] == 3 * x and ours[0] == x
assert sum(ours) < sum(plain) - 1.8 * x

# Vectors of all lengths: gradients of zeros, and of what is shorter than the least norm.
lengths = torch.tensor([0, 1e-20, 1e-13, 1e-6, 1, 1e4]).view(1, 6, 1)
vectors = lengths * torch.nn.functional.normalize(torch.randn(1, 6, 3 * 16), dim=-1)
scale = torch.zeros(1, 1, 1, 1)
leaf, none = vectors.clone().requires_grad_(), torch.zeros(3 * 16)
q, k, v = operators.part(leaf, none, scale)
weights = [torch.randn_like(each) for each in (q, k, v)]
torch.autograd.backward([q, k, v], weights)
plain = vectors.clone().requires_grad_()
normal = torch.nn.functional.normalize
expected = [each[:, None] for each in plain.chunk(3, -1)]
expected = [normal(expected[0], dim=-1), normal(expected[1], dim=-1), expected[2]]
for one, other in zip((q, k, v), expected):
    torch.testing.assert_close(one, other, rtol=EXACT, atol=1e-7)
torch.autograd.backward(expected, weights)
for one, other in zip(leaf.grad[0], plain.grad[0]):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))

# Of one alone: the others' gradients are zeros, and not asked for is not given.
leaf.grad = None
operators.part(leaf, none, scale)[1].sum().backward()
assert scale.grad is None and not leaf.grad[..., :16].any() and not leaf.grad[..., 32:].any()
assert leaf.grad[..., 16:32].any()
with pytest.raises(ValueError, match="not 1 heads of a power of two"):
    operators.part(torch.zeros(1, 1, 36), torch.zeros(36), scale)
print("agreed")
"""


def test_interpreted_they_project_train_and_are_sound_operators():
    pytest.importorskip("triton", reason="triton is not there on this platform")
    assert python(INTERPRETED, TRITON_INTERPRET="1") == "agreed\n"


KIND = torch.device("cpu"), torch.bfloat16, 2, 32


def test_kernels_that_fail_their_trial_are_told_of_and_done_without():
    pytest.importorskip("triton", reason="triton is not there on this platform")
    with pytest.warns(UserWarning, match="without their Triton kernels, so slower"):
        assert operators._kernels.__wrapped__(*KIND) is None


def test_without_triton_torch_does_it(monkeypatch):
    import sandbox_plugins.var as package

    monkeypatch.delattr(package, "training_kernel", raising=False)
    monkeypatch.setitem(sys.modules, "sandbox_plugins.var.training_kernel", None)
    assert operators._kernels.__wrapped__(*KIND) is None


def test_on_a_cpu_nothing_is_tried(monkeypatch):
    monkeypatch.setattr(operators, "_runs", None)
    x = torch.zeros(1, 1, 32, dtype=torch.bfloat16)
    assert not operators.suits(x, torch.zeros(96, 32, dtype=x.dtype, requires_grad=True), 2)


@pytest.mark.gpu
def test_a_gpu_has_them_for_what_they_can_do():
    def suits(width, heads, dtype=torch.bfloat16, device="cuda", learned=True):
        x = torch.zeros(1, 2, width, device=device, dtype=dtype)
        weight = torch.zeros(3 * width, width, device=device, dtype=dtype, requires_grad=learned)
        return operators.suits(x, weight, heads)

    assert suits(64, 2) and suits(64, 2, torch.float16) and suits(512, 2)
    assert not suits(64, 2, torch.float32) and not suits(64, 2, device="cpu")
    assert not suits(64, 2, learned=False) and not suits(512, 1) and not suits(24, 1)
    with torch.autocast("cuda", torch.bfloat16):
        assert suits(64, 2, torch.float32)
    with torch.no_grad():
        assert not suits(64, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("heads", "e"), [(1, 8), (3, 32), (16, 64), (5, 128), (2, 256)])
def test_a_gpu_projects_with_the_gradients_of_the_plain_path(dtype, heads, e):
    """Both round queries and keys once, and the product's gradient once; the kernels' directions
    are rounded besides, which moves a gradient by no more than rounding that would: hence two
    roundings, of which the norm of many is well below the largest."""
    for b, n in [(2, 1), (3, 13), (2, 680)]:
        assert_projects(heads, e, b, n, 2 * HALF[dtype], "cuda", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("heads", "e"), [(1, 8), (3, 32), (16, 64), (30, 64), (5, 128), (6, 256)])
def test_a_gpu_sums_the_gradients_of_bias_and_scale(dtype, heads, e):
    for b, n in [(1, 1), (3, 13), (2, 680)]:
        assert_parts(heads, e, b, n, 2 * HALF[dtype], dtype, "cuda")


@pytest.mark.gpu
def test_a_gpu_projects_in_float32_to_its_last_digits():
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        assert_projects(16, 64, 2, 37, EXACT, "cuda")
    finally:
        torch.set_float32_matmul_precision(precision)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
def test_a_gpu_has_sound_operators(dtype):
    assert_sound("cuda", dtype)


@pytest.mark.gpu
def test_their_gradients_are_the_same_every_time():
    attn, x = attention(16, 64, "cuda"), torch.randn(4, 680, 1024, device="cuda")
    _, once = projected(attn, x, True, torch.bfloat16)
    once = {name: gradient.clone() for name, gradient in once.items()}
    _, again = projected(attn, x, True, torch.bfloat16)
    for name in ("x", "q_bias", "v_bias", "scale_mul_1H11"):
        assert torch.equal(once[name], again[name])


@pytest.mark.gpu
def test_compiled_blocks_on_a_gpu_train_as_plain_ones():
    """About a dozen roundings follow upon one another on the way through a block and back."""
    shape = {"width": 256, "heads": 4, "mlp_width": 512, "n": 130}
    assert_trains(12 * 2**-8, "cuda", "inductor", torch.bfloat16, **shape)


@pytest.mark.gpu
def test_by_itself_a_compiled_block_takes_them():
    """The trial runs while the block is traced; what it decides is part of the compiled code."""
    operators._kernels.cache_clear()
    block = block_of(device="cuda")
    x = torch.randn(2, 5, 64, device="cuda", requires_grad=True)
    call = torch.compile(block.forward, dynamic=False, fullgraph=True)
    with (
        torch.autocast("cuda", torch.bfloat16),
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True
        ) as profile,
    ):
        call(x, torch.randn(2, 1, 6, 64, device="cuda"), Mask()).sum().backward()
    torch._dynamo.reset()
    names = {event.key for event in profile.key_averages()}
    assert {"var_sandbox::part", "var_sandbox::gather"} <= names


@pytest.mark.gpu
def test_with_them_a_compiled_block_keeps_the_product_no_more():
    """Held between forward and backward: two thirds of the product less, but for the norms."""

    def kept(kernels):
        block = block_of(512, 8, "cuda", 512)
        x = torch.randn(16, 256, 512, device="cuda", requires_grad=True)
        modulation = torch.randn(16, 1, 6, 512, device="cuda")
        call = torch.compile(block.forward, dynamic=False)
        patch = patched(kernels)
        try:
            with torch.autocast("cuda", torch.bfloat16):
                call(x, modulation, Mask()).sum().backward()  # compiled, workspaces made
                block.zero_grad()
                x.grad = None
                before = torch.cuda.memory_allocated()
                out = call(x, modulation, Mask())
                held = torch.cuda.memory_allocated() - before
            out.sum().backward()
        finally:
            patch.undo()
            torch._dynamo.reset()
        return held

    product = 16 * 256 * 3 * 512 * 2
    assert kept(True) < kept(False) - product / 2
