"""The Triton kernel gives the queries of `SelfAttention.project`, and keys and values their place.

Where there is no GPU, Triton's interpreter checks the arithmetic on a few tokens.
"""

import sys

import pytest
import torch
from processes import python
from torch import nn

from sandbox import Mask
from sandbox_plugins.attention.plain import SdpaAttention
from sandbox_plugins.var import fused
from sandbox_plugins.var.blocks import Block, SelfAttention

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Relative: about one step between numbers of the type."""


def attention(heads, e, qk_norm, device="cpu"):
    backend = SdpaAttention(SdpaAttention.Params())
    attn = SelfAttention(heads * e, heads, qk_norm, 0.0, backend)
    if qk_norm:  # from below 1 to beyond the cap
        attn.scale_mul_1H11.data.copy_(torch.linspace(-1, 6, heads).view(1, -1, 1, 1))
    return attn.requires_grad_(False).to(device)


def parted(attn, qkv):
    """What `project` makes of this product."""
    attn.product = lambda x, bias=None: qkv
    try:
        return attn.project(qkv)
    finally:
        del attn.product


def assert_placed(kernel, dtype, heads, e, qk_norm, b, n, start, seq_len, device="cpu"):
    rng = torch.Generator(device).manual_seed(0)
    attn = attention(heads, e, qk_norm, device)
    qkv = torch.randn(b, n, 3 * heads * e, generator=rng, device=device)
    qkv = (qkv * torch.logspace(-6, 4, b * n, device=device).view(b, n, 1)).to(dtype)
    qkv[0, 0, : 2 * e] = 0
    past = torch.randn(2, b, heads, seq_len, e, generator=rng, device=device).to(dtype)
    q, k, v = parted(attn, qkv)
    expected = past.clone()
    expected[0, :, :, start : start + n], expected[1, :, :, start : start + n] = k, v
    found = kernel.place(qkv, attn.log_scale(), past, start)
    assert found.shape == q.shape and found.dtype == dtype
    torch.testing.assert_close(found, q, rtol=CLOSE[dtype], atol=1e-7)
    torch.testing.assert_close(past[0], expected[0], rtol=CLOSE[dtype], atol=1e-7)
    assert torch.equal(past[1], expected[1])
    for kept in (slice(0, start), slice(start + n, None)):
        assert torch.equal(past[:, :, :, kept], expected[:, :, :, kept])


def stepped(kernel, device="cpu"):
    """A block's output for two steps, and its cache, with this kernel or, if None, without."""
    torch.manual_seed(0)
    settings = {"mlp_width": 64, "shared_adaln": False, "qk_norm": True, "dropout": 0.0}
    block = Block(64, 2, backend=SdpaAttention(SdpaAttention.Params()), **settings).to(device)
    nn.init.normal_(block.attn.q_bias)
    modulation = torch.randn(3, 1, 6, 64).to(device)
    past, found = torch.zeros(2, 3, 2, 5, 32, device=device), []
    with torch.inference_mode():
        for span in (slice(0, 1), slice(1, 5)):
            x = torch.randn(3, span.stop - span.start, 64).to(device)
            made = block.before(x, modulation)
            if kernel is not None:
                _, _, scale, _, shift, _ = modulation.unbind(2)
                made = block.attn.product(block.norm(x) * (1 + scale) + shift)
            seen = block.attn.see(made, Mask(), past, span, kernel)
            found.append(block.after(x, seen, modulation))
    return torch.cat(found, 1), past


INTERPRETED = """
import sys

import pytest
import torch
from test_var_kernel import DTYPES, assert_placed, stepped

assert "sandbox_plugins.var.kernel" not in sys.modules  # nor, by it, triton
from sandbox_plugins.var import kernel

for dtype in DTYPES:
    for qk_norm in (True, False):
        assert_placed(kernel, dtype, 2, 32, qk_norm, b=2, n=3, start=1, seq_len=5)
assert_placed(kernel, torch.float32, 5, 128, True, b=1, n=1, start=2, seq_len=3)
assert_placed(kernel, torch.float32, 9, 64, True, b=2, n=1, start=0, seq_len=1)
assert_placed(kernel, torch.float32, 3, 256, True, b=1, n=1, start=0, seq_len=2)
qkv, past = torch.zeros(1, 2, 24), torch.zeros(2, 1, 2, 3, 4)
for args in [(qkv.half(), None, past, 0), (qkv, None, past, 2), (qkv[..., 1:], None, past, 0),
             (qkv, None, past, -1), (qkv.expand(2, -1, -1), None, past, 0)]:
    with pytest.raises(ValueError, match="have no place in a cache"):
        kernel.place(*args)
qkv[..., 0] = torch.nan
q = kernel.place(qkv, torch.zeros(1, 2, 1, 1), past, 0)
assert q[:, 0].isnan().all() and (q[:, 1] == 0).all()
for one, other in zip(stepped(kernel), stepped(None)):
    torch.testing.assert_close(one, other)
print("agreed")
"""


