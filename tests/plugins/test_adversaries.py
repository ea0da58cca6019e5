"""Adversaries: losses against their formulas, bounds of the weight, and what is augmented how."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import sandbox
from sandbox.testing import settle
from sandbox_plugins.adversaries.augment import draw_policy
from sandbox_plugins.adversaries.duel import Discriminator, Duel, DuelParams, Verdict


@pytest.fixture
def build(registry):
    def make(name, size=(32, 32), **settings):
        cls = registry.find(sandbox.Adversary, name)
        torch.manual_seed(0)
        return cls(settle(cls, registry, settings), size)

    return make


def images(seed, size=(32, 32), count=4):
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, *size, generator=rng) * 2 - 1


class Levels(Discriminator):
    """The logit of an image is its mean, its only feature the image."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images):
        return Verdict(self.scale * images.mean(dim=(2, 3)), [self.scale * images])


def levels(**settings):
    return Duel(DuelParams(**({"start": 0.0, "augment": (), "lecam": 0.0} | settings)), Levels())


FAKE, REAL = torch.full((2, 3, 4, 4), 0.25), torch.full((2, 3, 4, 4), 0.5)


def test_the_hinge_and_its_other_side():
    duel = levels()
    judged = duel.discriminate(FAKE, REAL, 0.5)
    assert judged.total.item() == pytest.approx(((1 + 0.25) + (1 - 0.5)) / 2)
    found = {name: value.item() for name, value in judged.parts.items()}
    assert found == pytest.approx({"loss": 0.875, "real": 0.5, "fake": 0.25})
    deceived = duel.deceive(FAKE, REAL, 0.5)
    assert deceived.total.item() == pytest.approx(-0.25)
    assert set(deceived.parts) == {"adversary"}
    sure = duel.discriminate(FAKE - 2, REAL + 2, 0.5)
    assert sure.total.item() == 0.0


def test_feature_matching_is_the_distance_of_features():
    duel = levels(feature_matching=3.0)
    deceived = duel.deceive(FAKE, REAL, 0.5)
    assert deceived.parts["feature_matching"].item() == pytest.approx(0.25)
    assert deceived.total.item() == pytest.approx(-0.25 + 3 * 0.25)
    assert duel.deceive(REAL, REAL, 0.5).parts["feature_matching"].item() == 0.0


def test_lecam_pulls_either_side_to_the_running_mean_of_the_other():
    duel = levels(lecam=2.0, lecam_decay=0.75)
    judged = duel.discriminate(FAKE, REAL, 0.5)
    mean_real, mean_fake = 0.25 * 0.5, 0.25 * 0.25
    assert duel.network.mean_real.item() == pytest.approx(mean_real)
    assert duel.network.mean_fake.item() == pytest.approx(mean_fake)
    pull = (0.5 - mean_fake) ** 2 + (0.25 - mean_real) ** 2
    assert judged.parts["lecam"].item() == pytest.approx(pull)
    assert judged.total.item() == pytest.approx(0.875 + 2 * pull)
    for _ in range(60):
        duel.discriminate(FAKE, REAL, 0.5)
    assert duel.network.mean_real.item() == pytest.approx(0.5, abs=1e-4)
    assert {"mean_real", "mean_fake"} <= set(duel.network.state_dict())


def test_nothing_happens_before_it_begins():
    duel = levels(start=0.4)
    assert [duel.begins(progress) for progress in (0.0, 0.39, 0.4, 1.0)] == [
        False,
        False,
        True,
        True,
    ]
    for losses in (duel.deceive, duel.discriminate):
        assert losses(FAKE, REAL, 0.39).total.item() == 0.0
        assert losses(FAKE, REAL, 0.4).total.item() != 0.0


