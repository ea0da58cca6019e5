"""The training loop: what it begins with, keeps, reports, leaves, and that no GPU waits for it."""

import logging
import time
import warnings
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pluggy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import sandbox
from sandbox import Batch, Losses, RunError
from sandbox.recipe import load_recipe
from sandbox.run import execute
from sandbox_plugins.tasks import watch
from sandbox_plugins.tasks.cache import Prepared
from sandbox_plugins.tasks.loop import Fit, train
from sandbox_plugins.tasks.settings import Training
from sandbox_plugins.tasks.upkeep import Average, optimizer_of, restore, state_of
from sandbox_plugins.tasks.watch import Watch, add_scaled

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


class Points:
    """Four numbers a label."""

    num_classes, class_names, image_size = 4, "abcd", (1, 1)

    def size(self, split):
        return 32

    def batch(self, split, indices, rng):
        return Batch(F.one_hot(indices % 4, 4).float() + 0.1 * indices[:, None], indices % 4)


class StoppedError(Exception):
    """Ends a training from within."""


class Desk:
    """A `sandbox.Run` that remembers what it is told."""

    def __init__(self, folder, stop_at=None):
        self.task_folder, self.label, self.seed, self.device = folder, "1-fit", 0, CPU
        self.reports, self.said, self.rewound, self.stop_at = [], [], [], stop_at

    def report(self, done, total, **scalars):
        self.reports.append((done, scalars))
        if done == self.stop_at:
            raise StoppedError

    def say(self, text):
        self.said.append(text)

    def rewind(self, done):
        self.rewound.append(done)


class Tally:
    """Something that a checkpoint should hold."""

    def __init__(self):
        self.seen = []

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


SETTINGS = {"num_images": 48, "batch_size": 8, "report_every": 16, "checkpoint_every": 16}


def fit(folder, *, stop_at=None, **changes):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 4))
    tally, desk, begun = Tally(), Desk(folder, stop_at), []

    def loss(batch, progress):
        tally.seen.append(progress)
        return Losses(F.cross_entropy(network(batch.images), batch.labels), {})

    def begin():
        begun.append(network[0].weight.mean().item())
        nn.init.ones_(network[3].weight)

    settings = Training(**{**SETTINGS, **changes})
    made = Fit(
        *(desk, settings, network, Points(), "order", loss, lambda: {"error": 1.0}, "error"),
        begin=begin,
        keep={"tally": tally},
    )
    return SimpleNamespace(fit=made, network=network, tally=tally, desk=desk, begun=begun)


def test_a_training_begins_once_and_keeps_what_it_is_given(tmp_path):
    whole = fit(tmp_path / "whole", ema=0.5)
    train(whole.fit)
    assert len(whole.begun) == 1 and whole.tally.seen == [i / 6 for i in range(6)]
    halted = fit(tmp_path / "halted", ema=0.5, stop_at=40)
    with pytest.raises(StoppedError):
        train(halted.fit)
    rest = fit(tmp_path / "halted", ema=0.5)
    train(rest.fit)
    assert rest.begun == [] and rest.desk.rewound == [32]
    assert rest.tally.seen == whole.tally.seen
    for mine, its in zip(
        rest.network.state_dict().values(), whole.network.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, its)


def test_the_average_starts_from_what_a_training_begins_with(tmp_path):
    made = fit(tmp_path, ema=0.999, learning_rate=1e-9, weight_decay=0, num_images=8)
    train(made.fit)
    assert torch.allclose(made.network[3].weight, torch.ones(4, 4), atol=1e-6)


def test_reports_tell_the_speed_and_nothing_else_by_the_clock(tmp_path):
    made = fit(tmp_path)
    train(made.fit)
    reports = [(done, scalars) for done, scalars in made.desk.reports if "loss" in scalars]
    assert [done for done, _ in reports] == [16, 32, 48]
    for _, scalars in reports:
        assert scalars["images_per_second"] > 0 and 0 < scalars["waiting_per_second"] < 1
        speed = {"images_per_second", "waiting_per_second"}
        assert set(scalars) == {"loss", "gradient_norm", "learning_rate", *speed}


