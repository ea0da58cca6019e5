"""The race that all ids run, before any is ruled out: the plain draws, sooner."""

import pytest
import torch

from sandbox_plugins.samplers import TopKTopP, likeliest, race

WISHES = [
    {"top_k": 0, "top_p": 0.5},
    {"top_k": 0, "top_p": 1.0},
    {"top_k": 7, "top_p": 1.0},
    {"top_k": 20, "top_p": 0.9, "temperature": 0.7},
    {"top_k": 99, "top_p": 1e-6},
    {"top_k": 1, "top_p": 0.9},
]


@pytest.fixture(autouse=True)
def quickly_compiled(monkeypatch):
    monkeypatch.setattr(race, "compiled", lambda: race.winners)


def drawn(wishes, logits, fused):
    part = TopKTopP(TopKTopP.Params(**wishes))
    part.fused = fused
    rng = torch.Generator().manual_seed(3)
    return part.draw(logits, 0.5, rng), rng.get_state()


def some_logits():
    """Of 400 tokens: rows of their own, with many ties, and with ids that are ruled out."""
    logits = 3 * torch.randn(8, 50, 40, generator=torch.Generator().manual_seed(0))
    logits[2:4] = logits[2:4].round()
    logits[4:6, :, 5:9] = -torch.inf
    return logits


@pytest.mark.parametrize("wishes", WISHES, ids=str)
def test_the_fast_draws_are_the_plain_ones_and_leave_the_same_random_state(wishes):
    logits = some_logits()
    before = logits.clone()
    (plain, state), (fast, after) = (drawn(wishes, logits, fused) for fused in (False, True))
    assert torch.equal(fast, plain) and torch.equal(state, after)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("wishes", WISHES, ids=str)
def test_a_sure_winner_may_be_drawn_and_most_winners_are_sure(wishes):
    logits = some_logits().flatten(0, 1)
    bits = torch.empty(logits.shape, dtype=torch.int64)
    bits.random_(generator=torch.Generator().manual_seed(1))
    top = wishes["top_k"], wishes["top_p"]
    ids, sure = race.winners(logits, bits, *top)
    kept = likeliest.search(logits, *top).gather(-1, ids[:, None]).squeeze(-1) > -torch.inf
    assert kept[sure].all()
    if wishes == WISHES[1]:
        assert sure.all()
    elif wishes["top_p"] > 0.4 and wishes["top_k"] != 1:
        assert sure[:100].float().mean() > 0.8 * kept[:100].float().mean()


@pytest.mark.parametrize("least", [-1e4, -torch.inf])
def test_winners_are_sure_whatever_the_least_logit_is(least):
    logits = torch.randn(200, 1000, generator=torch.Generator().manual_seed(0))
    logits[:, 7] = least
    bits = torch.empty(logits.shape, dtype=torch.int64)
    bits.random_(generator=torch.Generator().manual_seed(1))
    assert race.winners(logits, bits, 900, 0.96)[1].float().mean() > 0.9


def test_one_row_nan_and_what_is_without_bounds_are_drawn_as_plainly():
    (row, *_), bad = some_logits().flatten(0, 1), some_logits()
    bad[0, :, 3], bad[1, :, 4] = torch.nan, torch.inf
    for wishes in WISHES:
        for logits in (row, bad):
            assert torch.equal(*(drawn(wishes, logits, fused)[0] for fused in (False, True)))


def test_exponential_noise_is_made_of_the_random_bits_that_are_taken_for_it():
    """What torch does within is nobody's promise: where this fails, `race` draws otherwise."""
    noise, bits = torch.empty(5, 700), torch.empty(5, 700, dtype=torch.int64)
    rngs = [torch.Generator().manual_seed(2) for _ in range(2)]
    noise.exponential_(generator=rngs[0])
    bits.random_(generator=rngs[1])
    assert torch.equal(*(rng.get_state() for rng in rngs))
    uniform = (bits & race.BITS).double() / (race.BITS + 1)
    torch.testing.assert_close(noise.double(), -torch.log1p(-uniform), rtol=1e-5, atol=1e-9)


def test_what_is_not_sure_alone_is_searched(monkeypatch):
    searched = []

    def noted(logits, *top):
        searched.append(len(logits))
        return likeliest.search(logits, *top)

    monkeypatch.setattr(race, "search", noted)
    logits = some_logits()
    drawn({"top_k": 0, "top_p": 0.9}, logits, True)
    assert 0 < sum(searched) < 0.2 * 400
    searched.clear()
    drawn({"top_k": 0, "top_p": 1.0}, logits, True)
    assert searched == []


def test_compiled_it_is_the_same(monkeypatch):
    monkeypatch.undo()
    for wishes in WISHES[:4:3]:
        assert torch.equal(*(drawn(wishes, some_logits(), fused)[0] for fused in (False, True)))
