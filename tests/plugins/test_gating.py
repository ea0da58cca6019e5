"""What stands between products, as one Triton kernel, is what the modules compute.

Where there is no GPU, Triton's interpreter checks the arithmetic, and a whole network by kernels.
"""

import pytest
import torch
from processes import python
from torch.nn import functional as F

from sandbox_plugins.var.blocks import LAYER_NORM_EPS

CLOSE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Relative: about a step between numbers of the type, or two."""


def assert_gated(gating, dtype, b, n, d, out_dtype=None, device="cpu"):
    rng = torch.Generator(device).manual_seed(0)

    def made(*shape, dtype=dtype):
        return torch.randn(*shape, generator=rng, device=device).to(dtype)

    sizes = torch.logspace(-2, 2, b * n, device=device).view(b, n, 1)
    x, y = ((made(b, n, d).float() * sizes + 0.1).to(dtype) for _ in "xy")
    gate, *_ = made(b, 1, 6, d).unbind(2)
    _, shift, _, scale = made(b, 1, 4, d, dtype=out_dtype or dtype).unbind(2)
    for branch in (None, (y, gate)):
        added, normed = gating.gated_norm(x, branch, shift, scale)
        if branch is None:
            assert added is x
        else:
            exact = x.double() + y.double() * gate.double()
            torch.testing.assert_close(added.double(), exact, rtol=CLOSE[dtype], atol=1e-5)
        expected = F.layer_norm(added.double(), (d,), eps=LAYER_NORM_EPS)
        expected = expected * (1 + scale.double()) + shift.double()
        assert normed.dtype == shift.dtype and added.dtype == dtype
        close = CLOSE[normed.dtype]
        torch.testing.assert_close(normed.double(), expected, rtol=close, atol=2 * close)


def stepped(model, fused, dtype=None):
    """Every step's logits, for three labels and random contexts."""
    layout, rng = model.tokens.layout, torch.Generator().manual_seed(1)
    contexts = torch.randn(3, layout.seq_len, 3, generator=rng)
    device = model.word_embed.weight.device
    model.fused = fused
    with (
        torch.inference_mode(),
        torch.autocast(device.type, dtype, enabled=dtype is not None),
    ):
        state = model.begin(torch.tensor([0, 3, 4], device=device))
        steps = enumerate(layout.spans)
        found = [model.step(state, contexts[:, span].to(device), k) for k, span in steps]
    return torch.cat(found, 1)


INTERPRETED = """
import pytest
import torch
from test_gating import assert_gated, stepped
from test_var_model import awake, build

import sys
from sandbox import Layout
from sandbox_plugins.var import fused, pieces

assert "sandbox_plugins.var.gating" not in sys.modules  # nor, by it, triton
from sandbox_plugins.var import gating, kernel

for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for d in (24, 128, 200):
        assert_gated(gating, dtype, 2, 3, d)
assert_gated(gating, torch.bfloat16, 3, 1, 48, torch.float32)
x, six = torch.zeros(2, 3, 8), torch.zeros(2, 1, 6, 8).unbind(2)
for args in [(x, None, six[0][:1], six[0]), (x, (x[:, :1], six[0]), six[0], six[0]),
             (x, (x.half(), six[0]), six[0], six[0]),
             (x, None, torch.zeros(2, 1, 16)[..., ::2], six[0])]:
    with pytest.raises(ValueError, match="no norm of"):
        gating.gated_norm(*args)
assert [made.shape for made in gating.gated_norm(x[:, :0], None, six[0], six[0])] == [(2, 0, 8)] * 2
x[1, 1, 0] = torch.nan
bad = gating.gated_norm(x, None, six[0], six[1])[1].isnan()
assert bad[1, 1].all() and bad.sum() == 8

fused.kernel_for = lambda *_: kernel
fused.begin = lambda network, cond, weights: network.modulations(cond, weights.blocks)
pieces.compiled = None
pyramid, raster = Layout.pyramid((1, 1), (2, 2), (3, 3)), Layout.raster(2, 2)
for layout, settings in [(pyramid, {}), (pyramid, {"shared_adaln": True}),
                         (raster, {"qk_norm": False})]:
    model = awake(build(layout, depth=2, **settings))
    plain = stepped(model, False)
    torch.testing.assert_close(stepped(model, True), plain, rtol=1e-4, atol=1e-4)
    found, plain = (stepped(model, fast, torch.float16) for fast in (True, False))
    assert 0 < (found - plain).norm() < 2e-2 * plain.norm()
print("agreed")
"""


def test_interpreted_it_is_the_norm_and_with_it_a_network_draws_alike():
    pytest.importorskip("triton", reason="triton is not there on this platform")
    assert python(INTERPRETED, TRITON_INTERPRET="1") == "agreed\n"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("d", [64, 200, 1024, 1920])
def test_a_gpu_gates_and_normalises(dtype, d):
    from sandbox_plugins.var import gating

    for b, n in [(1, 1), (2, 1), (2, 256), (130, 3)]:
        assert_gated(gating, dtype, b, n, d, device="cuda")
        assert_gated(gating, dtype, b, n, d, torch.float32, device="cuda")


@pytest.mark.gpu
def test_one_build_is_for_all_numbers_of_tokens():
    from sandbox_plugins.var import gating

    kernel = gating._gated_norm
    assert_gated(gating, torch.bfloat16, 2, 16, 128, device="cuda")
    built = lambda: sum(len(each[0]) for each in kernel.device_caches.values())  # noqa: E731
    before = built()
    for b, n in [(1, 1), (2, 1), (3, 5), (16, 16), (1, 160)]:
        assert_gated(gating, torch.bfloat16, b, n, 128, device="cuda")
    assert built() == before


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(
    ("b", "n", "c", "d"), [(2, 1, 32, 1024), (3, 7, 5, 200), (128, 256, 32, 64)]
)
def test_a_gpu_reads_contexts(dtype, b, n, c, d):
    from sandbox_plugins.var import reading

    torch.manual_seed(0)
    contexts = torch.randn(b, n, c, device="cuda")
    weight, bias, places = (
        torch.randn(*shape, device="cuda").to(dtype) for shape in ((d, c), (d,), (1, n + 3, d))
    )
    found = reading.read(contexts, weight, bias, places[:, 3:])
    exact = (contexts.to(dtype).double(), weight.double(), bias.double())
    exact = F.linear(*exact) + places[:, 3:].double()
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=CLOSE[dtype], atol=10 * CLOSE[dtype])
