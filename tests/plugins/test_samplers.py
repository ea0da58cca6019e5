import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sandbox_plugins.samplers import Greedy, TopKTopP

seeds = st.integers(0, 2**16)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 40))


def sampler(**settings):
    return TopKTopP(TopKTopP.Params(**{"top_k": 0, "top_p": 1.0, **settings}))


def rng(seed):
    return torch.Generator().manual_seed(seed)


def logits_of(shape, seed):
    return 3 * torch.randn(*shape, generator=rng(seed))


def allowed_ids(logits, top_k, top_p):
    """The ids of one token that may be drawn, by the definition: walk down the sorted list."""
    order = logits.argsort(descending=True).tolist()[: top_k or None]
    probabilities = logits[order].double().softmax(0).tolist()
    kept, reached = set(), 0.0
    for index, probability in zip(order, probabilities, strict=True):
        if kept and reached >= top_p + 1e-5:  # float32 sums may disagree at the very edge
            break
        kept.add(index)
        reached += probability
    return kept


@given(shape=shapes, seed=seeds, top_k=st.integers(0, 50), top_p=st.floats(0.01, 1))
def test_drawn_ids_stay_inside_the_top_k_and_top_p_set(shape, seed, top_k, top_p):
    logits = logits_of(shape, seed)
    ids = sampler(top_k=top_k, top_p=top_p).draw(logits, 0.5, rng(seed))
    assert ids.shape == shape[:2]
    assert ids.dtype == torch.int64
    for row, drawn in zip(logits.flatten(0, 1), ids.flatten().tolist(), strict=True):
        assert drawn in allowed_ids(row, top_k, top_p)


@given(shape=shapes, seed=seeds, top_k=st.integers(0, 50), top_p=st.floats(0.01, 1))
def test_softened_weights_stay_inside_the_same_set_and_sum_to_one(shape, seed, top_k, top_p):
    logits = logits_of(shape, seed)
    smooth = sampler(top_k=top_k, top_p=top_p, smoothing=True)
    weights = smooth.soften(logits, 0.5, rng(seed))
    torch.testing.assert_close(weights.sum(-1), torch.ones(shape[:2]))
    for row, weight in zip(logits.flatten(0, 1), weights.flatten(0, 1), strict=True):
        assert set(weight.nonzero().flatten().tolist()) <= allowed_ids(row, top_k, top_p)


@given(shape=shapes, seed=seeds, smoothing=st.booleans())
def test_the_same_random_state_gives_the_same_ids_and_weights(shape, seed, smoothing):
    logits = logits_of(shape, seed)
    part = sampler(top_k=7, smoothing=smoothing)
    drawn = [(part.draw(logits, 0.5, r), part.soften(logits, 0.5, r)) for r in (rng(1), rng(1))]
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert (drawn[0][1] is None) == (not smoothing)
    assert not smoothing or torch.equal(drawn[0][1], drawn[1][1])


@given(shape=shapes, seed=seeds)
def test_drawing_leaves_the_logits_and_the_global_random_state_alone(shape, seed):
    logits, state = logits_of(shape, seed), torch.get_rng_state()
    before = logits.clone()
    part = sampler(top_k=2, top_p=0.5, smoothing=True)
    part.draw(logits, 0.5, rng(seed))
    part.soften(logits, 0.5, rng(seed))
    assert torch.equal(logits, before)
    assert torch.equal(torch.get_rng_state(), state)


@given(shape=shapes, seed=seeds)
def test_a_vanishing_temperature_is_greedy(shape, seed):
    logits = logits_of(shape, seed)
    greedy = Greedy(Greedy.Params()).draw(logits, 0.5, rng(seed))
    assert torch.equal(greedy, logits.argmax(-1))
    assert torch.equal(sampler(temperature=1e-6).draw(logits, 0.5, rng(seed)), greedy)
    assert torch.equal(sampler(top_k=1).draw(logits, 0.5, rng(seed)), greedy)
    assert torch.equal(sampler(top_p=1e-6).draw(logits, 0.5, rng(seed)), greedy)


def test_ids_are_drawn_as_often_as_they_are_likely():
    probabilities = torch.tensor([0.1, 0.2, 0.3, 0.4])
    logits = probabilities.log().expand(1, 20_000, 4)
    counts = sampler().draw(logits, 0.0, rng(0)).flatten().bincount(minlength=4)
    torch.testing.assert_close(counts / 20_000, probabilities, atol=0.015, rtol=0)


def test_top_k_comes_before_top_p():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(1, 2_000, 4)
    # Of the two likeliest alone, the first has 4/7 and is enough for 0.5; of all four it is not.
    assert set(sampler(top_k=2, top_p=0.5).draw(logits, 0.0, rng(0)).unique().tolist()) == {0}
    assert set(sampler(top_p=0.5).draw(logits, 0.0, rng(0)).unique().tolist()) == {0, 1}


def test_softened_weights_harden_towards_the_last_step():
    logits = logits_of((1, 500, 20), 0)
    smooth = sampler(smoothing=True)
    sharpness = [smooth.soften(logits, r, rng(0)).amax(-1).mean() for r in (0.0, 0.5, 1.0)]
    assert sharpness[0] < sharpness[1] < sharpness[2]
    assert sharpness[2] > 0.99


def test_guidance_grows_as_its_shape_says():
    def weights(shape):
        part = sampler(guidance=4.0, guidance_shape=shape)
        return [part.guidance(progress) for progress in (0.0, 0.25, 0.5, 1.0)]

    assert weights("linear") == [0.0, 1.0, 2.0, 4.0]
    assert weights("constant") == [4.0] * 4
    assert weights("cosine") == pytest.approx([0.0, 0.5857864, 2.0, 4.0])


@pytest.mark.parametrize(
    "settings", [{"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}, {"temperature": 0.0}]
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        sampler(**settings)