def test_the_weight_is_the_ratio_of_gradients_ramped_and_bounded():
    duel = levels(start=0.4, ramp=0.2, weight=0.5, max_weight=2.0)
    ones = torch.ones(2, 3, 4, 4)
    weights = [duel.weight(ones, 4 * ones, p).item() for p in (0.3, 0.4, 0.5, 0.6, 1.0)]
    assert weights == pytest.approx([0, 0, 0.5 * 0.25 * 0.5, 0.5 * 0.25, 0.5 * 0.25])
    assert duel.weight(ones, 1e-3 * ones, 1.0).item() == pytest.approx(0.5 * 2.0)
    assert duel.weight(ones, 0 * ones, 1.0).item() == pytest.approx(0.5 * 2.0)
    assert duel.weight(0 * ones, 0 * ones, 1.0).item() == 0.0
    tiny = duel.weight(1e-8 * ones, 4e-8 * ones, 1.0).item()  # lengths fall with the pixels
    assert tiny == pytest.approx(0.5 * 0.25, rel=1e-3)
    fixed = levels(start=0.4, ramp=0.2, weight=0.5, adaptive=False)
    assert [fixed.weight(ones, 4 * ones, p).item() for p in (0.5, 1.0)] == [0.25, 0.5]
    assert levels(start=0.4, ramp=0.0).weight(ones, ones, 0.4).item() == pytest.approx(0.4)


@pytest.mark.parametrize("wanted", [["color"], ["translation"], ["cutout"]])
def test_each_augmentation_is_one_draw_for_both_sides(wanted):
    torch.manual_seed(3)
    one, other = images(0, (16, 24)), images(1, (16, 24))
    policy = draw_policy(one, wanted)
    changed = policy(one)
    assert changed.shape == one.shape and not torch.equal(changed, one)
    assert torch.equal(policy(one), changed)
    gap = policy(one) - policy(other)  # all three are linear, but for brightness, which cancels
    assert torch.allclose(gap, policy(one - other) - policy(torch.zeros_like(one)), atol=1e-5)
    again = draw_policy(one, wanted)(one)
    assert not torch.equal(again, changed)
    torch.manual_seed(3)
    assert torch.equal(draw_policy(one, wanted)(one), changed)


def test_translation_moves_pixels_and_fills_with_grey():
    torch.manual_seed(0)
    spots = torch.zeros(64, 3, 16, 16)
    spots[:, :, 8, 8] = 1
    found = draw_policy(spots, ["translation"])(spots)
    assert (found.sum(dim=(2, 3)) == 1).all()
    rows, columns = found[:, 0].amax(2).argmax(1) - 8, found[:, 0].amax(1).argmax(1) - 8
    for moves in (rows, columns):
        assert set(moves.tolist()) == {-2, -1, 0, 1, 2}
    corner = torch.ones(64, 3, 16, 16, requires_grad=True)
    moved = draw_policy(corner, ["translation"])(corner)
    lost = (moved == 0).flatten(1).float().mean(1)
    assert 0 < lost.max() <= 1 - (14 / 16) ** 2
    moved.sum().backward()
    assert set(corner.grad.unique().tolist()) == {0.0, 1.0}


def test_cutout_greys_a_square_of_half_the_side():
    torch.manual_seed(0)
    ones = torch.ones(256, 3, 16, 16)
    hidden = (draw_policy(ones, ["cutout"])(ones) == 0).flatten(1).float().mean(1)
    assert hidden.max() == 0.25 and hidden.min() == 0.0625 and 0.12 < hidden.mean() < 0.22


def test_no_augmentation_changes_nothing():
    assert torch.equal(draw_policy(images(0), [])(images(0)), images(0))


def learns_to_tell(adversary, steps, rate):
    """Train D on smooth reconstructions of noisy images; the means of its logits at the end."""
    optimizer = torch.optim.AdamW(adversary.network.parameters(), lr=rate, betas=(0.5, 0.9))
    for step in range(steps):
        real = images(step, count=8)
        fake = nn.functional.avg_pool2d(real, 3, stride=1, padding=1)
        losses = adversary.discriminate(fake, real, 1.0)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    return fake, real, losses.parts


@pytest.mark.parametrize("norm", ["spectral", "group"])
def test_patchgan_learns_to_tell_and_teaches_the_reconstruction(build, norm):
    adversary = build("patchgan", channels=16, norm=norm)
    fake, real, parts = learns_to_tell(adversary, 40, 3e-3)
    assert parts["real"] > parts["fake"] + 0.5
    moved = fake.clone().requires_grad_()
    before = adversary.deceive(moved, real, 1.0)
    (gradient,) = torch.autograd.grad(before.total, moved)
    torch.manual_seed(1)
    old = adversary.deceive(fake, real, 1.0).total
    torch.manual_seed(1)
    new = adversary.deceive(fake - 30 * gradient, real, 1.0).total
    assert new < old


