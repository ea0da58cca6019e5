import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sandbox import Autoencoder
from sandbox_plugins.autoencoders import CNN, Patch


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
