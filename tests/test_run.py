"""Runs: what they leave, what they refuse, and that a stopped one ends as if it had not stopped."""

import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from textwrap import dedent

import numpy as np
import pluggy
import pytest
import torch
import yaml

import sandbox
from sandbox import SandboxError, record
from sandbox.cli import main
from sandbox.recipe import load_recipe
from sandbox.run import execute

pytestmark = pytest.mark.usefixtures("one_thread")

TRAINING = "batch_size: 16, checkpoint_every: 16, report_every: 32, num_validation_images: 16"
RECIPE = f"""\
seed: 3
device: cpu
dataset: {{name: shapes, image_size: 8, num_images: 64, num_validation: 16, num_classes: 4}}
tokenizer:
  name: var-vq
  autoencoder: {{name: patch, patch: 4, ch: 8, code_dim: 4}}
  codebook: {{name: vq, vocab_size: 16, decay: 0.5, restart_every: 2, restart_threshold: 0.5}}
  schedule: {{name: sides, sides: [1, 2]}}
generator:
  name: autoregressive
  backbone: {{name: var, depth: 1, width: 16, num_heads: 2, label_dropout: 0.3, drop_path: 0.2}}
tasks:
  - {{name: train-tokenizer, num_images: 96, validate_every: 48, {TRAINING}}}
  - {{name: train-generator, num_images: 96, validate_every: 48, ema: 0.9, {TRAINING}}}
  - {{name: sample, num_images: 10, batch_size: 4, strip_images: 2, columns: 5}}
"""
LABELS = ["1-train-tokenizer", "2-train-generator", "3-sample"]
KEPT = [
    "weights/tokenizer.safetensors",
    "weights/generator.safetensors",
    "samples.npy",
    "samples-labels.npy",
    "1-train-tokenizer/reconstructions.png",
    "2-train-generator/coarse-to-fine.png",
    "3-sample/samples.png",
]


