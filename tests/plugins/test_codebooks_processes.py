"""The codebook `vq` in two processes: they agree, with each other and with one that sees it all."""

from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing

from sandbox import world_size  # before there is a group: see sandbox/distributed.py
from sandbox_plugins.codebooks import VQ

NUM_STEPS = 6
SETTINGS = {
    "scales": {"restart": False},
    "tokens": {"restart": False, "balance": "tokens"},
    "restarts": {"restart_threshold": 0.5},
    "restarts of learned codes": {"restart_threshold": 0.5, "update": "gradient"},
}


def build(**settings):
    torch.manual_seed(0)
    return VQ(VQ.Params(vocab_size=8, init="normal", decay=0.5, restart_every=2, **settings), 3)


def batch(step):
    """Two groups for each of two processes."""
    rng = torch.Generator().manual_seed(step)
    return [[torch.randn(n, 3, generator=rng) for n in (2, 10)] for _ in range(2)]


def train(codebook, batches, seed=0):
    optimizer = torch.optim.AdamW([codebook.embedding.weight])
    rng = torch.Generator().manual_seed(seed)
    scalars = []
    for groups in batches:
        codebook.observe(groups, [codebook.nearest(group) for group in groups])
        found = codebook.after_step(optimizer, 0.0, rng)
        scalars.append({name: float(value) for name, value in found.items()})
    return codebook.state_dict(), scalars


def gloo_threads():
    """Those that still run; at the end of the process they would abort it, now and then."""
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    assert world_size() == 2
    batches = [batch(step)[rank] for step in range(NUM_STEPS)]
    found = {name: train(build(**settings), batches, rank) for name, settings in SETTINGS.items()}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
    assert not gloo_threads()


@pytest.fixture(scope="module")
def in_two_processes(tmp_path_factory):
    """What each of them found with each of the settings."""
    folder = tmp_path_factory.mktemp("two")
    multiprocessing.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_hold_the_codes_of_one_that_sees_both_batches(in_two_processes, name):
    (first, told), (second, also_told) = (found[name] for found in in_two_processes)
    settings = SETTINGS[name]
    assert told == also_told
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key]), key
    assert first["num_steps"] == NUM_STEPS
    if settings.get("restart", True):
        assert sum(scalars["codes_restarted"] for scalars in told) > 0
        return
    both = [[torch.cat(pair) for pair in zip(*batch(step), strict=True)] for step in range(6)]
    alone, _ = train(build(**settings), both)
    for key, tensor in first.items():
        torch.testing.assert_close(tensor, alone[key], msg=key)