def test_patchgan_has_the_receptive_field_it_states(build):
    network = build("patchgan", size=(64, 64), channels=8, augment=[]).network
    spot = images(0, (64, 64), 1).requires_grad_()
    logits = network(spot).logits
    assert logits.shape == (1, 15 * 15)
    (gradient,) = torch.autograd.grad(logits[0, 7 * 15 + 7], spot)
    seen = gradient.abs().sum((0, 1)) > 0
    assert seen.any(0).sum() == seen.any(1).sum() == 22


def test_patchgan_refuses_images_that_are_too_small(build):
    assert build("patchgan", size=(8, 8), channels=8).network(images(0, (8, 8))).logits.ndim == 2
    with pytest.raises(ValueError, match="need images of at least 8 px, these have 16 x 7"):
        build("patchgan", size=(16, 7))


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vit") / "vit.safetensors"
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), path)
    return path


SMALL = {"model": "test_vit", "depths": [1, 4], "input_px": 64, "channels": 16}


def test_dino_trains_its_heads_alone(build, vit):
    adversary = build("dino", weights=str(vit), **SMALL, start=0.0)
    network = adversary.network.train()
    frozen = {k: v.clone() for k, v in network.transformer.state_dict().items()}
    assert not any(module.training for module in network.transformer.modules())
    trained = {name.split(".")[0] for name, p in network.named_parameters() if p.requires_grad}
    assert trained == {"heads"}
    learns_to_tell(adversary, 3, 1e-2)
    assert all(torch.equal(v, frozen[k]) for k, v in network.transformer.state_dict().items())


def test_dino_sees_images_at_its_own_size(build, vit):
    verdict = build("dino", weights=str(vit), **SMALL).network(images(0))
    assert verdict.logits.shape == (4, 2 * 4 * 4)
    wide = build("dino", size=(16, 24), weights=str(vit), **SMALL).network(images(0, (16, 24)))
    assert wide.logits.shape == (4, 2 * 4 * 6)
    assert [tuple(each.shape) for each in wide.features] == [(4, 64, 4, 6)] * 2


def test_dino_reads_facebooks_names_and_drops_heads(build, vit, tmp_path):
    state = {f"module.backbone.{k}": v for k, v in sandbox.read_tensors(vit)[0].items()}
    torch.save(state | {"module.head.mlp.0.weight": torch.zeros(2)}, tmp_path / "teacher.pth")
    ours = build("dino", weights=str(tmp_path / "teacher.pth"), **SMALL).network(images(0))
    assert torch.equal(
        ours.logits, build("dino", weights=str(vit), **SMALL).network(images(0)).logits
    )


def test_the_default_is_dinos_own_architecture(build, vit):
    with pytest.raises(sandbox.SandboxError, match=r"'dino': weights: .* does not fit") as caught:
        build("dino", weights=str(vit))
    assert "transformer.blocks.6" in str(caught.value) or "(1, 197, 384) here" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"weights": "gone.pth"}, r"'dino': weights: gone.pth: no such file; set it to dino_deit"),
        (
            {"weights": "x", "model": "test_vitt"},
            "timm has no plain vision transformer 'test_vitt'",
        ),
        ({"weights": "x", "model": "resnet18"}, "no plain vision transformer 'resnet18'"),
        ({"weights": "x", **SMALL, "input_px": 40}, "input_px 40 is no multiple of the patch, 16"),
        ({"weights": "x", **SMALL, "depths": [1, 6]}, r"numbers from 0 to 5, got \(1, 6\)"),
        ({"weights": "x", **SMALL, "depths": [4, 1]}, r"rising numbers .* got \(4, 1\)"),
    ],
)
def test_dino_refusals(build, settings, says):
    with pytest.raises((ValueError, sandbox.SandboxError), match=says):
        build("dino", **settings)


def test_dino_without_weights_is_refused(build):
    with pytest.raises(AssertionError, match="weights: Field required"):
        build("dino")
