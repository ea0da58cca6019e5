"""Files that are whole or not there, whatever interrupts their writing."""

import builtins
import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import sandbox.checkpoint
from sandbox import Checkpoints, RunError, SandboxError, atomic, read_tensors, write_tensors
from sandbox.checkpoint import random_states, set_random_states, write_json

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8]


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    made = (torch.rand(shape, generator=rng) * 200).to(draw(st.sampled_from([*DTYPES, torch.bool])))
    return made.transpose(0, -1) if made.ndim > 1 and draw(st.booleans()) else made


keys = st.integers(-2, 3) | st.text("ab/0123", max_size=3)
plain = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | st.text()
nests = st.recursive(
    plain | tensors(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=8,
)


def same(one, other):
    """Equal in kind, shape and every bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        keys = [(type(key), key) for key in one]
        return keys == [(type(key), key) for key in other] and all(
            same(one[key], other[key]) for key in one
        )
    if isinstance(one, list | tuple):
        pairs = zip(one, other, strict=True)
        return type(one) is type(other) and all(same(a, b) for a, b in pairs)
    return type(one) is type(other) and one == other


@given(st.dictionaries(keys, nests, max_size=4))
@example({"a/b": torch.ones(1), "a": {"b": torch.zeros(2)}})
@example({0: torch.ones(1), "0": torch.zeros(2), "": torch.ones(3)})
def test_a_nested_state_comes_back_as_it_was(state):
    with TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder))
        checkpoints.save(1, state)
        assert same(state, checkpoints.newest())


def test_an_optimisers_state_comes_back_as_it_was(tmp_path):
    network = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {"optimizer": optimizer.state_dict(), "network": dict(network.state_dict())}
    Checkpoints(tmp_path).save(1, state)
    assert same(state, Checkpoints(tmp_path).newest())


def test_tensors_that_share_memory_are_kept_apart(tmp_path):
    whole = torch.arange(6.0)
    Checkpoints(tmp_path).save(1, {"whole": whole, "part": whole[2:4], "again": whole})
    state = Checkpoints(tmp_path).newest()
    state["whole"].zero_()
    assert state["part"].tolist() == [2, 3] and state["again"].tolist() == [0, 1, 2, 3, 4, 5]


def test_what_a_checkpoint_cannot_hold_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"cannot hold set at 'a/1'"):
        Checkpoints(tmp_path).save(1, {"a": [0, {1}]})
    assert Checkpoints(tmp_path).newest() is None


def test_the_newest_two_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for num_images in (9, 10, 99, 1000):  # in the order of numbers, not of letters
        checkpoints.save(num_images, {"done": num_images})
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["000000000099.safetensors", "000000001000.safetensors"]
    assert checkpoints.newest() == {"done": 1000}
    checkpoints.clear()
    assert checkpoints.newest() is None and not list(tmp_path.iterdir())


def test_no_folder_means_no_checkpoint(tmp_path):
    assert Checkpoints(tmp_path / "absent").newest() is None


@pytest.mark.parametrize("length", [0, 4, 20, -1])
def test_a_truncated_checkpoint_is_refused_with_a_way_out(tmp_path, length):
    path = Checkpoints(tmp_path).save(1, {"weights": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(SandboxError, match="truncated") as caught:
        Checkpoints(tmp_path).newest()
    assert str(path) in str(caught.value) and "delete it" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_checkpoint_is_refused_with_a_way_out(tmp_path):
    write_tensors(tmp_path / "1.safetensors", {"weights": torch.ones(2)})
    with pytest.raises(SandboxError, match="delete it"):
        Checkpoints(tmp_path).newest()


def test_leftovers_of_a_killed_process_are_ignored_and_then_removed(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(1, {"done": 1})
    for name in (".000000000001.safetensors.draft", ".000000000002.safetensors.draft", ".tmpX"):
        (tmp_path / name).write_bytes(b"cut sho")
    assert checkpoints.newest() == {"done": 1}
    assert checkpoints.save(1, {"done": 2}) == path and checkpoints.newest() == {"done": 2}
    assert list(tmp_path.iterdir()) == [path]


def test_a_body_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, 1)
    with pytest.raises(KeyError), atomic(path) as draft:
        draft.write_text("half")
        raise KeyError
    assert path.read_text() == "1\n"


def test_a_full_disk_is_one_line_and_the_old_file_survives(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"weights": torch.ones(3)})

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(sandbox.checkpoint, "save_file", full)
        with pytest.raises(RunError, match="No space left on device") as caught:
            checkpoints.save(2, {"weights": torch.zeros(3)})
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", full)
        patch.setattr("io.open", full)
        with pytest.raises(RunError, match="No space left on device"):
            write_json(tmp_path / "result.json", {})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", full)
        with pytest.raises(RunError, match="No space left on device"):
            write_json(tmp_path / "deeper" / "result.json", {})
    assert "\n" not in str(caught.value) and "free some space" in str(caught.value)
    assert torch.equal(checkpoints.newest()["weights"], torch.ones(3))
    assert [path.name for path in tmp_path.iterdir()] == ["000000000001.safetensors"]


def run_python(code, *words, **options):
    imports = "import sys", "import torch", "from pathlib import Path"
    imports += ("from sandbox import Checkpoints, RunError",)  # and no more: that takes its time
    code = "\n".join([*imports, code])
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )


def test_a_disk_that_fills_up_in_mid_file_leaves_the_old_one(tmp_path):
    code = (
        "checkpoints = Checkpoints(Path(sys.argv[1]))\n"
        "checkpoints.save(1, {'weights': torch.ones(10)})\n"
        "try:\n    checkpoints.save(2, {'weights': torch.ones(100_000)})\n"
        "except RunError as error:\n    print(error)\n"
    )
    limit = (20_000, 20_000)
    process = run_python(
        code, tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    )
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.startswith(f"cannot write {tmp_path}") and len(out.splitlines()) == 1
    assert torch.equal(Checkpoints(tmp_path).newest()["weights"], torch.ones(10))
    assert len(list(tmp_path.iterdir())) == 1


def test_a_process_killed_while_it_writes_leaves_a_checkpoint_that_loads(tmp_path):
    code = (
        "checkpoints = Checkpoints(Path(sys.argv[1]))\n"
        "start = (checkpoints.newest() or {'done': 0})['done']\n"
        "for done in range(start + 1, 10**9):\n"
        "    weights = torch.full((50_000,), float(done))\n"
        "    checkpoints.save(done, {'done': done, 'weights': weights})\n"
        "    print('saved', flush=True) if done == start + 1 else None\n"
    )
    moments = torch.rand(3, generator=torch.Generator().manual_seed(0)) * 0.1
    last = 0
    for moment in moments.tolist():
        process = run_python(code, tmp_path)
        assert process.stdout.readline() == "saved\n", process.stderr.read()
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        state = Checkpoints(tmp_path).newest()
        assert state["done"] > last
        assert torch.equal(state["weights"], torch.full((50_000,), float(state["done"])))
        last = state["done"]
    Checkpoints(tmp_path).save(10**9, {})
    assert len(list(tmp_path.iterdir())) == 2  # nothing of the killed ones stays behind


def test_read_tensors_gives_tensors_and_facts(tmp_path):
    path = tmp_path / "deep" / "weights.safetensors"
    write_tensors(path, {"a": torch.arange(6).view(2, 3).T}, {"images_seen": 3})
    found, facts = read_tensors(path)
    assert torch.equal(found["a"], torch.arange(6).view(2, 3).T) and facts["images_seen"] == "3"
    with pytest.raises(SandboxError, match="no such file"):
        read_tensors(tmp_path / "absent.safetensors")


def test_random_streams_go_on_where_they_were():
    states = random_states()
    drawn = torch.rand(3)
    assert not torch.equal(drawn, torch.rand(3))
    set_random_states(states)
    assert torch.equal(drawn, torch.rand(3))