@pytest.fixture
def start(tmp_path, registry):
    """Write the recipe, changed where a test wishes, and run it in a folder."""

    def run(folder, *overrides, text=RECIPE):
        path = tmp_path / "tiny.yaml"
        path.write_text(text)
        return execute(load_recipe(path, overrides, registry), folder, name="tiny", command="test")

    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory, registry, one_thread):
    """The folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    path = folder / "tiny.yaml"
    path.write_text(RECIPE)
    execute(load_recipe(path, [], registry), folder / "run", name="tiny")
    return folder / "run"


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def results(folder):
    found = [json.loads((folder / label / "result.json").read_text()) for label in LABELS]
    return [{k: v for k, v in result.items() if "second" not in k} for result in found]


def points(folder):
    """The points of the curves, without what a clock says."""
    return [
        (e["task"], e["done"], {k: v for k, v in e["scalars"].items() if "second" not in k})
        for e in log(folder)
        if e["event"] == "step"
    ]


def assert_same(folder, whole):
    """Bit for bit what a run that was never stopped leaves."""
    for name in KEPT:
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    assert results(folder) == results(whole)


def test_a_run_keeps_its_record_and_its_results(whole):
    for name in (*KEPT, "recipe.yaml", "environment.json", "log.jsonl"):
        assert (whole / name).stat().st_size > 0, name
    assert not (whole / "error.log").exists()
    assert json.loads((whole / "environment.json").read_text())["recipe"] == "tiny"
    events = [(e["task"], e["event"]) for e in log(whole)]
    assert events[0] == ("", "run_started") and events[-1] == ("", "run_ended")
    for label in LABELS:
        started, ended = events.index((label, "task_started")), events.index((label, "task_ended"))
        assert started < events.index((label, "step")) < ended
    assert results(whole)[0]["images_seen"] == 96
    assert not list(whole.glob("*/checkpoints/*"))
    assert not list(whole.rglob("*.draft"))


def test_the_codebook_was_restarted_so_that_resuming_has_something_to_get_wrong(whole):
    moved = [s["codes_restarted"] for _, _, s in points(whole) if "codes_restarted" in s]
    assert any(moved)


@pytest.mark.parametrize(("vocab_size", "dtype"), [(16, "int16"), (40_000, "int32")])
def test_the_cache_holds_the_very_ids(start, tmp_path, vocab_size, dtype):
    words = [f"tokenizer.codebook={{name: vq, vocab_size: {vocab_size}, init: uniform}}"]
    words += ["tasks.0.num_images=16", "tasks.1.num_images=16", "tasks.2.num_images=1"]
    start(tmp_path / "run", *words)
    run = sandbox.load(tmp_path / "run", device="cpu")
    (path,) = (tmp_path / "run" / "cache").glob("train-*/examples.npy")
    kept = np.load(path, allow_pickle=False)
    (batch,) = sandbox.sweep(run.dataset, "train", 64)
    assert kept.dtype == dtype and np.array_equal(kept, run.tokenizer.encode(batch.images))


def test_another_seed_gives_other_weights(start, whole, tmp_path):
    start(tmp_path / "run", "seed=4", "tasks.1.num_images=16")
    assert (tmp_path / "run" / KEPT[0]).read_bytes() != (whole / KEPT[0]).read_bytes()


@pytest.fixture
def copy(whole, tmp_path):
    """A finished run to do things to."""
    return shutil.copytree(whole, tmp_path / "run")


def test_the_same_recipe_again_skips_every_task(start, copy, whole):
    before = {name: (copy / name).stat().st_mtime_ns for name in KEPT}
    again = start(copy)
    assert list(again) == LABELS
    assert [e["skipped"] for e in log(copy) if e["event"] == "task_ended"][3:] == [True] * 3
    assert before == {name: (copy / name).stat().st_mtime_ns for name in KEPT}
    assert_same(copy, whole)
    assert points(copy) == points(whole)


def test_a_lost_result_is_made_again_and_is_the_same(start, copy, whole):
    for path in (copy / LABELS[2], copy / "cache"):
        shutil.rmtree(path)
    start(copy)
    assert_same(copy, whole)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("generator.backbone.depth=2", "generator.backbone.depth is 1 there, 2 here"),
        ("tasks.0.learning_rate=3e-4", "tasks.0.learning_rate is 0.001 there, 0.0003 here"),
        ("seed=4", "seed is 3 there, 4 here"),
        ("tasks.2.labels=[1]", "tasks.2.labels.0 is None there, 1 here"),
    ],
)
def test_another_recipe_is_refused_in_the_same_folder(start, copy, override, says):
    before = (copy / "recipe.yaml").read_bytes()
    with pytest.raises(SandboxError, match="holds a run of another recipe") as caught:
        start(copy, override)
    assert says in str(caught.value) and "--out" in str(caught.value)
    assert (copy / "recipe.yaml").read_bytes() == before


def test_what_has_not_begun_may_change_and_tasks_may_be_added(start, copy, whole):
    text = RECIPE + "  - {name: evaluate, images: reconstructions, metrics: [METRIC]}\n"
    with pytest.raises(SandboxError, match="needs a features"):
        start(copy, text=text.replace("METRIC", "rfid"))
    results = start(copy, text=text.replace("METRIC", "psnr"))
    assert results["4-evaluate"]["scores"]["psnr"] > 0
    assert_same(copy, whole)
    with pytest.raises(SandboxError, match=r"tasks\.3\.metrics\.0\.name is 'psnr' there"):
        start(copy, text=text.replace("METRIC", "ssim"))


def test_what_no_result_depends_on_may_change_and_leaves_caches(start, copy, whole):
    """Of a part, of a part within it, and of a task; what was changed is what is remembered."""
    for path in (copy / LABELS[1] / "result.json", copy / KEPT[1]):
        path.unlink()
    caches = {path.name for path in (copy / "cache").iterdir()}
    changed = {"generator.backbone.recompute": True, "tasks.1.num_workers": 1}
    start(copy, *(f"{key}={value}".lower() for key, value in changed.items()))
    assert_same(copy, whole)
    assert {path.name for path in (copy / "cache").iterdir()} == caches
    kept = yaml.safe_load((copy / "recipe.yaml").read_text())
    assert kept["generator"]["backbone"]["recompute"] is True
    assert kept["tasks"][1]["num_workers"] == 1


def test_other_observers_may_watch_the_same_run(start, copy):
    start(copy, "observers=[report]")
    assert yaml.safe_load((copy / "recipe.yaml").read_text())["observers"][0]["name"] == "report"
    assert (copy / "report.html").exists()


def test_a_folder_that_another_process_holds_is_refused(start, tmp_path):
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SandboxError, match="in use by another process"):
            start(tmp_path)
    assert not (tmp_path / "recipe.yaml").exists()


def test_a_folder_that_cannot_be_made_is_refused(start, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SandboxError, match="cannot write to the run folder") as caught:
        start(tmp_path / "file" / "run")
    assert "--out" in str(caught.value)


def test_a_folder_without_permission_is_refused(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    me = os.geteuid()
    if me == 0:  # permissions bind everyone but the superuser
        os.seteuid(65534)
    try:
        with (
            pytest.raises(SandboxError, match=r"cannot write .*run: Permission denied; choose"),
            record.claimed(tmp_path / "locked" / "run"),
        ):
            pass
    finally:
        os.seteuid(me)


def test_a_log_line_that_was_cut_short_is_dropped(start, copy, whole):
    with (copy / "log.jsonl").open("a") as file:
        file.write('{"time": 1, "task": "3-sam')
    start(copy)
    assert points(copy) == points(whole)


class Poison:
    """Looks on, and spoils a run at a chosen count of images."""

    def __init__(self, task, done, error):
        self.task, self.done, self.error = task, done, error

    @sandbox.hookimpl
    def step_ended(self, run, task, done, total, scalars):
        if (task, done) == (self.task, self.done):
            raise self.error


@pytest.fixture
def poisoned(monkeypatch):
    """Put an observer into every run that stops it."""

    def place(*words):
        def observers(parts):
            manager = pluggy.PluginManager("sandbox")
            manager.add_hookspecs(sandbox.hooks.ObserverHooks)
            manager.register(Poison(*words))
            return manager.hook

        monkeypatch.setattr("sandbox.run._observers", observers)

    yield place
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("task", "done"),
    [
        (LABELS[0], 16),  # before the first checkpoint
        (LABELS[0], 64),
        (LABELS[0], 96),  # before the last validation
        (LABELS[1], 16),
        (LABELS[1], 48),
        (LABELS[1], 80),
        (LABELS[2], 4),
        (LABELS[2], 10),  # after the last batch
    ],
)
def test_an_interrupted_run_ends_as_if_it_had_not_been(
    start, tmp_path, whole, poisoned, monkeypatch, task, done
):
    folder = tmp_path / "run"
    poisoned(task, done, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        start(folder)
    assert log(folder)[-1]["error"].startswith("KeyboardInterrupt")
    assert not (folder / task / "result.json").exists()
    monkeypatch.undo()
    torch.rand(7)  # the global stream stands anywhere in the second process
    start(folder)
    assert_same(folder, whole)
    assert points(folder) == points(whole)


@pytest.mark.parametrize(("index", "name"), [(0, "tokenizer"), (1, "generator")])
def test_a_run_stopped_between_its_weights_and_its_result_does_not_train_twice(
    start, tmp_path, whole, monkeypatch, index, name
):
    """Weights that are there already must not become the start of the same training."""
    folder = tmp_path / "run"

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sandbox.run.LiveRun.picture", stop)
        if index == 1:
            shutil.copytree(whole / LABELS[0], folder / LABELS[0])
            (folder / "weights").mkdir()
            shutil.copy(whole / KEPT[0], folder / KEPT[0])
        with pytest.raises(KeyboardInterrupt):
            start(folder)
    assert (folder / "weights" / f"{name}.safetensors").exists()
    start(folder)
    assert_same(folder, whole)


CNN = "tokenizer.autoencoder={name: cnn, ch: 32, ch_mult: [1, 1], num_res_blocks: 1, dropout: 0.3}"


def test_dropout_does_not_depend_on_what_ran_before(start, tmp_path, poisoned, monkeypatch):
    """A task draws from streams of its own, also where it is the first to build its parts."""
    tasks = f"""\
