"""The codebooks that learn no code of their own: `simvq`, `fsq` and `lfq`."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sandbox import Codebook, SandboxError
from sandbox_plugins.codebooks import FSQ, LFQ, VQ, SimVQ

LOG2 = math.log(2)
seeds = st.integers(0, 2**16)


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


def fsq(*levels, scale=1.0):
    return FSQ(FSQ.Params(levels=levels, scale=scale), len(levels))


def lfq(code_dim, **settings):
    return LFQ(LFQ.Params(**settings), code_dim)


def simvq(vocab_size=16, code_dim=4):
    return SimVQ(SimVQ.Params(vocab_size=vocab_size), code_dim)


def is_a_lookup(codebook, vectors):
    """The nearest code is nearest, ids survive the round trip, any axes."""
    assert isinstance(codebook, Codebook)
    every = torch.arange(codebook.vocab_size)
    codes = codebook.embed(every).detach()
    assert len(codes.unique(dim=0)) == codebook.vocab_size
    assert torch.equal(codebook.nearest(codes), every)
    distances = torch.cdist(vectors.double(), codes.double())
    found = distances.gather(1, codebook.nearest(vectors)[:, None])[:, 0]
    torch.testing.assert_close(found, distances.amin(1), rtol=1e-5, atol=1e-6)
    assert torch.equal(codebook.embed(every.view(1, 1, -1, 1))[0, 0, :, 0], codes)


@given(
    levels=st.lists(st.integers(2, 7), min_size=1, max_size=4),
    scale=st.sampled_from([0.1, 0.3, 1.0, 5.0]),
    seed=seeds,
)
def test_rounding_finds_the_nearest_of_all_codes(levels, scale, seed):
    torch.manual_seed(seed)
    codebook = fsq(*levels, scale=scale)
    is_a_lookup(codebook, 2 * scale * torch.randn(50, len(levels)))
    codes = codebook.embed(torch.arange(codebook.vocab_size))
    torch.testing.assert_close(codes.amax(0), torch.full((len(levels),), scale))
    torch.testing.assert_close(codes.amin(0), torch.full((len(levels),), -scale))
    assert [len(channel.unique()) for channel in codes.T] == levels


@given(code_dim=st.integers(1, 9), scale=st.sampled_from([0.1, 0.3, 1.0, 5.0]), seed=seeds)
def test_signs_find_the_nearest_of_all_codes(code_dim, scale, seed):
    torch.manual_seed(seed)
    codebook = lfq(code_dim, scale=scale)
    assert codebook.vocab_size == 2**code_dim
    is_a_lookup(codebook, scale * torch.randn(50, code_dim))
    codes = codebook.embed(torch.arange(codebook.vocab_size))
    torch.testing.assert_close(codes.abs(), torch.full_like(codes, scale))


def test_vocabularies_are_the_products_of_the_levels():
    assert fsq(8, 5, 5, 5).vocab_size == 1000 and fsq(8, 8, 8, 6, 5).vocab_size == 15360
    assert lfq(10).vocab_size == 1024
    large = lfq(18)
    ids = torch.randint(2**18, (1000,))
    assert torch.equal(large.nearest(large.embed(ids)), ids)


def test_levels_that_do_not_fit_the_channels_are_refused():
    with pytest.raises(SandboxError, match=r"has 2 levels for 3 channels: set .* code_dim to 2"):
        FSQ(FSQ.Params(levels=(3, 3)), 3)
    with pytest.raises(SandboxError, match=r"32 channels are too many: .* at most 18"):
        lfq(32)
    for levels in ((1, 5), (64, 64, 65)):
        with pytest.raises(ValidationError, match="at least 2 levels a channel and at most 262144"):
            FSQ.Params(levels=levels)


@pytest.mark.parametrize("make", [lambda: fsq(4, 5, 3), lambda: lfq(3), lambda: simvq(8, 3)])
def test_lookups_compile_into_one_graph_and_stay_in_float32_under_autocast(make):
    codebook, vectors = make(), torch.randn(200, 3)
    ids = codebook.nearest(vectors)
    look = torch.compile(
        lambda v: codebook.embed(codebook.nearest(v)), fullgraph=True, backend="eager"
    )
    torch.testing.assert_close(look(vectors), codebook.embed(ids))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(codebook.nearest(vectors), ids)
        assert codebook.embed(ids).dtype == torch.float32


@pytest.mark.parametrize("make", [lambda: fsq(4, 5, 3), lambda: lfq(3), lambda: simvq(8, 3)])
def test_nothing_but_the_optimiser_moves_them(make):
    codebook, vectors = make(), torch.randn(50, 3)
    before = {name: t.clone() for name, t in codebook.state_dict().items()}
    codebook.seed(vectors, 0, 1)
    codebook.observe([vectors], [codebook.nearest(vectors)])
    assert codebook.after_step(None, 0.0, torch.Generator()) == {}
    assert all(torch.equal(t, before[name]) for name, t in codebook.state_dict().items())


@pytest.mark.parametrize("make", [lambda: fsq(4, 5, 3), lambda: lfq(3)])
def test_vectors_that_are_no_numbers_still_get_ids_of_the_vocabulary(make):
    codebook = make()
    ids = codebook.nearest(torch.full((2, 3), torch.nan))
    assert ((ids >= 0) & (ids < codebook.vocab_size)).all()


def test_the_penalty_of_signs_falls_as_they_are_sure_and_all_used():
    assert lfq(3, entropy_weight=0.0).penalty is None
    codebook = lfq(3, scale=0.5, entropy_weight=0.1, entropy_temperature=0.05)
    codes = codebook.embed(torch.arange(8))
    spread, lone = codebook.penalty([codes]), codebook.penalty([codes[:1], codes[:1]])
    torch.testing.assert_close(spread, torch.tensor(-0.1 * 3 * LOG2))
    torch.testing.assert_close(lone, torch.zeros(()), atol=1e-5, rtol=0)
    groups = [torch.randn(n, 3, requires_grad=True) for n in (1, 20)]
    codebook.penalty(groups).backward()
    assert groups[0].grad.isfinite().all() and groups[1].grad.any()


def test_many_signs_are_judged_in_bundles_whose_codes_are_all_there_are():
    codebook = lfq(11, entropy_weight=1.0)
    vectors = codebook.embed(torch.arange(2**11))
    torch.testing.assert_close(codebook.penalty([vectors]), torch.tensor(-11 * LOG2))


def test_one_gradient_moves_every_code_of_simvq():
    codebook = simvq()
    before = codebook.codes().detach().clone()
    optimizer = torch.optim.SGD(codebook.parameters(), lr=0.1)
    (codebook.embed(torch.tensor([3])) - 1).square().sum().backward()
    optimizer.step()
    assert (codebook.codes() != before).any(1).all()
    assert not codebook.frozen.requires_grad


def test_simvq_is_published_as_the_table_of_its_codes():
    codebook, table = simvq(), VQ(VQ.Params(vocab_size=16), 4)
    table.embedding.weight.copy_(codebook.published_codes())
    vectors = torch.randn(100, 4)
    ids = codebook.nearest(vectors)
    assert torch.equal(table.nearest(vectors), ids)
    assert torch.equal(table.embed(ids), codebook.embed(ids))
    assert not codebook.published_codes().requires_grad


def test_levels_are_not_published_and_not_loaded_for_others():
    for codebook, name in ((fsq(3, 4), "fsq"), (lfq(2), "lfq")):
        with pytest.raises(ValueError, match=f"`{name}` has levels"):
            codebook.published_codes()
    with pytest.raises(SandboxError, match=r"codebook.levels: \[3, 4\]`, the recipe has .*4, 3"):
        fsq(4, 3).load_state_dict(fsq(3, 4).state_dict())
    with pytest.raises(SandboxError, match=r"codebook.scale: 0.5`, the recipe has `scale: 0.25`"):
        lfq(2, scale=0.25).load_state_dict(lfq(2, scale=0.5).state_dict())
    fsq(4, 3, scale=0.3).load_state_dict(fsq(4, 3, scale=0.3).state_dict())
