"""The autoencoder `cnn` by kernels of its own: what it computes, and when it does so."""

from functools import partial

import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from processes import python
from torch.nn import functional as F

from sandbox import exact_float32, rendering
from sandbox_plugins.autoencoders import CNN, cnn
from sandbox_plugins.autoencoders.doubling import double
from sandbox_plugins.autoencoders.layers import normalisation

TOGETHER = {"memory_format": torch.channels_last}
PARAMS = CNN.Params(ch=32, ch_mult=(1, 2), num_res_blocks=1, code_dim=4)


def together(*shape, offset=0.0, dtype=torch.float32, device="cpu"):
    return (torch.randn(*shape) + offset).to(device, dtype).contiguous(**TOGETHER)


def interleaved(parts):
    """The doubled map of its four parities `b (2 2 e) h w`, as `interleaving.interleave` has it."""
    whole = rearrange(parts, "b (p q e) h w -> b e (h p) (w q)", p=2, q=2)
    return whole[:, :, 1:-1, 1:-1].contiguous(**TOGETHER)


def awake(seed=0):
    """A network whose biases and scales are not those of a start."""
    torch.manual_seed(seed)
    network = CNN(PARAMS).requires_grad_(False).eval()
    for parameter in network.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network


@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_a_map_is_convolved_as_if_doubled(height, width, dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 6, height, width, dtype=dtype), torch.randn(5, 6, 3, 3, dtype=dtype)
    plain = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, padding=1)
    found = interleaved(F.conv2d(x, double(weight), padding=1))
    close = 1e-5 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(found, plain, rtol=close, atol=10 * close)


def test_weights_of_16_bits_are_summed_in_float32_and_rounded_once():
    weight = torch.ones(1, 1, 3, 3, dtype=torch.bfloat16)
    weight[0, 0, 1:, 1:] = torch.tensor([[1, 2**-8], [2**-8, 0]])  # of which bfloat16 loses each
    assert double(weight)[3, 0, 1, 1] == 1 + 2**-7


def check_interleaving(sizes, dtypes=(torch.float32, torch.float16), device="cpu"):
    from sandbox_plugins.autoencoders.interleaving import interleave

    for b, e, h, w in sizes:
        for dtype in dtypes:
            parts = torch.randn(b, 4 * e, h + 1, w + 1, device=device).to(dtype)
            for given_as in (parts, parts.contiguous(**TOGETHER)):
                found, plain = interleave(given_as), interleaved(parts)
                assert torch.equal(found, plain) and found.stride() == plain.stride()


def check_norms(sizes, dtype=torch.float32, device="cpu", tolerance=2e-4):
    """Against float64, with every kind of sum."""
    from sandbox_plugins.autoencoders.norms import Sum, added, normed

    for b, d, h, w in sizes:
        norm = normalisation(d).to(device)
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
        like = {"dtype": dtype, "device": device}
        x, y = together(b, d, h, w, offset=5, **like), together(b, d, h, w, **like)
        biases = torch.randn(2, d, device=device).to(dtype)
        kinds = [(x,), (x, biases[0]), (x, None, y, biases[1]), (x, biases[0], y, biases[1])]
        for silu, kind in enumerate(kinds):
            terms = Sum(*kind)
            wanted = sum(
                each.double() if each.ndim == 4 else each.double()[:, None, None]
                for each in kind
                if each is not None
            )
            close = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
            close(added(terms).double(), wanted)
            padded = added(terms, pad=True)
            close(padded.double(), F.pad(wanted, (0, 1, 0, 1)))
            assert padded.is_contiguous(**TOGETHER)
            total, found = normed(terms, norm, silu=bool(silu % 2))
            assert total.second is None and found.is_contiguous(**TOGETHER)
            close(added(total).double(), wanted)
            weights = norm.weight.double(), norm.bias.double()
            wanted = F.group_norm(added(total).double(), 32, *weights, norm.eps)
            close(found.double(), F.silu(wanted) if silu % 2 else wanted)
    with pytest.raises(ValueError, match="channels together"):
        added(Sum(torch.zeros(1, 32, 2, 3, **{**like, "dtype": dtype})))


