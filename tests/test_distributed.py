"""Several processes: they train what one trains, write once, go on, and fail with one line."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from pkgutil import iter_modules
from textwrap import dedent
from types import SimpleNamespace

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing, nn
from torch.multiprocessing.spawn import ProcessExitedException, start_processes

from sandbox import Batch, agree, all_reduce_mean_, barrier, broadcast_, read_tensors
from sandbox.cli import main
from sandbox.plugins import BUILT_IN
from sandbox_plugins.tasks.cache import cached
from sandbox_plugins.tasks.upkeep import Average, average_buffers, check_together

TRAINING = "batch_size: 16, checkpoint_every: 16, report_every: 32, num_validation_images: 16"
RECIPE = f"""\
seed: 3
device: cpu
dataset: {{name: shapes, image_size: 8, num_images: 64, num_validation: 16, num_classes: 4}}
tokenizer:
  name: var-vq
  autoencoder: {{name: patch, patch: 4, ch: 8, code_dim: 4}}
  codebook: {{name: vq, vocab_size: 16, restart: false}}
  schedule: {{name: sides, sides: [1, 2]}}
generator:
  name: autoregressive
  backbone: {{name: var, depth: 1, width: 16, num_heads: 2, label_dropout: 0, drop_path: 0}}
tasks:
  - {{name: train-tokenizer, num_images: 64, validate_every: 32, {TRAINING}}}
  - {{name: train-generator, num_images: 96, accumulate: 2, ema: 0.9, keep: best, {TRAINING}}}
  - {{name: sample, num_images: 4, batch_size: 4, strip_images: 2, columns: 2}}
"""
WEIGHTS = ["weights/tokenizer.safetensors", "weights/generator.safetensors"]
LIVELY = [
    "generator.backbone.label_dropout=0.3",
    "generator.backbone.drop_path=0.2",
    "tokenizer.codebook={name: vq, vocab_size: 16, restart_every: 2, restart_threshold: 0.5}",
]
"""What makes a process draw random numbers of its own."""

PLUGINS = """\
    import os
    import signal

    import sandbox


    class Sick:
        \"\"\"An image loss that fails in the second process, after two steps.\"\"\"

        class Params(sandbox.Params):
            how: str

        def __init__(self, params):
            self.params, self.left = params, 3

        def loss(self, reconstruction, images):
            self.left -= 1
            value = reconstruction.square().mean()
            if self.left > 0 or sandbox.rank() != 1:
                return value
            if self.params.how == "nan":
                return value * float("nan")
            raise ZeroDivisionError("dividing by zero")


    class Killer:
        \"\"\"An observer that ends its process without warning.\"\"\"

        class Params(sandbox.Params):
            task: str
            done: int

        def __init__(self, params):
            self.params = params

        @sandbox.hookimpl
        def step_ended(self, run, task, done, total, scalars):
            if (task, done) == (self.params.task, self.params.done):
                os.kill(os.getpid(), signal.SIGKILL)


    @sandbox.hookimpl
    def sandbox_register(register):
        register(sandbox.ImageLoss, "sick", Sick)
        register(sandbox.Observer, "killer", Killer)
    """


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """The command that runs the recipe in a folder, without its first word."""
    home = tmp_path_factory.mktemp("recipe")
    (home / "tiny.yaml").write_text(RECIPE)
    (home / "mine").mkdir()
    (home / "mine" / "troubles.py").write_text(dedent(PLUGINS))

    def made(folder, *overrides):
        there = ["run", str(home / "tiny.yaml"), "--out", str(folder)]
        there += ["--plugins", str(home / "mine")]
        return there + [word for override in overrides for word in ("--set", override)]

    return made


@pytest.fixture(scope="module")
def start(words, tmp_path_factory):
    """Run the recipe in as many processes as wished; returns status and what is on stderr.

    The processes are those that `torchrun` starts, and end one another as there; but they are forks
    of one that has imported everything, which saves most of their time.
    """
    told_in = tmp_path_factory.mktemp("told") / "stderr.txt"
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["sandbox.run", *(f"sandbox_plugins.{m.name}" for m in iter_modules(BUILT_IN))]
    )

    def run(folder, *overrides, size=2):
        told_in.write_text("")
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        status = 0
        try:
            start_processes(
                command,
                (words(folder, *overrides), size, port, str(told_in)),
                size,
                start_method="forkserver",
            )
        except ProcessExitedException as error:
            status = error.exit_code
        return status, told_in.read_text()

    return run


def command(rank, words, size, port, told_in):
    """What one process does: the command line, as `torchrun` would start it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(told_in, os.O_WRONLY | os.O_APPEND), 2)
    sys.argv[1:] = words
    if size > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
        }
    torch.set_num_threads(1)
    sys.exit(main(words))


