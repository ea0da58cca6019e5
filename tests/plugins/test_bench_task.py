"""The task `bench` from within: what timing leaves alone, how spread and state are counted."""

import json
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional as F

import sandbox
from sandbox_plugins.tasks.bench import rows, task
from sandbox_plugins.tasks.bench.counting import _tensors, work_of
from sandbox_plugins.tasks.bench.kernels import gaps
from sandbox_plugins.tasks.bench.rows import noise
from sandbox_plugins.tasks.bench.split import Split, seams, splits
from sandbox_plugins.tasks.bench.tables import brief
from sandbox_plugins.tasks.bench.task import Bench
from sandbox_plugins.tasks.clock import (
    Clock,
    forget_peak,
    is_out_of_memory,
    peak_bytes,
    spread,
)
from sandbox_plugins.tasks.replacing import replaced

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = {
    "device": "cpu",
    "num_classes": 2,
    "tokenizer": {
        "name": "var-vq",
        "autoencoder": {"name": "patch", "patch": 4, "ch": 8, "code_dim": 4},
        "codebook": {"name": "vq", "vocab_size": 8},
        "schedule": {"name": "sides", "sides": [1, 2]},
    },
    "generator": {
        "name": "autoregressive",
        "backbone": {"name": "var", "depth": 1, "width": 16, "num_heads": 2},
        "sampler": {"name": "top-k-top-p", "guidance": 1.5},
    },
}
PARTS = ("generation", "encoding", "decoding", "training")
LABELS = torch.tensor([0, 1, 1])