def check_halves(device="cpu"):
    from sandbox_plugins.autoencoders import quick

    network = awake().to(device)
    images = torch.randn(1, 3, 6, 10, device=device)
    features = torch.randn(1, 4, 3, 5, device=device)
    with torch.no_grad():
        wanted = network.encode(images), network.decode(features)
        network.to(**TOGETHER)
        ups = [each for each in network.modules() if isinstance(each, cnn.Upsample)]
        doubled = {up: double(up.conv.weight) for up in ups}
        found = quick.encode(network, images), quick.decode(network, features, doubled)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


INTERPRETED = """
from sandbox_plugins.autoencoders import norms
from test_quick_autoencoder import *

torch.manual_seed(0)
{check}
print("agreed")
"""
CHECKS = {
    "interleaving": """
from sandbox_plugins.autoencoders import interleaving
interleaving.BLOCK = 32
check_interleaving([(1, 1, 1, 1), (2, 5, 3, 4), (3, 32, 2, 1)])""",
    "groups that a program holds": "check_norms([(1, 96, 3, 5)])",
    "groups that many programs share": """
norms.HELD, norms.TILE, norms.SHARES = 0, 1024, 2
check_norms([(2, 96, 5, 3)])""",
    "both halves": "check_halves()",
}


@pytest.mark.parametrize("check", CHECKS)
def test_interpreted_the_kernels_agree(check):
    pytest.importorskip("triton", reason="triton is not there on this platform")
    code = INTERPRETED.format(check=CHECKS[check])
    assert python(code, TRITON_INTERPRET="1", PYTHONWARNINGS="ignore") == "agreed\n"


def test_without_a_gpu_there_is_nothing_to_quicken():
    network = awake()
    assert network.quicken() is False
    assert rendering.quickened(network, torch.device("cpu")) is None


def test_what_trains_runs_plainly():
    network, features, images = awake(), torch.randn(1, 4, 2, 2), torch.randn(1, 3, 4, 4)
    plain = network.decode(features), network.encode(images)
    network._doubled = {}  # as in a copy that was quickened
    network.train()
    assert torch.equal(network.decode(features), plain[0])
    assert torch.equal(network.encode(images), plain[1])


@pytest.mark.gpu
def test_on_a_gpu_the_kernels_agree():
    torch.manual_seed(0)
    sizes = [(1, 1, 1, 1), (2, 5, 3, 4), (3, 160, 17, 16), (6, 160, 128, 128)]
    check_interleaving(sizes, (torch.float32, torch.bfloat16), "cuda")
    sizes = [(2, 160, 3, 5), (3, 640, 16, 16), (1, 160, 96, 80), (2, 320, 33, 31), (70, 64, 64, 64)]
    check_norms(sizes, device="cuda")
    check_norms(sizes, torch.bfloat16, "cuda", 0.06)
    with exact_float32(torch.device("cuda")):
        check_halves("cuda")


@pytest.mark.gpu
def test_a_gpu_draws_as_nearly_as_it_decodes_in_16_bits():
    network = awake().cuda()
    features = torch.randn(4, 4, 3, 5, device="cuda")
    plain, quick = (partial(rendering.render, network, features, fused=on) for on in (False, True))
    with torch.no_grad():
        with exact_float32(features.device):
            exact, same = plain(), quick()
        with torch.autocast("cuda", torch.bfloat16):
            coarse, near = plain(), quick()
    assert all(copy.quick for copy in rendering._copies[network].values())
    torch.testing.assert_close(same, exact, rtol=1e-4, atol=1e-4)
    assert 0 < (near - exact).norm() < 1.5 * (coarse - exact).norm()


@pytest.mark.gpu
def test_new_weights_are_drawn_with():
    network, features = awake().cuda(), torch.randn(2, 4, 3, 5, device="cuda")
    before = rendering.render(network, features, fused=True)
    network.load_state_dict(awake(1).state_dict())
    with exact_float32(features.device):
        found, wanted = (rendering.render(network, features, fused=on) for on in (True, False))
    assert not torch.allclose(found, before, atol=1e-2)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