tasks=[{{name: train-classifier, num_images: 16, {TRAINING}}},
{{name: train-tokenizer, num_images: 32, {TRAINING}}}]"""
    words = ["features=classifier", "generator=null", CNN, "tokenizer.schedule.sides=[1, 4]", tasks]
    start(tmp_path / "whole", *words)
    poisoned("2-train-tokenizer", 16, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "run", *words)
    monkeypatch.undo()
    start(tmp_path / "run", *words)
    name = "weights/tokenizer.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


COMMAND = [sys.executable, "-m", "sandbox.cli", "run"]


def spawn(recipe, folder, **options):
    return subprocess.Popen(
        [*COMMAND, str(recipe), "--out", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        **options,
    )


def test_a_killed_process_ends_as_if_it_had_not_been(tmp_path, whole):
    """SIGKILL at a few moments of one run, then to the end: no half file, the same bytes."""
    recipe, folder = tmp_path / "tiny.yaml", tmp_path / "run"
    recipe.write_text(RECIPE)
    num_killed = 0
    for label, at_least in ((LABELS[0], 2), (LABELS[1], 1)):
        process = spawn(recipe, folder)
        while process.poll() is None:
            text = (folder / "log.jsonl").read_text() if (folder / "log.jsonl").exists() else ""
            if text.count(f'"task": "{label}", "event": "step"') >= at_least:
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        num_killed += process.returncode == -signal.SIGKILL
        for path in folder.glob("*/result.json"):
            json.loads(path.read_text())
    assert num_killed, "each process was over before it could be killed"
    process = spawn(recipe, folder)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert_same(folder, whole)
    assert points(folder) == points(whole)


NAN_PLUGIN = """\
    import torch
    import sandbox

    @sandbox.hookimpl
    def sandbox_register(register):
        register(sandbox.ImageLoss, "sick", Sick)

    class Sick:
        class Params(sandbox.Params):
            after: int = 3

        def __init__(self, params):
            self.left = params.after

        def loss(self, reconstruction, images):
            self.left -= torch.is_grad_enabled()
            return reconstruction.mean() * (float("nan") if self.left < 0 else 1.0)
    """


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(
    tmp_path, capsys, monkeypatch
):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "sick_loss.py").write_text(dedent(NAN_PLUGIN))
    recipe, folder = tmp_path / "tiny.yaml", tmp_path / "run"
    recipe.write_text(RECIPE)
    words = ["run", str(recipe), "--out", str(folder), "--plugins", str(tmp_path / "mine")]
    words += ["--set", "tasks.0.losses=[{name: sick, after: 6}]"]
    assert main(words) == 1
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("sandbox: 1-train-tokenizer: the loss is no longer finite, between")
    assert "checkpoints" in told and "learning_rate" in told
    # Two of the six good losses are those of the trial step of the plan.
    assert "between image 64 and image 80" in told
    state = sandbox.Checkpoints(folder / LABELS[0] / "checkpoints").newest()
    assert state["done"] == 64
    assert all(bool(t.isfinite().all()) for t in state["network"].values())
    assert log(folder)[-1]["error"].startswith("RunError")
    assert not (folder / "error.log").exists() and not (folder / KEPT[0]).exists()


def test_an_unexpected_error_is_one_line_and_a_file(tmp_path, capsys, poisoned):
    recipe, folder = tmp_path / "tiny.yaml", tmp_path / "run"
    recipe.write_text(RECIPE)
    poisoned(LABELS[0], 32, ZeroDivisionError("dividing\nby zero"))
    assert main(["run", str(recipe), "--out", str(folder)]) == 1
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("sandbox: ZeroDivisionError: dividing by zero")
    assert "error.log" in told
    trace = (folder / "error.log").read_text()
    assert trace.startswith("Traceback") and "step_ended" in trace
    assert log(folder)[-1]["error"] == "ZeroDivisionError: dividing by zero"


def test_a_full_disk_stops_the_run_in_one_line_and_it_goes_on_later(tmp_path, whole):
    recipe, folder = tmp_path / "tiny.yaml", tmp_path / "run"
    recipe.write_text(RECIPE)
    limit = (30_000, 30_000)
    process = spawn(
        recipe, folder, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    )
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1, out + err
    (told,) = err.splitlines()
    assert told.startswith("sandbox: cannot write") and "free some space" in told
    process = spawn(recipe, folder)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert_same(folder, whole)


def test_what_parts_choose_is_kept_with_the_environment_and_told_once(
    start, tmp_path, registry, monkeypatch
):
    def choosing(self, run):
        for case, chosen in [("small", "quick"), ("large", "quick"), ("huge", "thrifty")] * 2:
            sandbox.chose("kernel", case, chosen, f"{case} things")
        return {}

    monkeypatch.setattr(registry.find(sandbox.Task, "sample"), "run", choosing)
    tasks = "tasks=[{name: sample, num_images: 1, untrained: true}]"
    start(tmp_path / "run", tasks)
    facts = json.loads((tmp_path / "run/environment.json").read_text())
    assert facts["choices"] == {
        "kernel": {"small": "quick", "large": "quick", "huge": "thrifty"},
    }
    told = [e["text"] for e in log(tmp_path / "run") if e["event"] == "message"]
    assert told == [
        "kernel: quick for small (small things); all choices are in environment.json",
        "kernel: thrifty for huge (huge things); all choices are in environment.json",
    ]
    sandbox.chose("kernel", "small", "quick", "nobody listens outside of a run")