@pytest.fixture(scope="module")
def torchrun(words):
    """Run the recipe by `torchrun` itself, in two processes."""

    def run(folder, *overrides):
        starter = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
        starter += ["--rdzv-endpoint=localhost:0", "-m", "sandbox"]
        done = subprocess.run(
            [sys.executable, *starter, *words(folder, *overrides)],
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return done.returncode, done.stderr

    return run


@pytest.fixture(scope="module")
def lively(start, tmp_path_factory):
    """Two processes that nothing stopped."""
    folder = tmp_path_factory.mktemp("lively") / "run"
    status, err = start(folder, *LIVELY)
    assert status == 0, err
    return folder


def steps(folder):
    events = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [
        (e["task"], e["done"], {k: v for k, v in e["scalars"].items() if "second" not in k})
        for e in events
        if e["event"] == "step"
    ]


def told(err):
    return [line for line in err.splitlines() if line.startswith("sandbox: ")]


def test_two_processes_train_what_one_trains(start, torchrun, tmp_path):
    for status, err in (start(tmp_path / "one", size=1), torchrun(tmp_path / "two")):
        assert status == 0, err
    for name in WEIGHTS:
        one, two = (read_tensors(tmp_path / folder / name)[0] for folder in ("one", "two"))
        assert one.keys() == two.keys()
        for key in one:
            assert torch.allclose(one[key], two[key], rtol=1e-3, atol=1e-5), (name, key)
    one, two = steps(tmp_path / "one"), steps(tmp_path / "two")
    assert [step[:2] for step in one] == [step[:2] for step in two]
    for (_, _, scalars), (_, _, others) in zip(one, two, strict=True):
        assert others == pytest.approx(scalars, rel=1e-3, abs=1e-4)
    facts = json.loads((tmp_path / "two" / "environment.json").read_text())
    assert facts["processes"] == "2"
    assert facts["command"].startswith("torchrun --nproc-per-node=2 -m sandbox run ")
    assert (tmp_path / "two" / "samples.npy").exists()


def test_processes_that_are_killed_end_as_if_they_had_not_been(start, tmp_path, lively):
    folder = tmp_path / "run"
    for label in ("1-train-tokenizer", "2-train-generator"):
        status, _ = start(folder, *LIVELY, f"observers=[{{name: killer, task: {label}, done: 48}}]")
        assert status != 0 and not (folder / label / "result.json").exists()
    status, err = start(folder, *LIVELY)
    assert status == 0, err
    for name in WEIGHTS:
        assert (folder / name).read_bytes() == (lively / name).read_bytes()
    assert steps(folder) == steps(lively)


def test_a_finished_run_is_skipped_by_all(start, lively):
    before = [(lively / name).stat().st_mtime_ns for name in WEIGHTS]
    assert start(lively, *LIVELY)[0] == 0
    assert [(lively / name).stat().st_mtime_ns for name in WEIGHTS] == before


def test_a_loss_that_is_not_finite_in_one_process_is_one_clear_line(torchrun, tmp_path):
    status, err = torchrun(tmp_path, "tasks.0.losses=[{name: sick, how: nan}]")
    (line,) = told(err)
    assert status == 1 and "1-train-tokenizer: the loss is no longer finite, between" in line
    assert err.count("Traceback (most recent call last)") == 1  # torchrun's own, of how it ended
    events = [json.loads(text) for text in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert events[-1]["error"].startswith("RunError: 1-train-tokenizer: the loss")


def test_a_failure_in_one_process_ends_all_with_one_line(start, tmp_path):
    status, err = start(tmp_path, "tasks.0.losses=[{name: sick, how: raise}]")
    (line,) = told(err)
    assert status == 1 and line.startswith("sandbox: ZeroDivisionError: dividing by zero")
    assert "dividing by zero" in (tmp_path / "error.log").read_text()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("tasks.0.accumulate=3", "batch_size 16 is not divisible by 2 processes x accumulate 3"),
        ("tasks.1.batch_sise=8", "did you mean 'batch_size'"),
    ],
)
def test_mistakes_are_told_once(start, tmp_path, override, says):
    status, err = start(tmp_path, override)
    (line,) = told(err)
    assert status != 0 and says in line


