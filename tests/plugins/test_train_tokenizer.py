"""Training a tokenizer: the gradient with an adversary, the start of the codes, and resuming."""

import json
import os
import subprocess
import sys

import pluggy
import pytest
import torch
from torch import nn

import sandbox
from sandbox.recipe import load_recipe
from sandbox.run import execute
from sandbox.testing import settle
from sandbox_plugins.tasks.contest import Contest
from sandbox_plugins.tasks.settings import Training

pytestmark = pytest.mark.usefixtures("one_thread")

ADVERSARY = (
    "{name: patchgan, channels: 8, num_layers: 2, start: 0.5, ramp: 0.25, feature_matching: 0.5}"
)
RECIPE = f"""\
seed: 3
device: cpu
dataset: {{name: shapes, image_size: 8, num_images: 64, num_validation: 16, num_classes: 4}}
tokenizer:
  name: var-vq
  autoencoder: {{name: patch, patch: 4, ch: 8, code_dim: 4}}
  codebook: {{name: vq, vocab_size: 16}}
  schedule: {{name: sides, sides: [1, 2]}}
tasks:
  - name: train-tokenizer
    num_images: 128
    batch_size: 16
    checkpoint_every: 16
    report_every: 16
    num_validation_images: 16
    ema: 0.9
    adversary: {ADVERSARY}
"""
LABEL = "1-train-tokenizer"


@pytest.fixture
def start(tmp_path, registry):
    def run(folder, *overrides):
        path = tmp_path / "tiny.yaml"
        path.write_text(RECIPE)
        return execute(load_recipe(path, overrides, registry), folder, name="tiny")[LABEL]

    return run


def points(folder):
    """The scalars of the log, by images seen; validations aside."""
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [e for e in events if e["event"] == "step" and "loss" in e["scalars"]]
    return {e["done"]: {k: v for k, v in e["scalars"].items() if "second" not in k} for e in steps}


def weights(folder):
    return (folder / "weights" / "tokenizer.safetensors").read_bytes()


class Stop:
    """Looks on, and stops the run at a count of images."""

    def __init__(self, done):
        self.done = done

    @sandbox.hookimpl
    def step_ended(self, run, task, done, total, scalars):
        if done == self.done:
            raise KeyboardInterrupt


@pytest.fixture
def stopped_at(monkeypatch):
    def place(done):
        def observers(parts):
            manager = pluggy.PluginManager("sandbox")
            manager.add_hookspecs(sandbox.hooks.ObserverHooks)
            manager.register(Stop(done))
            return manager.hook

        monkeypatch.setattr("sandbox.run._observers", observers)

    return place


# The gradient


class Recorded:
    """An adversary of fixed losses, which notes what it is handed."""

    learning_rate_factor = 2.0

    def __init__(self, network, weight=0.25):
        self.network, self.fixed, self.handed = network, weight, []

    def begins(self, progress):
        return progress >= 0.5

    def deceive(self, fake, real, progress):
        loss = (fake - 2 * real).square().mean()
        return sandbox.Losses(loss, {"adversary": loss.detach()})

    def weight(self, loss_gradient, own_gradient, progress):
        self.handed.append((loss_gradient, own_gradient))
        return torch.tensor(self.fixed)

    def discriminate(self, fake, real, progress):
        loss = self.network(fake).mean() - self.network(real).mean()
        return sandbox.Losses(loss, {"loss": loss.detach()})


@pytest.fixture
def contest():
    torch.manual_seed(0)
    settings = Training(num_images=100, learning_rate=1e-3, warmup=0.0, decay="constant")
    return Contest(Recorded(nn.Conv2d(3, 1, 1)), settings, torch.device("cpu"))


def images(seed):
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def made_by(decoder, quantizer_loss):
    return sandbox.Reconstruction(decoder(images(0)), torch.zeros(4, 1), quantizer_loss)


def judge(real):
    return lambda fake: {"l2": (fake - real).square().mean(), "l1": (fake - real).abs().mean()}


