"""Image losses: against the reference code, on weights of our own making; refusals in one line."""

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torchmetrics.functional.image.lpips import _LPIPS

import sandbox
from sandbox.testing import settle
from sandbox_plugins.features import Classifier

CHANNELS = {"vgg16": "vgg", "alexnet": "alex"}


@pytest.fixture
def build(registry):
    def make(name, **settings):
        cls = registry.find(sandbox.ImageLoss, name)
        return cls(settle(cls, registry, settings))

    return make


def images(seed, size=(32, 32), count=2):
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, *size, generator=rng) * 2 - 1


def features_of(name):
    if name == "vgg16":
        return torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    return torchvision.models.alexnet().features


@pytest.fixture(scope="module")
def alexnet(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("alexnet") / "alexnet.pth"
    torch.save(features_of("alexnet").state_dict(), path)
    return path


@pytest.mark.parametrize(("name", "error"), [("l1", 0.5), ("l2", 0.25)])
def test_pixel_losses_are_means_times_their_weight(build, name, error):
    zeros = torch.zeros(2, 3, 4, 4)
    assert build(name).loss(zeros + 0.5, zeros).item() == pytest.approx(error)
    assert build(name, weight=3).loss(zeros + 0.5, zeros).item() == pytest.approx(3 * error)


@pytest.mark.parametrize("network", ["vgg16", "alexnet"])
def test_lpips_is_that_of_torchmetrics(build, tmp_path, network):
    torch.manual_seed(1)
    features = features_of(network)
    save_file(features.state_dict(), tmp_path / "backbone.safetensors")
    with torch.device("meta"):
        reference = _LPIPS(pretrained=False, net=CHANNELS[network], pnet_rand=True)
    slices = [getattr(reference.net, f"slice{number}") for number in range(1, 6)]
    for index, layer in enumerate(layer for each in slices for layer in each):
        if isinstance(layer, nn.Conv2d):
            layer.load_state_dict(features[index].state_dict(), assign=True)
    for part in ("shift", "scale"):
        value = torch.tensor([[-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]][part == "scale"])
        setattr(reference.scaling_layer, part, value[None, :, None, None])
    heads = sandbox_heads(network)
    reference.load_state_dict(heads, strict=False, assign=True)
    ours = build("lpips", network=network, weights=str(tmp_path / "backbone.safetensors"))
    one, other = images(0, (64, 48)), images(1, (64, 48)).requires_grad_()
    wanted, found = reference(other, one).mean(), ours.loss(other, one)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5) and found > 1e-3
    (expected,) = torch.autograd.grad(wanted, other)
    (gradient,) = torch.autograd.grad(found, other)
    assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-8)


def sandbox_heads(network):
    import torchmetrics.functional.image.lpips as home

    path = f"{home.__file__.rpartition('/')[0]}/lpips_models/{CHANNELS[network]}.pth"
    return torch.load(path, map_location="cpu", weights_only=True)


def test_lpips_takes_a_whole_network_too(build, alexnet, tmp_path):
    state = {f"features.{k}": tensor for k, tensor in torch.load(alexnet).items()}
    torch.save(state | {"classifier.1.weight": torch.zeros(2)}, tmp_path / "whole.pth")
    whole = build("lpips", network="alexnet", weights=str(tmp_path / "whole.pth"))
    part = build("lpips", network="alexnet", weights=str(alexnet))
    assert torch.equal(whole.loss(images(0), images(1)), part.loss(images(0), images(1)))


def test_lpips_has_gradients_at_equal_and_at_black_images(build, alexnet):
    lpips = build("lpips", network="alexnet", weights=str(alexnet), weight=0.5)
    for one in (images(0), -torch.ones(2, 3, 32, 32)):
        one = one.requires_grad_()
        lpips.loss(one, one.detach()).backward()
        assert torch.equal(one.grad, torch.zeros_like(one.grad))


def test_lpips_without_weights_is_refused(build, tmp_path):
    with pytest.raises(AssertionError, match="weights: Field required"):
        build("lpips")
    with pytest.raises(
        sandbox.SandboxError, match=r"'lpips': weights: gone\.pth: no weights there"
    ):
        build("lpips", weights="gone.pth")
    with pytest.raises(sandbox.SandboxError, match="no weights there"):
        build("lpips", weights=str(tmp_path))


def test_weights_of_another_network_are_refused(build, alexnet):
    with pytest.raises(sandbox.SandboxError, match=r"'lpips': weights: .*\.pth does not fit"):
        build("lpips", network="vgg16", weights=str(alexnet))


