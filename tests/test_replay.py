"""Recordings: when a call is recorded, what it depends on, and what happens where that fails."""

import pytest
import torch
from torch import nn

from sandbox import NotRecorded, Recordings, replay
from sandbox.replay import Recording, held, places, recorded_apart, versions


class Pretended:
    """Stands for a recording where there is no GPU."""

    made = []

    def __init__(self, compute, inputs, rng, pool=None, stream=None):
        self.device = inputs.device
        if inputs.numel() > 16:
            raise torch.OutOfMemoryError("no more")
        if inputs.numel() > 8:
            raise RuntimeError("waits for the\ndevice")
        self.compute, self.graph, self.stream = compute, self, stream
        Pretended.made.append(len(inputs))

    def __call__(self, inputs, rng):
        return -self.compute(inputs, rng)

    def pool(self):
        return (0, 1)


@pytest.fixture
def pretended(monkeypatch):
    Pretended.made = []
    monkeypatch.setattr(replay, "Recording", Pretended)
    return Pretended.made


def call(recordings, size, at_once=False):
    inputs = torch.ones(size)
    return recordings.run(double, inputs, None, key=size, at_once=at_once).sum() / size


def double(inputs, rng):
    return 2 * inputs


def test_a_kind_of_call_is_recorded_when_it_comes_again(pretended):
    recordings = Recordings(patience=1)
    assert [call(recordings, n) for n in (2, 3, 2, 2, 3)] == [2, 2, -2, -2, -2]
    assert pretended == [2, 3]


def test_recording_waits_until_it_may_pay(pretended):
    recordings = Recordings()
    assert [call(recordings, 2) for _ in range(5)] == [2, 2, 2, -2, -2]


def test_a_call_is_recorded_at_once_where_that_is_asked_for(pretended):
    assert call(Recordings(), 2, at_once=True) == -2


def test_what_is_recorded_apart_is_recorded_at_once_and_forgotten(pretended):
    recordings, others = Recordings(patience=1), Recordings(patience=1)
    for _ in range(2):
        with recorded_apart():
            assert [call(recordings, size) for size in (2, 2, 3)] == [-2, -2, -2]
            assert call(others, 2) == -2
    assert pretended == [2, 3, 2] * 2
    assert [call(recordings, 2) for _ in range(2)] == [2, -2] and pretended[6:] == [2]
    with recorded_apart():
        assert call(recordings, 2) == -2
    assert call(recordings, 2) == -2 and pretended[7:] == [2]


def test_what_cannot_be_recorded_apart_is_told_too(pretended):
    with recorded_apart(), pytest.warns(NotRecorded, match="RuntimeError: waits for the device"):
        assert call(Recordings(), 9) == 2


def test_the_latest_recordings_are_kept(pretended):
    recordings = Recordings(kept=2)
    for size in (1, 2, 1, 3, 1, 2):
        call(recordings, size, at_once=True)
    assert pretended == [1, 2, 3, 2]


def test_what_cannot_be_recorded_runs_as_it_is_and_is_told_once(pretended):
    recordings = Recordings(patience=1)
    call(recordings, 9)
    with pytest.warns(NotRecorded, match="RuntimeError: waits for the device"):
        assert call(recordings, 9) == 2
    assert call(recordings, 9) == 2 and pretended == []


def test_where_memory_runs_out_recordings_make_way(pretended):
    recordings = Recordings()
    call(recordings, 2, at_once=True)
    with pytest.warns(NotRecorded, match="OutOfMemoryError: no more"):
        assert call(recordings, 17, at_once=True) == 2
    assert call(recordings, 17) == 2
    assert call(recordings, 2, at_once=True) == -2 and pretended == [2, 2]


def test_places_tell_whether_weights_were_moved_and_not_whether_they_changed():
    module = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    before = places(held(module.modules()))
    module.load_state_dict({name: t + 1 for name, t in module.state_dict().items()})
    assert places(held(module.modules())) == before
    module.to(memory_format=torch.channels_last)
    assert places(held(module.modules())) != before


def draw(inputs, rng):
    return torch.rand(inputs.shape, device=inputs.device, generator=rng) + inputs


def gpu_rng(seed=0):
    return torch.Generator("cuda").manual_seed(seed)