def test_one_backward_pass_gives_the_gradient_of_the_weighted_sum(contest):
    decoder, scale, real = nn.Conv2d(3, 3, 3, padding=1), nn.Parameter(torch.ones(())), images(1)
    trained = [*decoder.parameters(), scale]
    losses = contest.losses(made_by(decoder, scale.square()), real, judge(real), 0.5)
    found = torch.autograd.grad(losses.total, trained)
    made = made_by(decoder, scale.square())
    total = made.loss + sum(judge(real)(made.images).values())
    total = total + 0.25 * (made.images - 2 * real).square().mean()
    wanted = torch.autograd.grad(total, trained)
    assert losses.total.item() == pytest.approx(total.item(), rel=1e-6)
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-7)
    assert set(losses.parts) == {
        *("loss/quantizer", "loss/l2", "loss/l1", "loss/adversary", "adversary_weight")
    }
    assert not any(value.requires_grad for value in losses.parts.values())


def test_the_weight_is_measured_at_the_reconstruction(contest):
    decoder, real = nn.Conv2d(3, 3, 1), images(1)
    contest.losses(made_by(decoder, torch.zeros(())), real, judge(real), 0.5)
    ((gradient, own),) = contest.adversary.handed
    fake = decoder(images(0)).detach().requires_grad_()
    (wanted,) = torch.autograd.grad(sum(judge(real)(fake).values()), fake)
    assert torch.allclose(gradient, wanted)
    assert torch.allclose(own, 2 * (fake.detach() - 2 * real) / fake.numel())


def test_the_discriminator_takes_one_step_on_all_pieces(contest):
    real = images(1)
    assert contest.step() == {}  # nothing was shown yet
    before = contest.network.weight.detach().clone()
    decoder = nn.Conv2d(3, 3, 1)
    for _ in range(2):
        contest.losses(made_by(decoder, torch.zeros(())), real, judge(real), 0.5)
    found = contest.step()
    assert set(found) == {"discriminator/loss", "discriminator/gradient_norm"}
    assert contest.optimizer.param_groups[0]["lr"] == pytest.approx(2e-3)
    gap = decoder(images(0)).mean((0, 2, 3)) - real.mean((0, 2, 3))
    moved = (contest.network.weight - before).flatten()
    assert torch.allclose(moved.abs(), torch.full((3,), 2e-3), rtol=1e-3)
    assert torch.equal(moved.sign(), -gap.sign())
    assert contest.step() == {}  # what was shown is forgotten
    assert decoder.weight.grad is None


def test_moments_from_a_file_lie_in_memory_as_their_parameters_do(tmp_path):
    """A fused step pairs them by place in memory, and a file keeps no order of memory."""
    settings = Training(num_images=100, warmup=0.0)
    contest = Contest(Recorded(nn.Conv2d(3, 4, 3)), settings, torch.device("cpu"))
    contest.network.to(memory_format=torch.channels_last)  # as on a GPU
    contest.losses(made_by(nn.Conv2d(3, 3, 1), torch.zeros(())), images(1), judge(images(1)), 0.5)
    contest.step()
    wanted = contest.optimizer.state[contest.network.weight]["exp_avg"].clone()
    checkpoints = sandbox.Checkpoints(tmp_path)
    checkpoints.save(1, contest.state_dict())
    contest.load_state_dict(checkpoints.newest())
    found = contest.optimizer.state[contest.network.weight]["exp_avg"]
    assert torch.equal(found, wanted) and found.any()
    assert found.stride() == contest.network.weight.stride() != found.contiguous().stride()


# Runs


def test_the_adversary_joins_at_its_start_and_trains(start, tmp_path):
    start(tmp_path / "run")
    found = points(tmp_path / "run")
    assert list(found) == list(range(16, 129, 16))
    own = {
        *("loss/adversary", "loss/feature_matching", "adversary_weight"),
        *("discriminator/loss", "discriminator/real", "discriminator/fake"),
    }
    assert [own <= set(scalars) for scalars in found.values()] == [False] * 4 + [True] * 4
    assert [bool(own & set(scalars)) for scalars in found.values()] == [False] * 4 + [True] * 4
    weight = [scalars["adversary_weight"] for scalars in list(found.values())[4:]]
    assert weight[0] == 0.0 and 0 < weight[1] <= 0.4 * 0.5 + 1e-6 and max(weight) <= 0.4 + 1e-6
    assert all({"loss/l1", "loss/l2", "loss/quantizer"} <= set(s) for s in found.values())