class Ticking:
    """A clock whose every step, from mark to mark, took as long as `waits` says."""

    def __init__(self, waits):
        self.waits, self.marks = waits, 0

    def mark(self):
        self.marks += 1
        return self.marks

    def settle(self):
        pass

    def seconds(self, began, ended):
        assert ended == began + 1
        return self.waits[began // 2]


@pytest.mark.parametrize(
    ("device", "waits", "told"),
    [
        ("cuda", [0.5, 0.5, 1, 1, 9, 9, 9, 9], (3, "35%")),  # a report every 20 s
        ("cuda", [6] * 8, (2, "60%")),
        ("cuda", [0.9] * 8, None),
        ("cpu", [9] * 8, None),
    ],
)
def test_a_gpu_that_waits_for_data_says_so_once_after_the_beginning(
    tmp_path, monkeypatch, device, waits, told
):
    desk, settings = Desk(tmp_path), Training(num_images=64, batch_size=8, report_every=16)
    now = [0.0]
    monkeypatch.setattr(watch, "perf_counter", lambda: now[0])
    monkeypatch.setattr(watch, "Clock", lambda device: Ticking(waits))
    monkeypatch.setattr(watch.torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(watch.torch.cuda, "max_memory_allocated", lambda device: 0)
    desk.device = torch.device(device)
    seen = watch.Watch(desk, settings, 0)
    for step in range(1, 9):
        with seen.waiting():
            now[0] += 10
        seen.pulse(8 * step, 64)
        if step % 2 == 0:
            assert len(desk.said) == (told is not None and step // 2 >= told[0])
    shares = [scalars["waiting_per_second"] for _, scalars in desk.reports if scalars]
    assert shares == [sum(waits[i : i + 2]) / 20 for i in (0, 2, 4, 6)]
    for text in desk.said:
        assert f"waits for data {told[1]} of the time" in text and "now 0" in text


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("setting", ["on", "off"])
def test_what_the_compiler_says_in_vain_is_kept_out_and_nothing_else(tmp_path, setting, caplog):
    made = fit(tmp_path, num_images=8, compile=setting)
    made.fit.compile = lambda: None
    told = logging.getLogger("torch.utils._sympy.interp")
    loss = made.fit.loss

    def talkative(batch, progress):
        warnings.warn("TensorFloat32 tensor cores are available but not enabled", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
        for name in ("pow_by_natural", "pow"):
            told.warning("failed while executing %s(%s)", name, [1, 2])
        return loss(batch, progress)

    made.fit.loss = talkative
    with pytest.warns(UserWarning) as warned:
        train(made.fit)
    spared = setting == "on"
    assert len(warned) == 2 - spared and str(warned[-1].message) == "something else"
    assert len(caplog.messages) == 2 - spared and "executing pow(" in caplog.messages[-1]
    assert not told.filters


@pytest.mark.parametrize(("setting", "calls"), [("on", 1), ("off", 0), ("auto", 0)])
def test_a_network_is_compiled_when_asked(tmp_path, setting, calls):
    made, called = fit(tmp_path, num_images=8), []
    made.fit.settings = Training(**{**SETTINGS, "num_images": 8, "compile": setting})
    made.fit.compile = lambda: called.append(True)
    train(made.fit)
    assert len(called) == calls == len(made.desk.said)


def test_compiling_by_itself_is_for_gpus_and_long_trainings():
    short, long = (Training(num_images=num, batch_size=2) for num in (999, 1000))
    assert long.compiles(torch.device("cuda")) and not short.compiles(torch.device("cuda"))
    assert not long.compiles(CPU)
    assert Training(num_images=1, compile=True).compiles(CPU)  # as YAML reads a plain `on`


def test_the_parts_of_a_batch_add_up_to_its_gradient(tmp_path):
    states = []
    for accumulate in (1, 4):
        made = fit(tmp_path / str(accumulate), accumulate=accumulate, num_images=8)
        made.network.eval()  # neither dropout nor statistics of a part
        made.network.train = lambda mode=True: None
        train(made.fit)
        states.append(made.network.state_dict())
    for key, tensor in states[0].items():
        assert torch.allclose(tensor, states[1][key], atol=1e-6), key


def test_sums_leave_what_they_are_given_alone():
    sums, value = {}, torch.tensor(2.0)
    for _ in range(3):
        add_scaled(sums, {"a": value, "b": torch.tensor(4), "c": 1.0, "d": value.double()}, 0.5)
    assert value == 2
    assert {name: float(total) for name, total in sums.items()} == {
        "a": 3,
        "b": 6,
        "c": 1.5,
        "d": 3,
    }


def test_a_loss_that_is_not_finite_is_named(tmp_path):
    watch = Watch(Desk(tmp_path), Training(**SETTINGS), 0)
    watch.add({"loss": torch.tensor(float("nan"))})
    with pytest.raises(RunError, match="the loss is no longer finite, between image 0 and image 8"):
        watch.pulse(8, 48)


def test_the_average_follows_in_place_and_notices_what_was_replaced():
    network = nn.BatchNorm1d(2)
    average = Average(network, 0.5)
    with torch.no_grad():
        network.weight.fill_(3)
        network.num_batches_tracked.fill_(7)
    average.update(1)  # early on, the decay is 2/11
    assert average.weights["weight"].tolist() == pytest.approx([1 + 2 * 9 / 11] * 2)
    assert average.weights["num_batches_tracked"] == 7
    average.check()
    network.running_mean = torch.zeros(2)
    with pytest.raises(ValueError, match="replaces its 'running_mean'"):
        average.check()


@pytest.mark.parametrize(("name", "moment"), [("adamw", "exp_avg"), ("sgd", "momentum_buffer")])
def test_a_state_restores_moments_in_the_memory_order_of_their_weights(tmp_path, name, moment):
    def build():
        torch.manual_seed(0)
        network = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        return network, optimizer_of(network, Training(num_images=1, optimizer=name), CPU)

    def step(network, optimizer):
        optimizer.zero_grad()
        network(torch.arange(75.0).view(1, 3, 5, 5)).square().mean().backward()
        optimizer.step()

    network, optimizer = build()
    step(network, optimizer)
    checkpoints = sandbox.Checkpoints(tmp_path)
    checkpoints.save(1, state_of(network, optimizer, None, {}))
    other, its_optimizer = build()
    restore(checkpoints.newest(), other, its_optimizer, None, {})
    moments = its_optimizer.state[other.weight][moment]
    assert moments.stride() == other.weight.stride() != torch.empty(4, 3, 3, 3).stride()
    for pair in ((network, optimizer), (other, its_optimizer)):
        step(*pair)
    assert torch.equal(network.weight, other.weight)


def test_what_is_prepared_is_moved_unless_it_is_too_large(monkeypatch):
    ids = torch.from_numpy(np.arange(12, dtype=np.int16).reshape(6, 2))
    prepared = Prepared(ids, torch.arange(6), Points())
    moved = prepared.to(CPU)
    mine, its = (each.batch("train", torch.tensor([4, 0]), None) for each in (prepared, moved))
    assert moved is not prepared and its.images.tolist() == [[8, 9], [0, 1]] == mine.images.tolist()
    assert its.images.dtype == torch.int64 and its.labels.tolist() == [4, 0]
    monkeypatch.setattr("sandbox_plugins.tasks.cache._RESIDENT_BYTES", ids.nbytes)
    assert prepared.to(CPU) is prepared


def test_what_is_mapped_comes_in_the_same_order_read_ahead_or_not(tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "examples.npy", rng.integers(0, 4096, (50, 7)).astype(np.int16))
    mapped = np.load(tmp_path / "examples.npy", mmap_mode="c", allow_pickle=False)
    prepared = Prepared(torch.from_numpy(mapped), torch.arange(50), Points())

    def batches():
        return sandbox.stream(prepared, "train", 8, seed=1, start=24)

    plain, early = islice(batches(), 20), sandbox.ahead(batches(), CPU)
    for one, other in zip(plain, early, strict=False):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
        assert torch.equal(one.images, torch.from_numpy(mapped).long()[one.labels])
    early.close()


RECIPE = """\
seed: 3
device: cuda
dataset: {{name: cifar10, root: {root}, allow_partial: true, flip: true, pad_crop_px: 2}}
tokenizer:
  name: var-vq
  autoencoder: {{name: cnn, ch: 32, ch_mult: [1, 1, 2], num_res_blocks: 1, code_dim: 8}}
  codebook: {{name: vq, vocab_size: 64}}
  schedule: {{name: sides, sides: [1, 2, 4, 8]}}
generator:
  name: autoregressive
  backbone: {{name: var, depth: 2, width: 64, num_heads: 2}}
features: {{name: classifier, width: 8}}
tasks:
  - {{name: train-tokenizer, {settings}}}
  - {{name: train-generator, ema: 0.9, {settings}}}
  - {{name: train-classifier, {settings}}}
"""
STEPS = (
    "num_images: 320, batch_size: 16, report_every: 1000, checkpoint_every: 1000, "
    "num_validation_images: 16"
)


class NoWaiting:
    """An observer in whose middle of every training a wait for the GPU is an error."""

    def __init__(self):
        self.watched = set()

    @sandbox.hookimpl
    def step_ended(self, run, task, done, total, scalars):
        if task.partition("-")[2].startswith("train"):
            self.watched |= {task} if done == 160 else set()
            torch.cuda.set_sync_debug_mode("error" if 80 <= done < 288 else "default")

    @sandbox.hookimpl
    def run_ended(self, run, error):
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def run_on_gpu(tmp_path, registry):
    """Train on files like those of CIFAR-10; the same folder every time."""
    rng = np.random.default_rng(0)
    for name in ("data_batch_1.bin", "test_batch.bin"):
        records = rng.integers(0, 256, (128, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        records.tofile(tmp_path / name)
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.format(root=tmp_path, settings=STEPS))

    def run(*overrides):
        execute(load_recipe(path, overrides, registry), tmp_path / "run", name="tiny")

    return run


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # of torch's compiler about itself
@pytest.mark.parametrize("compiled", ["off", pytest.param("on", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("small", "cache"), [(True, True), (False, True), (True, False)])
def test_no_training_step_waits_for_the_gpu(run_on_gpu, monkeypatch, compiled, small, cache):
    """Neither where all fits, nor where ids come from the disk and logits in pieces, nor where
    every batch is encoded as it comes."""
    guard = NoWaiting()
    if not small:
        monkeypatch.setattr("sandbox_plugins.tasks.cache._RESIDENT_BYTES", 0)
        monkeypatch.setattr("sandbox_plugins.autoregressive.generator.MAX_LOGITS", 4 * 85 * 64)

    def observers(parts):
        manager = pluggy.PluginManager("sandbox")
        manager.add_hookspecs(sandbox.hooks.ObserverHooks)
        manager.register(guard)
        return manager.hook

    monkeypatch.setattr("sandbox.run._observers", observers)
    words = [f"tasks.{index}.compile={compiled!r}" for index in range(3)]
    run_on_gpu(*words, f"generator.backbone.recompute={not small}", f"tasks.1.cache={cache}")
    assert len(guard.watched) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_on_a_gpu_the_optimizer_steps_in_one_launch_a_group(name):
    network = nn.Linear(2, 2).cuda()
    optimizer = optimizer_of(network, Training(num_images=1, optimizer=name), torch.device("cuda"))
    assert all(group["fused"] for group in optimizer.param_groups)


@pytest.mark.gpu
def test_a_gpu_that_still_has_work_does_not_wait_for_data(tmp_path):
    desk, settings = Desk(tmp_path), Training(num_images=16, batch_size=8, report_every=8)
    desk.device = torch.device("cuda")
    seen, cycles = Watch(desk, settings, 0), 2 * 10**9  # about a second
    for done, work in ((8, cycles), (16, 0)):
        torch.cuda._sleep(work)
        with seen.waiting():
            time.sleep(0.2)
        seen.pulse(done, 16)
    busy, idle = (scalars["waiting_per_second"] for _, scalars in desk.reports)
    assert busy < 0.1 and idle > 0.5


@pytest.mark.gpu
def test_a_training_on_a_gpu_goes_on_from_its_checkpoint(run_on_gpu, tmp_path, monkeypatch):
    """Weights in the memory order of convolutions, moments and averages come back."""
    words = ["tasks.0.ema=0.9", "tasks.0.checkpoint_every=64", "tasks.0.num_images=128"]

    def stop(self, done, total, **scalars):
        if done == 96:
            raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr("sandbox.run.LiveRun.report", stop)
        with pytest.raises(StoppedError):
            run_on_gpu(*words)
    run_on_gpu(*words)
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert "going on from 64 images" in log and "peak_memory_gib" in log


def test_memory_is_spared_where_that_is_asked_for_and_nowhere_else():
    def kept():
        return torch._functorch.config.ban_recompute_materialized_backward

    with sandbox.compiling():
        assert kept()
    with sandbox.compiling(spare_memory=True):
        assert not kept()
    assert kept()