def test_what_reads_features_stays_frozen(build, alexnet):
    for loss in (
        build("lpips", network="alexnet", weights=str(alexnet)),
        build("perceptual", features="random"),
    ):
        getattr(loss, "prepare", lambda *_: None)((32, 32), 3)
        loss.train()
        assert not any(module.training for module in loss.modules())
        assert not any(parameter.requires_grad for parameter in loss.parameters())
        assert list(loss.parameters())


@pytest.fixture
def trained(tmp_path):
    """A run folder with a classifier whose batch statistics are not the initial ones."""
    torch.manual_seed(2)
    network = Classifier(Classifier.Params(width=4), (16, 16), 5).network.train()
    network(images(3, (16, 16), 16))
    (tmp_path / "run" / "weights").mkdir(parents=True)
    save_file(network.state_dict(), tmp_path / "run" / "weights" / "features.safetensors")
    return tmp_path / "run", network.eval()


def test_perceptual_reads_the_classifier_of_a_run(build, trained):
    folder, network = trained
    loss = build("perceptual", features={"name": "classifier", "width": 4}, weights=str(folder))
    loss.prepare((16, 16), 5)
    one, other = images(0, (16, 16)), images(1, (16, 16))
    with torch.no_grad():
        pairs = [network.forward_intermediates(x, intermediates_only=True) for x in (one, other)]
        wanted = 0.0
        for a, b in zip(*pairs, strict=True):
            gap = nn.functional.normalize(a, dim=1) - nn.functional.normalize(b, dim=1)
            wanted = wanted + gap.square().sum(1).mean()
    assert loss.loss(other, one).item() == pytest.approx(wanted.item(), rel=1e-4)


def test_logits_count_where_they_have_a_weight(build, trained):
    folder, network = trained
    settings = {"features": {"name": "classifier", "width": 4}, "weights": str(folder), "weight": 2}
    one, other = images(0, (16, 16)), images(1, (16, 16)).requires_grad_()
    found = []
    for logits_weight in (0.0, 0.5):
        loss = build("perceptual", **settings, logits_weight=logits_weight)
        loss.prepare((16, 16), 5)
        found.append(loss.loss(other, one))
    error = nn.functional.mse_loss(network(other), network(one))
    assert (found[1] - found[0]).item() == pytest.approx(2 * 0.5 * error.item(), rel=1e-3)
    found[1].backward()
    assert other.grad.abs().sum() > 0


def test_random_features_see_every_layer_and_their_logits(build):
    loss = build("perceptual", features={"name": "random", "width": 8}, logits_weight=1.0)
    loss.prepare((16, 16), 3)
    last, maps = loss.network.forward_intermediates(images(0, (16, 16)))
    assert [tuple(each.shape[1:]) for each in maps] == [(8, 8, 8), (8, 4, 4), (8, 2, 2)]
    assert torch.equal(last, maps[-1])
    assert torch.equal(loss.network.forward_head(last), loss.network(images(0, (16, 16)))[1])
    network = loss.network
    loss.prepare((16, 16), 3)
    assert loss.network is network


def test_perceptual_refusals(build, trained, tmp_path):
    with pytest.raises(AssertionError, match="mean nothing without weights: set `weights`"):
        build("perceptual")
    with pytest.raises(ValueError, match="call prepare"):
        build("perceptual", features="random").loss(images(0), images(1))
    folder, _ = trained
    other = build("perceptual", features={"name": "classifier", "width": 8}, weights=str(folder))
    with pytest.raises(sandbox.SandboxError, match=r"'perceptual': weights: .* does not fit"):
        other.prepare((16, 16), 5)
    gone = build("perceptual", features="classifier", weights=str(tmp_path))
    with pytest.raises(sandbox.SandboxError, match="folder of a run that has trained a classifier"):
        gone.prepare((16, 16), 5)
    flat = build("perceptual", features="inception", weights=str(folder))
    with pytest.raises(sandbox.SandboxError, match="'inception' has no forward_intermediates"):
        flat.prepare((16, 16), 5)


@pytest.mark.gpu
def test_losses_of_features_never_wait_for_the_gpu(build, alexnet):
    lpips = build("lpips", network="alexnet", weights=str(alexnet))
    perceptual = build("perceptual", features="random", logits_weight=1.0)
    perceptual.prepare((32, 32), 3)
    one, other = images(0).cuda(), images(1).cuda().requires_grad_()
    for loss in (lpips.cuda(), perceptual.cuda()):
        try:
            for turn in range(3):
                torch.cuda.set_sync_debug_mode("error" if turn else "default")
                with torch.autocast("cuda", torch.bfloat16):
                    found = loss.loss(other, one)
                found.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert found.dtype == torch.float32 and other.grad.isfinite().all()
