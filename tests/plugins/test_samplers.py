import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from sandbox_plugins.samplers import Greedy, TopKTopP, likeliest
from sandbox_plugins.samplers.likeliest import _masses

seeds = st.integers(0, 2**16)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 40))


def sampler(**settings):
    return TopKTopP(TopKTopP.Params(**{"top_k": 0, "top_p": 1.0, **settings}))


def rng(seed):
    return torch.Generator().manual_seed(seed)


def logits_of(shape, seed):
    return 3 * torch.randn(*shape, generator=rng(seed))


def kept_ids(part, logits):
    """Which ids may be drawn."""
    return part._narrowed(logits) > -torch.inf


def kept_by_sorting(logits, top_k, top_p):
    """The same by its definition, from a sorted list: `b n v` booleans. Sums are whole numbers."""
    if 0 < top_k < logits.shape[-1]:
        least = logits.sort(descending=True).values[..., top_k - 1, None]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        descending, order = logits.sort(descending=True)
        masses = _masses(logits).gather(-1, order)
        likelier = masses.cumsum(-1) - masses
        stays = likelier < masses.sum(-1, keepdim=True).double() * top_p
        least = descending.gather(-1, stays.sum(-1, keepdim=True) - 1)
        logits = logits.masked_fill(logits < least, -torch.inf)
    return logits > -torch.inf


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


alike = st.sampled_from([-torch.inf, -1e30, -2.0, -0.0, 0.0, 1e-45, 1.0, 1.0000001, 3.0])
anything = st.floats(max_value=2.0**99, width=32, allow_nan=False)
shares = st.sampled_from([1e-9, 1e-3, 0.5, 0.96, 1 - 1e-9, 1.0]) | st.floats(1e-9, 1)


@st.composite
def rows_with_ties(draw, values):
    """Logits `2 2 v`, each row with at least one that is finite."""
    v = draw(st.integers(1, 12))
    rows = draw(st.lists(st.lists(values, min_size=v, max_size=v), min_size=4, max_size=4))
    logits = torch.tensor(rows).view(2, 2, v)
    return torch.where((logits > -torch.inf).any(-1, keepdim=True), logits, 0.0)


@given(logits=rows_with_ties(alike) | rows_with_ties(anything), top_k=st.integers(0, 13), p=shares)
def test_what_is_kept_is_what_sorting_keeps_ties_included(logits, top_k, p):
    kept = kept_ids(sampler(top_k=top_k, top_p=p), logits)
    assert torch.equal(kept, kept_by_sorting(logits, top_k, p))
    assert kept.gather(-1, logits.argmax(-1, keepdim=True)).all()


@pytest.mark.parametrize("top_k", [0, 1, 900, 4095, 4096, 5000])
@pytest.mark.parametrize("top_p", [1e-9, 0.5, 0.96, 1 - 1e-6, 1.0])
def test_of_the_published_vocabulary_is_kept_what_sorting_keeps(top_k, top_p):
    smooth = 3 * torch.randn(2, 8, 4096, generator=rng(0))
    coarse = (smooth * 8).round() / 8  # hundreds of ties a value
    for logits in (smooth, coarse, smooth.bfloat16().float(), 1e-3 * smooth, 100 * smooth):
        kept = kept_ids(sampler(top_k=top_k, top_p=top_p), logits)
        assert torch.equal(kept, kept_by_sorting(logits, top_k, top_p))


@given(shape=shapes, seed=seeds, top_k=st.integers(0, 50), top_p=st.floats(0.01, 0.9999))
def test_what_is_kept_is_exact_up_to_the_rounding_of_float32(shape, seed, top_k, top_p):
    logits = logits_of(shape, seed)
    kept = kept_ids(sampler(top_k=top_k, top_p=top_p), logits)
    order = logits.argsort(descending=True)[..., : top_k or None]
    masses = logits.gather(-1, order).double().softmax(-1)
    excess = masses.cumsum(-1) - masses - top_p
    found = kept.gather(-1, order)
    assert (found == (excess < 0))[excess.abs() > 1e-6].all()
    assert (kept.sum(-1) == found.sum(-1)).all()


