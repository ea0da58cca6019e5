"""Large maps as strips: where they lie, how they are convolved, and how they are left again."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import python
from test_quick_autoencoder import TOGETHER, awake, together
from torch.nn import functional as F

from sandbox import float32_products
from sandbox_plugins.autoencoders import cnn, strips
from sandbox_plugins.autoencoders.doubling import double
from sandbox_plugins.autoencoders.layers import conv3, normalisation

CLOSE = {torch.float32: 3e-3, torch.float16: 1e-2, torch.bfloat16: 6e-2}  # float32 by TF32


@given(b=st.integers(1, 3), d=st.integers(1, 4), h=st.integers(1, 5), w=st.integers(1, 5))
def test_a_strip_is_the_map_with_a_pixel_of_zeros_before_and_after_each_row(b, d, h, w):
    maps = torch.randn(b, d, h, w)
    strip = strips.filled(maps, d + 1)
    assert strips.is_strip(strip) and torch.equal(strip[:, :d], maps)
    whole = strips.whole(strip)
    assert whole.shape == (b, h * (w + 1) + 1, d + 1) and whole.is_contiguous()
    rows = whole[:, 1:].unflatten(1, (h, w + 1))
    assert torch.equal(rows[:, :, :w, :d].permute(0, 3, 1, 2), maps)
    assert not whole[:, 0].any() and not rows[:, :, w].any() and not whole[..., d:].any()
    assert torch.equal(strips.view(whole, h, w), strip)


@given(b=st.integers(1, 3), h=st.integers(1, 5), w=st.integers(1, 5))
def test_three_pixels_in_a_row_are_one_window_of_a_strip(b, h, w):
    maps = torch.randn(b, 2, h, w)
    whole = strips.whole(strips.filled(maps, 2))
    windows = whole.as_strided((b, whole.shape[1] - 2, 6), (whole.stride(0), 2, 1))
    around = F.pad(maps, (1, 1)).unfold(3, 3, 1)  # b 2 h w 3
    found = F.pad(windows, (0, 0, 0, 1)).unflatten(1, (h, w + 1))[:, :, :w]
    assert torch.equal(found, around.permute(0, 2, 3, 4, 1).flatten(3))


@given(d=st.integers(1, 4), h=st.integers(1, 5), w=st.integers(1, 5))
def test_one_pixel_at_a_time_a_strip_is_convolved_as_a_map(d, h, w):
    maps, weight = torch.randn(2, d, h, w), torch.randn(3, d, 1, 1)
    found = strips.pointwise(strips.filled(maps, d), weight)
    assert strips.is_strip(found)
    torch.testing.assert_close(found, F.conv2d(maps, weight))


def test_numbers_are_rounded_to_the_nearest_of_tf32():
    pytest.importorskip("triton", reason="triton is not there on this platform")
    from sandbox_plugins.autoencoders.convolving import rounded

    x = torch.randn(1000) * torch.logspace(-30, 30, 1000)
    found = rounded(x)
    assert not (found.view(torch.int32) & (2**13 - 1)).any() and not torch.equal(found, x)
    assert ((found - x).abs() <= x.abs() * 2**-11).all()
    kept = torch.tensor([0.0, 1.5, -torch.inf])
    assert torch.equal(rounded(kept), kept) and torch.equal(rounded(x.half()), x.half())
    gpu = torch.tensor([2**31 - 1, -1], dtype=torch.int32).view(torch.float32)  # as GPUs write NaN
    assert rounded(gpu).isnan().all()


def pixels_alone(strip):
    """The strip, and NaN for all that is no pixel."""
    torn = strips.like(strip)
    strips.whole(torn).fill_(torch.nan)
    return torn.copy_(strip)


def check_strips(sizes, dtype=torch.float32, device="cpu"):
    """Norms of strips and convolutions with all that these add, against torch in float64."""
    from sandbox_plugins.autoencoders.convolving import convolved, convolved_doubled, entered
    from sandbox_plugins.autoencoders.leaving import left
    from sandbox_plugins.autoencoders.norms import Sum, added, normed

    def close(found, wanted):
        at_most = CLOSE[dtype] * max(1.0, wanted.std().item())
        torch.testing.assert_close(found.double(), wanted, rtol=CLOSE[dtype], atol=at_most)

    def norm_of(channels):
        norm = normalisation(channels).to(device).requires_grad_(False)
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
        return norm

    def of(norm, maps):
        weights = norm.weight.double(), norm.bias.double()
        return F.group_norm(maps, norm.num_groups, *weights, norm.eps)

    like = {"dtype": dtype, "device": device}
    for b, d, e, h, w in sizes:
        norm, following = norm_of(d), norm_of(e)
        conv = conv3(d, e).to(**like, **TOGETHER).requires_grad_(False)
        weight, bias = conv.weight.double(), conv.bias.double()
        x, y = together(b, d, h, w, offset=5, **like), together(b, d, h, w, **like)
        biases = torch.randn(2, d, **like)
        for kind in ((x,), (x, biases[0], y, biases[1])):
            wanted = sum(t.double() if t.ndim == 4 else t.double()[:, None, None] for t in kind)
            total, read = normed(Sum(*kind), norm, silu=True, strip=True)
            assert strips.is_strip(total.first) and strips.is_strip(read)
            close(added(total), wanted)
            close(read, F.silu(of(norm, wanted)))
            rows = strips.whole(read)[:, 1:].unflatten(1, (h, w + 1))
            assert not strips.whole(read)[:, 0].any() and not rows[:, :, w].any()
        beside = pixels_alone(strips.filled(torch.randn(b, e, h, w, **like), e))
        for other in (None, Sum(beside), Sum(beside, torch.randn(e, **like))):
            wanted = F.conv2d(read.double(), weight, bias, padding=1)
            for each in other[:2] if other else ():
                if each is not None:
                    wanted = wanted + (each if each.ndim == 4 else each[:, None, None]).double()
            total = convolved(read, conv.weight, conv.bias, other)
            assert strips.is_strip(total.first)
            close(total.first, wanted)
            sums = total.first.double()
            for strip in (False, True):
                same, found = normed(total, following, silu=False, strip=strip)
                assert same is total and strips.is_strip(found) == strip
                close(found, of(following, sums))
            close(added(total, pad=True), F.pad(sums, (0, 1, 0, 1)))
            for terms in (total, Sum(sums.to(dtype).contiguous(**TOGETHER))):
                strip = added(terms, strip=True)
                assert torch.equal(strips.whole(strip), strips.whole(strips.filled(strip, e)))
                close(strip, sums)
        wanted = F.interpolate(sums, scale_factor=2, mode="nearest")
        up = conv3(e, e).to(**like, **TOGETHER).requires_grad_(False)
        wanted = F.conv2d(wanted, up.weight.double(), up.bias.double(), padding=1)
        total = convolved_doubled(strip, double(up.weight), up.bias)
        assert strips.is_strip(total.first)
        close(total.first, wanted)
        same, found = normed(total, following, silu=False, strip=True)
        assert same is total
        close(found, of(following, total.first.double()))
        total, sums = Sum(strip), strip.double()
        last = conv3(e, 3).to(**like, **TOGETHER).requires_grad_(False)
        found = left(total, following, last)
        assert found.is_contiguous() and found.dtype == dtype
        wanted = F.silu(of(following, sums)).to(dtype).double()
        close(found, F.conv2d(wanted, last.weight.double(), last.bias.double(), padding=1))
        images = torch.randn(b, 3, h, w, **like)
        first = conv3(3, e).to(**like, **TOGETHER).requires_grad_(False)
        wanted = F.conv2d(images.double(), first.weight.double(), first.bias.double(), padding=1)
        close(entered(images, first.weight, first.bias).first, wanted)
    with pytest.raises(ValueError, match="too many"):
        left(total, following, conv3(e, 4).to(**like))


def check_halves(monkeypatch, least, device="cpu"):
    """Both halves of an autoencoder, all of whose larger maps are strips."""
    from sandbox_plugins.autoencoders import convolving, quick

    network = awake().to(device)
    images = torch.randn(1, 3, 4, 6, device=device)
    features = torch.randn(1, 4, 2, 3, device=device)
    with torch.no_grad():
        wanted = network.encode(images), network.decode(features)
        network.to(**TOGETHER)
        ups = [each for each in network.modules() if isinstance(each, cnn.Upsample)]
        doubled = {up: double(up.conv.weight) for up in ups}
        seen = []

        def suits(maps, times=1):
            seen.append(maps.shape[2] * maps.shape[3] * times**2 >= least)
            return seen[-1]

        monkeypatch.setattr(quick, "suits", suits)
        monkeypatch.setattr(convolving, "TILE", 64)
        found = quick.encode(network, images), quick.decode(network, features, doubled)
    assert any(seen)
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)


INTERPRETED = """
import pytest
from sandbox_plugins.autoencoders import convolving, leaving, norms
from test_strips import *