def test_interpreted_it_places_what_is_projected_and_a_block_attends_to_that():
    pytest.importorskip("triton", reason="triton is not there on this platform")
    assert python(INTERPRETED, TRITON_INTERPRET="1") == "agreed\n"


KIND = torch.device("cpu"), torch.float32, 2, 32, True


def test_a_kernel_that_fails_its_trial_is_told_of_and_done_without():
    pytest.importorskip("triton", reason="triton is not there on this platform")
    with pytest.warns(UserWarning, match="without its Triton kernels, so slower"):
        assert fused._kernel.__wrapped__(*KIND) is None


def test_without_triton_torch_does_it(monkeypatch):
    import sandbox_plugins.var as package

    monkeypatch.delattr(package, "kernel", raising=False)
    monkeypatch.setitem(sys.modules, "sandbox_plugins.var.kernel", None)
    assert fused._kernel.__wrapped__(*KIND) is None


def the_kernel(dtype=torch.float32, heads=2, e=32, qk_norm=True):
    device = torch.zeros(1, device="cuda").device
    kernel = fused._kernel(device, dtype, heads, e, qk_norm)
    assert kernel is not None
    return kernel


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize(("heads", "e"), [(1, 8), (3, 32), (16, 64), (5, 128), (2, 256)])
def test_a_gpu_places_what_is_projected(dtype, qk_norm, heads, e):
    kernel = the_kernel(dtype, heads, e, qk_norm)
    for b, n, start, seq_len in [(2, 1, 0, 256), (5, 1, 17, 19), (3, 13, 7, 21), (2, 256, 0, 256)]:
        assert_placed(kernel, dtype, heads, e, qk_norm, b, n, start, seq_len, "cuda")


@pytest.mark.gpu
def test_a_gpu_places_beyond_the_reach_of_32_bits():
    """Values that lie more than 2^31 numbers after the first key."""
    past = torch.zeros(2, 129, 16, 16400, 64, dtype=torch.float16, device="cuda")
    qkv = torch.randn(129, 1, 3 * 16 * 64, dtype=torch.float16, device="cuda")
    the_kernel(past.dtype, 16, 64, False).place(qkv, None, past, 16399)
    _, k, v = parted(attention(16, 64, False), qkv)
    assert torch.equal(past[0, :, :, -1:], k) and torch.equal(past[1, :, :, -1:], v)
    assert not past[:, :, :, -2].any()


@pytest.mark.gpu
def test_a_gpu_has_thekernel_for_what_it_can_do():
    attn = attention(2, 32, True, "cuda")
    x, past = torch.zeros(2, 3, 64, device="cuda"), torch.zeros(2, 2, 2, 9, 32, device="cuda")
    assert fused.kernel_for(attn, x, past) is None  # gradients are asked for
    with torch.no_grad():
        assert fused.kernel_for(attn, x, past) is the_kernel()
        for other in [
            (x.cpu(), past),
            (x.half(), past),
            (x.double(), past.double()),
            (x, past[..., :24]),
            (x, past.new_zeros(2, 2, 2, 9, 24)),
            (x, past.new_zeros(2, 2, 2, 9, 512)),
        ]:
            assert fused.kernel_for(attn, *other) is None


@pytest.mark.gpu
def test_one_build_is_for_all_steps_and_sizes():
    kernel = the_kernel()
    built = lambda: sum(len(each[0]) for each in kernel._place.device_caches.values())  # noqa: E731
    before = built()
    for b, n, start, seq_len in [(1, 1, 0, 1), (2, 1, 1, 16), (16, 16, 16, 32), (3, 5, 2, 9)]:
        assert_placed(kernel, torch.float32, 2, 32, True, b, n, start, seq_len, "cuda")
    assert built() == before


@pytest.mark.gpu
def test_a_block_on_a_gpu_attends_to_what_it_placed():
    for one, other in zip(stepped(the_kernel(), "cuda"), stepped(None, "cuda"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