@given(value=st.floats(-100, 100, width=32), top_k=st.integers(0, 9), top_p=shares)
def test_equal_logits_stay_together(value, top_k, top_p):
    assert kept_ids(sampler(top_k=top_k, top_p=top_p), torch.full((1, 2, 9), value)).all()


@given(seed=seeds, top_k=st.integers(1, 9))
def test_the_order_of_the_ids_does_not_matter(seed, top_k):
    logits = logits_of((1, 5, 30), seed).round()
    shuffled = torch.randperm(30, generator=rng(seed))
    part = sampler(top_k=top_k, top_p=0.7)
    assert torch.equal(kept_ids(part, logits)[..., shuffled], kept_ids(part, logits[..., shuffled]))


def draws_like_multinomial(device):
    logits = logits_of((4, 64, 500), 0).to(device)
    part = sampler(top_k=100, top_p=0.9)
    first, second = (torch.Generator(device).manual_seed(5) for _ in range(2))
    for _ in range(3):
        rows = part._narrowed(logits).softmax(-1).flatten(0, 1)
        published = torch.multinomial(rows, 1, replacement=True, generator=second).view(4, 64)
        assert torch.equal(part.draw(logits, 0.5, first), published)


def test_the_ids_are_those_that_multinomial_would_draw():
    draws_like_multinomial("cpu")


@pytest.mark.gpu
def test_on_a_gpu_the_ids_are_those_that_multinomial_would_draw():
    draws_like_multinomial("cuda")


@pytest.mark.gpu
def test_a_gpu_keeps_what_sorting_keeps_and_is_not_waited_for():
    logits, generator = logits_of((4, 64, 4096), 0).cuda(), torch.Generator("cuda").manual_seed(0)
    for settings in ({"top_k": 900, "top_p": 0.96}, {"top_k": 0, "top_p": 0.5}):
        part = sampler(**settings)
        part.draw(logits, 0.5, generator)
        torch.cuda.set_sync_debug_mode("error")
        try:
            kept, ids = kept_ids(part, logits), part.draw(logits, 0.5, generator)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(kept, kept_by_sorting(logits, **settings))
        assert kept.gather(-1, ids[..., None]).all()


def test_the_draws_of_what_is_kept_pass_a_chi_square_test():
    logits = logits_of((1, 1, 40), 3)
    part = sampler(top_k=20, top_p=0.95)
    expected = part._narrowed(logits).softmax(-1).flatten()
    drawn = part.draw(logits.expand(1, 200_000, 40), 0.5, rng(0))
    counts, kept = drawn.flatten().bincount(minlength=40), expected > 0
    assert counts[~kept].sum() == 0 and kept.sum() < 20
    frequencies = expected[kept].double() / expected[kept].double().sum()
    assert chisquare(counts[kept], 200_000 * frequencies).pvalue > 0.01


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


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.7, 0.96, 1 - 1e-9])
@pytest.mark.parametrize("few", [1, 3, 64])
def test_a_few_of_the_likeliest_tell_what_the_search_of_all_tells(monkeypatch, few, top_p):
    monkeypatch.setattr(likeliest, "FEW", few)
    rng = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.0, 0.1, 1.0, 3.0, 30.0])[:, None, None]
    logits = spread * torch.randn(5, 20, 33, generator=rng)
    logits[:, ::2] = logits[:, ::2].round()  # ties
    logits[:, 3, :-1], logits[:, 5, 4:] = -torch.inf, -torch.inf
    masses = _masses(logits)
    enough = masses.sum(dim=-1, keepdim=True).double() * top_p
    found = likeliest._least_of_few(logits, masses, enough)
    assert torch.equal(found, likeliest._least(logits, masses, enough))