@pytest.fixture
def run(tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    (tmp_path / "tiny.run").mkdir()
    return sandbox.load(tmp_path / "tiny.yaml")


@pytest.mark.parametrize("setting", ["parts", "precision", "fast"])
def test_nothing_to_measure_is_refused(setting):
    with pytest.raises(ValueError, match="expected at least one"):
        Bench.Params.model_validate({setting: []})


@pytest.mark.parametrize(("fast", "traced"), [("off,on", "on"), ("on,off", "on"), ("off", "off")])
def test_the_trace_is_of_a_fast_generation_if_there_is_one(run, monkeypatch, fast, traced):
    seen = []
    monkeypatch.setattr(task, "keep_trace", lambda run, how, path: seen.append(how.fast) or {})
    row = {"precision": "float32", "batch_size": 1, "status": "not asked"}
    monkeypatch.setattr(task, "generation", lambda *words: dict(row))
    how = {"parts": ["generation"], "batch_sizes": [1], "fast": fast.split(","), "profile": True}
    Bench(Bench.Params.model_validate(how)).run(run)
    assert seen == [traced]


def kept(run):
    return json.loads((run.folder / "bench.json").read_text())


def test_timing_the_parts_changes_no_image_and_leaves_no_trace(run):
    before = run.generator.generate(LABELS, run.rng(1))
    owners = (run.tokenizer, run.generator.network, run.generator.sampler)
    found, absent = seams(run)
    kept = [set(vars(owner)) for owner in owners]
    split, made = Split(Clock(run.device), found), []
    with split.watching():
        made.append(run.generator.generate(LABELS, run.rng(1)))
    assert torch.equal(before, made[0]) and not absent
    assert [set(vars(owner)) for owner in owners] == kept
    assert all(seconds > 0 for seconds in split.seconds().values())


def test_a_method_that_another_one_calls_counts_once(run):
    found, _ = seams(run)
    split = Split(Clock(run.device), found)
    ids = run.tokenizer.encode(torch.zeros(1, 3, 8, 8))
    (parts,) = splits(split, lambda: run.tokenizer.decode(ids), 1)
    assert parts["decoder"] > 0 and parts["painting"] == parts["context"] == 0
    assert sum(parts.values()) == pytest.approx(2 * parts["whole"])


def test_an_object_that_allows_no_other_method_is_left_as_it_is():
    @dataclass(frozen=True, slots=True)
    class Closed:
        def draw(self):
            return 1

    closed = Closed()
    with replaced(closed, "draw", lambda: 2):
        assert closed.draw() == 1


def test_the_training_steps_leave_the_weights_alone(run):
    before = {name: t.clone() for name, t in run.generator.network.state_dict().items()}
    Bench(Bench.Params(batch_sizes=(2,), repeats=1)).run(run)
    after = run.generator.network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not run.generator.network.training


def test_a_bench_that_is_stopped_keeps_its_rows(run, monkeypatch):
    """Here in the third row of training, which no handler for errors may take for a refusal."""
    training, before = task.training, run.generator.network.state_dict()
    before = {name: t.clone() for name, t in before.items()}

    def stopped(run, clock, setting):
        if setting.batch_size == 3:
            raise KeyboardInterrupt
        return training(run, clock, setting)

    monkeypatch.setattr(task, "training", stopped)
    with pytest.raises(KeyboardInterrupt):
        Bench(Bench.Params(batch_sizes=(1, 2, 3), repeats=1)).run(run)
    found = kept(run)
    assert found["complete"] is False and found["ceilings"]["copy"]["bytes_per_second"] > 0
    assert [len(found[part]) for part in PARTS] == [3, 3, 3, 2]
    assert found["training"][1]["share_of_matmul"] > 0
    after = run.generator.network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    monkeypatch.undo()
    Bench(Bench.Params(batch_sizes=(1,), repeats=1)).run(run)
    assert kept(run)["complete"] is True


def test_every_row_tells_when_it_was_measured_and_what_the_first_call_took(run):
    Bench(Bench.Params(batch_sizes=(1, 2), repeats=1, warmup=1)).run(run)
    rows = [row for part in PARTS for row in kept(run)[part]]
    times = [row[name] for row in rows for name in ("began_seconds", "ended_seconds")]
    assert times == sorted(times) and times[0] > 0
    for row in rows:
        spent = row["ended_seconds"] - row["began_seconds"]
        assert 0 < row["first_seconds"] + row["seconds"][0] < spent
    assert "images/s (first 46.8 s)" in brief("generation", {**rows[0], "first_seconds": 46.81})


def test_gaps_are_what_no_span_covers():
    assert gaps([(5, 6), (0, 2), (1, 3), (0, 1)]) == 2
    assert gaps([(0, 9), (1, 2), (4, 5), (10, 11)]) == 1  # kernels within a longer one
    assert gaps([(3, 4)]) == gaps([]) == 0


def test_on_and_off_are_read_as_words():
    params = Bench.Params(fast=[False, "auto", True], compile=False)
    assert (params.fast, params.compile) == (("off", "auto", "on"), "off")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler itself looks
def test_what_is_compiled_has_rows_of_its_own_and_leaves_no_trace(run, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    network = run.generator.network
    network.compile = lambda: [b.compile(backend="eager") for b in network.blocks]
    Bench(Bench.Params(batch_sizes=(1, 2), repeats=1, compile=True)).run(run)
    found = kept(run)
    for part in ("encoding", "decoding", "training"):
        rows = [(row["batch_size"], row.get("compiled", False)) for row in found[part]]
        assert rows == [(1, False), (2, False), (2, True)]
        assert all(row["status"] == "ok" for row in found[part])
    assert not any("compiled" in row for row in found["generation"])
    assert all(("times_as_fast" in row) == ("compiled" in row) for row in found["training"])
    assert [row["ids_changed"] for row in found["encoding"]] == [0, 0, 0]
    assert found["training"][2]["flops"] == found["training"][1]["flops"] > 0
    assert all(module._compiled_call_impl is None for module in network.modules())
    assert "encode" not in vars(run.tokenizer.autoencoder)
    assert run.generator._score == run.generator._scored


def test_noise_lies_in_range_and_is_as_strong_in_every_octave(run):
    images = noise(run, 200)
    assert images.shape == (200, 3, 8, 8) and images.abs().max() <= 1
    whole, halves = images.std(), F.avg_pool2d(images, 4).std()
    assert 0.3 < halves / whole < 0.95  # of white noise it would be 0.25


def test_the_bytes_of_a_generation_are_weights_every_step_and_the_cache_filled_so_far(run):
    network = run.generator.network
    work = work_of(run, "float32")
    assert work.weight_bytes == 2 * sum(4 * p.numel() for p in network.parameters())
    cond, modulations, cache = 2 * 16, 2 * 6 * 16, 2 * 2 * 5 * 16  # guidance: two rows an image
    head, bias, places = 2 * 2 * 16, 3 * 16, 5 * 16
    state = cond + modulations + head + bias + places + cache
    assert work.cache_bytes == round(4 * state * (1 + 5) / 5)
    linear = sum(m.weight.numel() for m in network.blocks.modules() if isinstance(m, nn.Linear))
    assert work.flops > 2 * 2 * 5 * (linear - 6 * 16 * 16)  # AdaLN runs once an image


def test_tensors_of_any_state_are_found_once():
    class Plain:
        def __init__(self, inner):
            self.inner, self.itself = inner, self

    one, two = torch.zeros(1), torch.zeros(2)
    state = Plain({"a": [one, (two, one)], "network": nn.Linear(1, 1), "word": "text"})
    assert sorted(t.numel() for t in _tensors(state)) == [1, 2]


def test_spread_is_median_and_quartiles():
    assert list(spread([5.0, 1.0, 3.0, 2.0, 4.0]).values()) == [3, 2, 4]
    assert list(spread([7.0]).values()) == [7, 7, 7]


def test_lack_of_memory_is_told_from_other_errors():
    texts = ("DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory")
    assert all(is_out_of_memory(RuntimeError(text)) for text in texts)
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError(""))
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_why_a_row_has_no_parts_is_kept(run, monkeypatch):
    def none(*words):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(rows, "splits", none)
    Bench(Bench.Params(parts=("generation",), batch_sizes=(1,), repeats=1)).run(run)
    (row,) = kept(run)["generation"]
    assert row["status"] == "ok" and row["splits_left_out"] == "out of memory"
    assert "splits" not in row


@pytest.mark.gpu
def test_on_a_gpu_a_recording_is_split_by_marks_within_it():
    class Sleeper:
        def __init__(self, cycles):
            self.cycles = cycles

        def step(self, inputs):
            torch.cuda._sleep(self.cycles)
            return inputs + 1

    slow, quick = Sleeper(20_000_000), Sleeper(2_000_000)
    inputs, rng = torch.zeros(2, device="cuda"), torch.Generator("cuda")
    recordings, seen = sandbox.Recordings(), []

    def compute(inputs, rng):
        seen.append(torch.cuda.is_current_stream_capturing())
        return quick.step(slow.step(inputs))

    def call():
        assert recordings.run(compute, inputs, rng, key=1, at_once=True).tolist() == [2, 2]

    split = Split(Clock(inputs.device), [(slow, {"step": "slow"}), (quick, {"step": "quick"})])
    found = splits(split, call, 3)
    assert seen == [False, False, True] and len(found) == 3
    for parts in found:
        assert parts["slow"] > 3 * parts["quick"] > 0
        assert 0.8 * parts["whole"] < parts["slow"] + parts["quick"] <= parts["whole"]


@pytest.mark.gpu
def test_on_a_gpu_events_tell_the_time_and_torch_the_peak(tmp_path):
    device = torch.device("cuda")
    clock, size = Clock(device), 2**24
    assert forget_peak(device)
    (seconds,) = clock.time(lambda: torch.zeros(size, device=device), 1)
    assert seconds > 0 and peak_bytes(device) >= 4 * size
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(RECIPE | {"device": "cuda"}))
    (tmp_path / "tiny.run").mkdir()
    run = sandbox.load(tmp_path / "tiny.yaml")
    Bench(Bench.Params(batch_sizes=(2,), repeats=1, profile=True)).run(run)
    found = kept(run)["generation"]
    assert [row["fast"] for row in found] == ["off", "on"] * 3
    assert all(row["status"] == "ok" for row in found)
    for row in found:
        assert len(row["splits"]) == 1 and "splits_left_out" not in row
        assert row["kernels_launched"] >= sum(kernel["calls"] for kernel in row["kernels"]) > 10
        assert row["kernels_gaps_seconds"] > 0