def test_an_adversary_changes_the_weights_once_it_counts(start, tmp_path):
    start(tmp_path / "with")
    start(tmp_path / "without", "tasks.0.adversary=null")
    one, other = points(tmp_path / "with"), points(tmp_path / "without")
    for done in (16, 32, 48, 64):
        assert one[done] == other[done]
    assert one[128]["loss/l2"] != other[128]["loss/l2"]
    assert weights(tmp_path / "with") != weights(tmp_path / "without")


@pytest.mark.parametrize("done", [48, 80, 112, 128])
def test_a_contest_that_was_stopped_ends_as_if_it_had_not_been(
    start, tmp_path, stopped_at, monkeypatch, done
):
    start(tmp_path / "whole")
    with monkeypatch.context():
        stopped_at(done)
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path / "run")
    monkeypatch.undo()
    torch.rand(7)  # the global stream stands anywhere in the second process
    result = start(tmp_path / "run")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert points(tmp_path / "run") == points(tmp_path / "whole")
    kept = json.loads((tmp_path / "whole" / LABEL / "result.json").read_text())
    assert result["codebook"] == kept["codebook"] and result["validation"] == kept["validation"]


def test_pieces_of_a_batch_train_both_sides(start, tmp_path):
    start(tmp_path / "run", "tasks.0.accumulate=4", "tasks.0.adversary.augment=[]")
    start(tmp_path / "whole", "tasks.0.adversary.augment=[]")
    one, other = points(tmp_path / "run")[80], points(tmp_path / "whole")[80]
    for name in ("discriminator/real", "discriminator/fake", "loss/adversary"):
        assert one[name] == pytest.approx(other[name], abs=2e-2)


@pytest.fixture
def initialised(registry, monkeypatch):
    """The images that each call of `initialise` was handed."""
    calls, cls = [], registry.find(sandbox.Tokenizer, "var-vq")
    was = cls.initialise

    def initialise(self, batches):
        batches = list(batches)
        calls.append(batches)
        was(self, batches)

    monkeypatch.setattr(cls, "initialise", initialise)
    return calls


@pytest.mark.parametrize(
    ("overrides", "sizes"),
    [
        ([], [16]),
        (["tasks.0.init_images=40"], [16, 16, 8]),
        (["tokenizer.codebook.vocab_size=30"], [16, 14]),
        (["tasks.0.init_images=1000"], [16] * 4),
    ],
)
def test_codes_are_placed_once_by_shuffled_images(start, tmp_path, initialised, overrides, sizes):
    start(tmp_path / "run", *overrides)
    (batches,) = initialised
    assert [len(batch) for batch in batches] == sizes
    seen = torch.cat(batches).flatten(1)
    assert len(torch.unique(seen, dim=0)) == len(seen)
    run = sandbox.load(tmp_path / "run", device="cpu")
    first = next(sandbox.sweep(run.dataset, "train", len(seen))).images.flatten(1)
    assert not torch.equal(seen, first)


def test_a_stopped_training_does_not_place_its_codes_again(
    start, tmp_path, initialised, stopped_at, monkeypatch
):
    with monkeypatch.context():
        stopped_at(32)
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path / "run")
        stopped_at(0)
        start(tmp_path / "run")
    assert len(initialised) == 1


def test_a_tokenizer_with_weights_keeps_its_codes(start, tmp_path, initialised):
    start(tmp_path / "first")
    start(tmp_path / "second", f"weights.tokenizer={tmp_path / 'first'}")
    assert len(initialised) == 1


def test_a_perceptual_loss_is_prepared_for_the_data(start, tmp_path):
    losses = "[l2, {name: perceptual, features: {name: random, width: 4}}]"
    start(tmp_path / "run", f"tasks.0.losses={losses}")
    assert all(s["loss/perceptual"] > 0 for s in points(tmp_path / "run").values())