@pytest.mark.gpu
def test_a_replay_draws_what_the_plain_computation_draws_and_moves_the_generator_on():
    inputs, plain_rng, rng = torch.arange(5.0, device="cuda"), gpu_rng(3), gpu_rng(3)
    recording = Recording(draw, torch.zeros_like(inputs), gpu_rng(7))
    plain = [draw(inputs, plain_rng) for _ in range(3)]
    replayed = [recording(inputs, rng) for _ in range(3)]
    assert all(map(torch.equal, plain, replayed))
    assert torch.equal(plain_rng.get_state(), rng.get_state())
    assert not torch.equal(replayed[0], replayed[1])
    assert torch.equal(recording(inputs + 1, gpu_rng(3)), draw(inputs + 1, gpu_rng(3)))


@pytest.mark.gpu
def test_recordings_that_share_their_memory_do_not_disturb_one_another():
    recordings, sizes = Recordings(), (5, 300_000, 70_000, 5, 300_000)
    for seed, size in enumerate(sizes):
        inputs = torch.zeros(size, device="cuda")
        found = recordings.run(draw, inputs, gpu_rng(seed), key=size, at_once=True)
        again = recordings.run(draw, inputs, gpu_rng(seed + 9), key=size, at_once=True)
        assert torch.equal(found, draw(inputs, gpu_rng(seed)))
        assert torch.equal(again, draw(inputs, gpu_rng(seed + 9)))


@pytest.mark.gpu
def test_recordings_need_together_what_the_largest_needs():
    def big(inputs, rng):
        return (inputs.expand(2**26) + 1).sum(dim=0, keepdim=True)

    recordings, reserved = Recordings(), []
    for key in range(4):
        recordings.run(big, torch.ones(1, device="cuda"), gpu_rng(), key=key, at_once=True)
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] - reserved[0] < 2**28


@pytest.mark.gpu
@pytest.mark.parametrize("bad_call", [2, 3])
def test_what_waits_for_the_device_runs_as_it_is_and_leaves_the_device_usable(bad_call):
    """In the second call it is found out before the recording, in the third it breaks it."""
    calls = []

    def waits(inputs, rng):
        calls.append(1)
        if len(calls) == bad_call:
            inputs.sum().item()
        return draw(inputs, rng)

    inputs = torch.zeros(4, device="cuda")
    with pytest.warns(NotRecorded):
        found = Recordings().run(waits, inputs, gpu_rng(), key=0, at_once=True)
    assert torch.equal(found, draw(inputs, gpu_rng()))
    torch.rand(3, device="cuda")  # the default generator draws on
    assert torch.equal(
        Recording(draw, inputs, gpu_rng())(inputs, gpu_rng(5)), draw(inputs, gpu_rng(5))
    )
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_a_replay_reads_weights_anew_also_where_autocast_casts_them():
    layer = nn.Linear(16, 16).cuda()

    def apply(inputs, rng):
        return layer(inputs) + layer(inputs)

    inputs = torch.randn(2, 16, device="cuda")
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        apply(inputs, None)  # autocast now remembers the weights, cast
        recording = Recording(apply, inputs, gpu_rng())
        before = recording(inputs, gpu_rng())
        assert torch.equal(before, apply(inputs, None))
    with torch.no_grad():
        layer.weight.mul_(2)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(recording(inputs, gpu_rng()), apply(inputs, None))
        assert not torch.equal(recording(inputs, gpu_rng()), before)


@pytest.mark.parametrize("fused", [False, True])
def test_every_way_of_training_changes_the_versions(fused):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    modules, seen = list(model.modules()), []

    def changed():
        seen.append(versions(held(modules)))
        return seen[-1] not in seen[:-1]

    assert changed() and not changed()
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    model(torch.randn(3, 2)).sum().backward()
    assert changed()  # its buffers
    optimizer.step()
    assert changed()
    with torch.inference_mode():
        model[0].weight.copy_(torch.ones(2, 2))
    assert changed()
    model.load_state_dict(model.state_dict())
    assert changed() and not changed()


def test_of_what_was_made_in_inference_mode_nobody_knows():
    with torch.inference_mode():
        model = torch.nn.Linear(2, 2)
    assert versions(held([model])) != versions(held([model]))
