from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import python
from torch.nn import functional as F

from sandbox import Autoencoder, exact_float32, rendering
from sandbox_plugins.autoencoders import CNN, Patch, layers


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


@given(
    ch_mult=st.lists(st.integers(1, 2), min_size=1, max_size=3).map(tuple),
    height=st.integers(1, 3),
    width=st.integers(1, 3),
    attention=st.booleans(),
)
def test_the_cnn_shrinks_by_its_number_of_resolutions_and_back(ch_mult, height, width, attention):
    params = CNN.Params(ch=32, ch_mult=ch_mult, num_res_blocks=1, attention=attention, code_dim=5)
    cnn = CNN(params)
    assert isinstance(cnn, Autoencoder)
    assert cnn.downsample == 2 ** (len(ch_mult) - 1)
    images = torch.randn(2, 3, height * cnn.downsample, width * cnn.downsample)
    features = cnn.encode(images)
    assert features.shape == (2, 5, height, width)
    assert cnn.decode(features).shape == images.shape
    assert any(".attn" in name for name in cnn.state_dict()) == attention


def test_channels_that_do_not_split_into_groups_are_refused():
    with pytest.raises(ValueError, match="ch must be a multiple of 32"):
        CNN.Params(ch=48)
    with pytest.raises(ValueError, match="each 1 or more"):
        CNN.Params(ch_mult=(1, 0))


def test_the_cnn_drops_out_in_training_only():
    cnn = CNN(CNN.Params(ch=32, ch_mult=(1,), code_dim=4, dropout=0.5))
    images = torch.randn(1, 3, 4, 4)
    assert not torch.equal(cnn.encode(images), cnn.encode(images))
    cnn.eval()
    torch.testing.assert_close(cnn.encode(images), cnn.encode(images), rtol=0, atol=0)


def test_the_patch_autoencoder_is_small_and_keeps_any_size():
    patch = Patch(Patch.Params())
    assert isinstance(patch, Autoencoder)
    assert sum(p.numel() for p in patch.parameters()) == 125_496
    features = patch.encode(torch.randn(2, 3, 8, 20))
    assert features.shape == (2, 8, 2, 5)
    assert patch.decode(features).shape == (2, 3, 8, 20)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler itself looks
@pytest.mark.parametrize("autocast", [False, True])
def test_what_is_compiled_computes_the_same(autocast):
    torch.manual_seed(0)
    plain = CNN(CNN.Params(ch=32, ch_mult=(1, 2), num_res_blocks=1, code_dim=4))
    plain = plain.to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 8, 12, requires_grad=True)

    def both(encode, decode):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            made = decode(encode(images)).float()
        return made, torch.autograd.grad(made.square().mean(), [images, *plain.parameters()])

    compiled = (torch.compile(f, backend="eager") for f in (plain.encode, plain.decode))
    (made, gradients), (wanted, exact) = both(*compiled), both(plain.encode, plain.decode)
    tolerance = {"atol": 0.1, "rtol": 0.1} if autocast else {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(made, wanted, **tolerance)
    for found, gradient in zip(gradients, exact, strict=True):
        torch.testing.assert_close(found, gradient, **tolerance)


@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_a_map_is_convolved_as_if_doubled(height, width, dtype):
    torch.manual_seed(0)
    x, bias = torch.randn(2, 6, height, width, dtype=dtype), torch.randn(5, dtype=dtype)
    weight = torch.randn(5, 6, 3, 3, dtype=dtype)
    plain = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)
    found = layers.doubled_conv(x, weight, bias)
    assert found.dtype == dtype
    close = 1e-5 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(found, plain, rtol=close, atol=10 * close)


def parities(b, e, height, width, dtype=torch.float32, device="cpu"):
    """Channels together, as convolutions of channels-last maps leave them."""
    numbers = torch.randn(b, height + 1, width + 1, 4 * e, device=device)
    return numbers.to(dtype).permute(0, 3, 1, 2)