def test_pictures_that_are_no_numbers_stop_the_run(start, tmp_path, registry, monkeypatch):
    task = registry.find(sandbox.Task, "train-tokenizer")
    losses = task._losses

    def spoil(self, tokenizer, contest, images, progress):
        images = images * float("nan") if progress >= 0.75 else images
        return losses(self, tokenizer, contest, images, progress)

    monkeypatch.setattr(task, "plan", lambda self, run: {})
    monkeypatch.setattr(task, "_losses", spoil)
    with pytest.raises(sandbox.RunError, match="loss is no longer finite, between image 96 and"):
        start(tmp_path / "run")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("tasks.0.adversary=patchgam", "did you mean 'patchgan'"),
        ("tasks.0.adversary.num_layers=5", "need images of at least 32 px, these have 8 x 8"),
        ("tasks.0.adversary.lecan=1", "did you mean 'lecam'"),
        ("tasks.0.losses=[]", "name at least one image loss"),
        ("tasks.0.losses=[perceptual]", "mean nothing without weights"),
        ("tasks.0.losses=[{name: lpips, weights: vgg.pth}]", "vgg.pth: no weights there"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(start, tmp_path, override, says):
    with pytest.raises(sandbox.SandboxError, match=says) as caught:
        start(tmp_path / "run", override)
    assert "\n" not in str(caught.value).strip()


def test_the_plan_counts_the_adversary(registry, tmp_path):
    flops = []
    for adversary in ("null", ADVERSARY):
        path = tmp_path / "tiny.yaml"
        path.write_text(RECIPE)
        recipe = load_recipe(path, [f"tasks.0.adversary={adversary}"], registry)
        run = sandbox.run.LiveRun(recipe, tmp_path / "run")
        run.label = LABEL
        plan = recipe.tasks[0].build().plan(run)
        flops.append(float(plan["per image"].split()[0]))
    assert flops[1] > 1.5 * flops[0]


def test_settings_of_the_task_have_defaults(registry):
    cls = registry.find(sandbox.Task, "train-tokenizer")
    params = settle(cls, registry, {"num_images": 1})
    assert params.adversary is None and [part.name for part in params.losses] == ["l2", "l1"]


@pytest.mark.gpu
@pytest.mark.parametrize("feature_matching", [0.0, 1.0])
def test_a_contest_never_waits_for_the_gpu(registry, feature_matching):
    cls, cuda = registry.find(sandbox.Adversary, "patchgan"), torch.device("cuda")
    wishes = {"channels": 16, "start": 0.0, "feature_matching": feature_matching}
    settings = Training(num_images=100, warmup=0.0)
    contest = Contest(cls(settle(cls, registry, wishes), (32, 32)), settings, cuda)
    decoder = nn.Conv2d(3, 3, 3, padding=1).to(cuda)
    real = (torch.rand(8, 3, 32, 32) * 2 - 1).to(cuda)
    zero = torch.zeros((), device=cuda)
    try:
        for turn in range(3):
            torch.cuda.set_sync_debug_mode("error" if turn else "default")
            for half in real.chunk(2):
                with torch.autocast("cuda", torch.bfloat16):
                    made = sandbox.Reconstruction(decoder(half), torch.zeros(4, 1), zero)
                    losses = contest.losses(made, half, judge(half), 0.5)
                losses.total.backward()
            found = contest.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found["discriminator/loss"].isfinite()
    assert decoder.weight.grad.isfinite().all() and decoder.weight.grad.any()


def test_two_processes_contest_as_one(start, tmp_path):
    """Without augmentation, whose draws are each process's own."""
    overrides = ["tasks.0.adversary.augment=[]", "tasks.0.ema=null"]
    one = start(tmp_path / "one", *overrides)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += ["-m", "sandbox", "run", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "two")]
    command += [word for override in overrides for word in ("--set", override)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two" / LABEL / "result.json").read_text())
    assert two["validation"]["l2"] == pytest.approx(one["validation"]["l2"], rel=1e-3)
    found, wanted = points(tmp_path / "two"), points(tmp_path / "one")
    for done_images in (80, 96, 128):
        names = [n for n in wanted[done_images] if n.startswith(("disc", "loss", "adv", "grad"))]
        assert "discriminator/real" in names
        assert {n: found[done_images][n] for n in names} == pytest.approx(
            {n: wanted[done_images][n] for n in names}, rel=1e-2, abs=1e-4
        )