torch.manual_seed(0)
convolving.TILE, convolving.MANY, leaving.TILE, leaving.GATHERED = 32, 0, 32, 64
with pytest.MonkeyPatch.context() as monkeypatch:
    {check}
print("agreed")
"""
CHECKS = {
    "each by itself, with programs side by side": """
    monkeypatch.setattr(convolving, "PARTS", {32: (16, 16)})
    monkeypatch.setattr(norms, "SHARES", 3)
    monkeypatch.setattr(norms, "TILE", 256)
    check_strips([(2, 32, 64, 2, 4)])""",
    "in 16 bits": "check_strips([(1, 32, 96, 2, 3)], torch.float16)",
    "both halves": "check_halves(monkeypatch, 24)",
}


@pytest.mark.parametrize("check", CHECKS)
def test_interpreted_the_kernels_agree(check):
    pytest.importorskip("triton", reason="triton is not there on this platform")
    code = INTERPRETED.format(check=CHECKS[check])
    assert python(code, TRITON_INTERPRET="1", PYTHONWARNINGS="ignore") == "agreed\n"


def test_on_a_cpu_no_map_is_a_strip():
    pytest.importorskip("triton", reason="triton is not there on this platform")
    from sandbox_plugins.autoencoders.convolving import suits

    assert not suits(torch.zeros(1, 1, 256, 256))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_on_a_gpu_the_kernels_agree(dtype, monkeypatch):
    from sandbox_plugins.autoencoders.convolving import suits

    torch.manual_seed(0)
    device = torch.device("cuda")
    with float32_products(device, "tf32"):
        if not suits(torch.zeros(1, 1, 256, 256, device=device, dtype=dtype)):
            pytest.skip("this GPU does not copy tiles by itself")
        widths = [(32, 32), (96, 192), (64, 256), (160, 160), (320, 160)]
        check_strips([(2, d, e, 33, 31) for d, e in widths], dtype, device)
        check_strips([(3, 160, 160, 128, 136), (1, 32, 128, 256, 256)], dtype, device)
        if dtype == torch.float32:
            check_halves(monkeypatch, 1, device)
    with float32_products(device, "ieee"):
        exact = dtype == torch.float32
        assert suits(torch.zeros(1, 1, 256, 256, device=device, dtype=dtype)) is not exact