def test_interleaving_is_a_sound_operator():
    torch.library.opcheck(layers.interleaved, (parities(2, 3, 4, 1),))
    made = layers.interleaved(parities(2, 3, 4, 1))
    assert made.is_contiguous(memory_format=torch.channels_last)


INTERPRETED = """
import torch
from sandbox_plugins.autoencoders import interleaving, layers
from test_autoencoders import parities

interleaving.BLOCK = 32
for sizes in [(1, 1, 1, 1), (2, 5, 3, 4), (3, 32, 2, 1)]:
    for parts in (parities(*sizes), parities(*sizes).contiguous(), parities(*sizes).half()):
        found, plain = interleaving.interleave(parts), layers.interleaved(parts)
        assert torch.equal(found, plain) and found.stride() == plain.stride()
print("agreed")
"""


def test_interpreted_the_kernel_interleaves():
    pytest.importorskip("triton", reason="triton is not there on this platform")
    assert python(INTERPRETED, TRITON_INTERPRET="1") == "agreed\n"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_interleaves(dtype):
    for sizes in [(1, 1, 1, 1), (2, 5, 3, 4), (3, 160, 17, 16), (6, 160, 128, 128)]:
        parts = parities(*sizes, dtype)
        found = layers.interleaved(parts.cuda())
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(found.cpu(), layers.interleaved(parts))
    torch.library.opcheck(layers.interleaved, (parities(2, 32, 3, 4, dtype, "cuda"),))


def test_weights_of_16_bits_are_summed_in_float32_and_rounded_once():
    weight = torch.ones(1, 1, 3, 3, dtype=torch.bfloat16)
    weight[0, 0, 1:, 1:] = torch.tensor([[1, 2**-8], [2**-8, 0]])  # of which bfloat16 loses each
    x = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    found = layers.doubled_conv(x, weight, torch.zeros(1, dtype=torch.bfloat16))
    assert found[0, 0, 0, 0] == 1 + 2**-7


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_decoder_draws_as_nearly_as_it_decodes_in_16_bits(device, monkeypatch):
    if device == "cpu":  # the kernels of a GPU are what is tested there, what they compute here
        monkeypatch.setattr(layers, "_drawing", lambda x: torch.compiler.is_compiling())
        images = torch.compile(rendering._images, backend="aot_eager")
        monkeypatch.setattr(rendering, "fused_images", lambda: images)
    cnn = CNN(CNN.Params(ch=32, ch_mult=(1, 2, 2), num_res_blocks=1, code_dim=4)).to(device)
    features = torch.randn(4, 4, 3, 5, device=device)
    plain, fused = (
        partial(rendering.render, cnn.eval(), features, fused=on) for on in (False, True)
    )
    with torch.no_grad():
        with exact_float32(features.device):
            exact = plain()
        with torch.autocast(device, torch.bfloat16):
            coarse = plain()
    with monkeypatch.context() as undoubled:
        undoubled.setattr(layers, "_doubled", None)
        with exact_float32(features.device):
            same = fused()
        with torch.autocast(device, torch.bfloat16):
            near = fused()
    torch.testing.assert_close(same, exact, rtol=1e-4, atol=1e-4)
    assert 0 < (near - exact).norm() < 1.5 * (coarse - exact).norm()


def test_what_is_drawn_keeps_the_order_in_memory(monkeypatch):
    up = layers.Upsample(32).to(memory_format=torch.channels_last)
    x = torch.randn(2, 32, 4, 6).to(memory_format=torch.channels_last)
    block = layers.ResBlock(32, 32, 0.0).to(memory_format=torch.channels_last)
    monkeypatch.setattr(layers, "_drawing", lambda x: torch.compiler.is_compiling())
    with torch.no_grad():
        drawn = torch.compile(lambda x: block(up(x)), backend="aot_eager")(x)
        plain = block(up(x))
    torch.testing.assert_close(drawn, plain, rtol=1e-4, atol=1e-5)
    assert drawn.stride() == plain.stride() and drawn.stride(1) == 1
