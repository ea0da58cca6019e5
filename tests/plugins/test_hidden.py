"""The MLP's hidden layer by Triton kernels: what it makes, and both gradients, are torch's."""

import pytest
import torch
from processes import python
from torch import nn
from torch.nn import functional as F

from sandbox_plugins.var import hidden

CLOSE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def assert_activated(kernels, dtype, n, f, device="cpu"):
    rng = torch.Generator(device).manual_seed(n)
    product, of = (torch.randn(n, f, generator=rng, device=device).to(dtype) for _ in range(2))
    bias = torch.randn(f, generator=rng, device=device)
    product[0, 0], product[-1, -1] = 40.0, -40.0
    exact = [each.double().requires_grad_() for each in (product, bias)]
    wanted = F.gelu(sum(exact), approximate="tanh")
    towards = torch.autograd.grad(wanted, exact, of.double())
    close = CLOSE[dtype]
    found = kernels.activate(product, bias)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted.detach(), rtol=close, atol=close)
    found = kernels.gradients(of, product, bias)
    assert [each.dtype for each in found] == [dtype, torch.float32]
    torch.testing.assert_close(found[0].double(), towards[0], rtol=close, atol=close)
    torch.testing.assert_close(found[1].double(), towards[1], rtol=1e-4, atol=1e-4 * n**0.5)


INTERPRETED = """
import torch
from sandbox_plugins.var import hidden_kernels
from test_hidden import assert_activated

hidden_kernels.COLUMNS, hidden_kernels.SHARES = 32, 3
for dtype in (torch.float32, torch.float16):
    for n, f in ((1, 8), (4, 32), (30, 40)):
        assert_activated(hidden_kernels, dtype, n, f)
print("agreed")
"""


def test_interpreted_the_kernels_agree():
    pytest.importorskip("triton", reason="triton is not there on this platform")
    assert python(INTERPRETED, TRITON_INTERPRET="1") == "agreed\n"


def test_on_a_cpu_it_is_for_nothing():
    half = torch.zeros(1, 2, dtype=torch.bfloat16, requires_grad=True)
    assert not hidden.suits(half[None], half)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gpu_activates(dtype):
    from sandbox_plugins.var import hidden_kernels

    for n, f in ((1, 8), (333, 4096), (2000, 1000), (5, 7680)):
        assert_activated(hidden_kernels, dtype, n, f, "cuda")


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # the compiler's own affairs
@pytest.mark.parametrize("compiled", [False, True])
def test_a_block_on_a_gpu_learns_as_without(monkeypatch, compiled):
    from test_var_training_kernel import block_of

    from sandbox import Mask

    made = []
    for suits in (hidden.suits, lambda *_: False):
        monkeypatch.setattr(hidden, "suits", suits)
        torch._dynamo.reset()
        block = block_of(device="cuda")
        forward = torch.compile(block, dynamic=False) if compiled else block
        x = torch.randn(2, 14, 64, generator=torch.Generator().manual_seed(0)).cuda()
        x.requires_grad_()
        modulation = torch.full((2, 1, 6, 64), 0.5, device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            out = forward(x, modulation, Mask((1, 4, 9)))
        out.square().mean().backward()
        assert suits is not hidden.suits or out.requires_grad
        made.append([out, x.grad, *(p.grad for p in block.ffn.parameters())])
    for found, plain in zip(*made, strict=True):
        assert plain.norm() > 0
        assert (found - plain).norm() < 2e-2 * plain.norm()


@pytest.mark.gpu
def test_it_is_a_sound_operator():
    product = torch.randn(2, 3, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    bias = nn.Parameter(torch.randn(16, device="cuda"))
    torch.library.opcheck(
        hidden.activated, (product, bias), test_utils=("test_schema", "test_faketensor")
    )