class Statistics(nn.Module):
    """One weight, one statistic, one count."""

    def __init__(self, value):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("mean", torch.tensor([float(value), 0.1]))
        self.register_buffer("count", torch.tensor(value))


class Few:
    """Eight images, all of them their number."""

    num_classes, class_names, image_size = 2, "ab", (1, 1)

    def size(self, split):
        return 8

    def batch(self, split, indices, rng):
        images = indices.view(-1, 1, 1, 1).expand(-1, 3, 1, 1).float()
        return Batch(images, indices % 2)


def encoded(rank, folder, said):
    """What `train-generator` reads, of a tokenizer that is another one in every process."""
    tokenizer = Statistics(rank)
    tokenizer.vocab_size = 16
    run = SimpleNamespace(
        folder=Path(folder),
        device=torch.device("cpu"),
        dataset=Few(),
        tokenizer=tokenizer,
        generator=SimpleNamespace(prepare=lambda images: images[:, 0, 0].long() + rank),
        settings=lambda slot, deciding=False: {"name": slot},
        say=said.append,
    )
    return cached(run, "train", 3, 2, None).examples


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    mixed = [
        torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last) * (rank + 1),
        torch.tensor(float(rank)),
        torch.full((2,), rank, dtype=torch.float64),
    ]
    all_reduce_mean_(mixed)
    sent = [torch.full((2, 2), rank).t(), torch.tensor(rank == 0)]
    broadcast_(sent)
    network = Statistics(rank)
    average = Average(network, 0.9)
    average_buffers(network, average)
    check_together(network)
    with torch.no_grad():
        network.weight += rank
    try:
        check_together(network)
        complaint = ""
    except Exception as error:
        complaint = str(error)
    barrier()
    said = []
    found = {
        "encoded": [encoded(rank, folder, said) for _ in range(2)],
        "said": said,
        "mixed": mixed,
        "sent": sent,
        "agreed": agree({"rank": rank, "name": [1.5, None]}),
        "network": network.state_dict(),
        "average": average.weights,
        "complaint": complaint,
    }
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_what_processes_tell_one_another(tmp_path):
    start_processes(work, (str(tmp_path),), 2, start_method="forkserver")
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        maps, number, double = found["mixed"]
        assert torch.equal(maps, torch.arange(24.0).view(1, 2, 3, 4) * 1.5)
        assert number == 0.5 and torch.equal(double, torch.full((2,), 0.5, dtype=torch.float64))
        assert torch.equal(found["sent"][0], torch.zeros(2, 2, dtype=torch.long))
        assert found["sent"][1]
        for examples in found["encoded"]:
            assert examples.flatten().tolist() == [*range(8)] * 2 and examples.dtype == torch.int16
        assert len(found["said"]) == (rank == 0)
        assert found["agreed"] == {"rank": 0, "name": [1.5, None]}
        for state in (found["network"], found["average"]):
            assert torch.equal(state["mean"], torch.tensor([0.5, 0.1])) and state["count"] == rank
        assert ("process 1 has another 'weight'" in found["complaint"]) == (rank == 1)


def test_alone_nothing_is_exchanged():
    tensor = torch.tensor([1.0, 2.0])
    all_reduce_mean_([tensor])
    broadcast_([tensor])
    barrier()
    assert tensor.tolist() == [1, 2] and agree("word") == "word"
