import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sandbox import Codebook
from sandbox_plugins.codebooks import VQ, _nearest

seeds = st.integers(0, 2**16)


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


def build(code_dim=3, **settings):
    codebook = VQ(VQ.Params(**{"vocab_size": 8, **settings}), code_dim)
    assert isinstance(codebook, Codebook)
    return codebook


def optimizer_of(codebook):
    return torch.optim.AdamW([codebook.embedding.weight], lr=1e-3)


def step(codebook, vectors, optimizer=None, progress=0.0, seed=0):
    """One training step on groups of vectors."""
    codebook.observe(vectors, [codebook.nearest(group) for group in vectors])
    rng = torch.Generator().manual_seed(seed)
    return codebook.after_step(optimizer or optimizer_of(codebook), progress, rng)


@given(seed=seeds, num=st.integers(1, 50), vocab_size=st.integers(2, 40))
def test_the_nearest_code_is_nearest(seed, num, vocab_size):
    torch.manual_seed(seed)
    codebook = build(vocab_size=vocab_size, init="normal")
    vectors = torch.randn(num, 3)
    ids = codebook.nearest(vectors)
    distances = torch.cdist(vectors.double(), codebook.embedding.weight.double())
    torch.testing.assert_close(distances.gather(1, ids[:, None])[:, 0], distances.amin(1))
    assert torch.equal(codebook.nearest(codebook.embed(ids)), ids)
    assert codebook.embed(ids.view(1, -1, 1)).shape == (1, num, 1, 3)


def test_a_large_lookup_in_pieces_is_the_lookup_in_one(monkeypatch):
    codebook, vectors = build(vocab_size=16, init="normal"), torch.randn(101, 3)
    whole = codebook.nearest(vectors)
    monkeypatch.setattr("sandbox_plugins.codebooks.MAX_DISTANCES", 64)
    assert torch.equal(codebook.nearest(vectors), whole)


def test_lookups_stay_in_float32_under_autocast_and_leave_the_settings_alone():
    codebook, vectors = build(vocab_size=64, init="normal"), torch.randn(500, 3)
    before = torch.backends.cuda.matmul.fp32_precision
    with torch.autocast("cpu", torch.bfloat16):
        ids, codes = codebook.nearest(vectors), codebook.embed(torch.arange(4))
    assert torch.equal(ids, codebook.nearest(vectors))
    assert codes.dtype == torch.float32
    assert torch.backends.cuda.matmul.fp32_precision == before


@given(seed=seeds, num_groups=st.integers(1, 5), num=st.integers(1, 20))
def test_seeding_puts_each_share_of_the_codes_among_its_groups_vectors(seed, num_groups, num):
    torch.manual_seed(seed)
    codebook = build(vocab_size=10)
    groups = [torch.randn(num, 3) + 100 * g for g in range(num_groups)]
    for g, vectors in enumerate(groups):
        codebook.seed(vectors, g, num_groups)
        assert codebook.embed(codebook.nearest(vectors)).sub(vectors).abs().max() < 20
    owner = (codebook.embedding.weight.mean(1) / 100).round().int().tolist()
    assert owner == [g for g in range(num_groups) for _ in range(*_share(10, g, num_groups))]


def _share(vocab_size, group, num_groups):
    return vocab_size * group // num_groups, vocab_size * (group + 1) // num_groups


def test_seeding_is_repeatable_and_only_for_codes_that_start_on_data():
    vectors = torch.randn(40, 3)
    first, second, uniform = build(), build(), build(init="uniform")
    before = uniform.embedding.weight.clone()
    for codebook in (first, second, uniform):
        codebook.seed(vectors, 0, 1)
    assert torch.equal(first.embedding.weight, second.embedding.weight)
    assert torch.equal(uniform.embedding.weight, before)
    assert uniform.embedding.weight.abs().max() <= 1 / 8


@given(seed=seeds, decay=st.floats(0.0, 0.99))
def test_averaged_codes_are_the_quotient_of_the_averaged_sums_and_counts(seed, decay):
    torch.manual_seed(seed)
    codebook = build(decay=decay, restart=False, init="normal")
    counts, sums = torch.ones(8), codebook.embedding.weight.clone()
    for _ in range(3):
        groups = [torch.randn(4, 3), torch.randn(40, 3)]
        hits = [torch.eye(8)[codebook.nearest(group)] for group in groups]
        n = sum(8 / 2 / len(h) * h.sum(0) for h in hits)
        s = sum(8 / 2 / len(h) * h.T @ g for h, g in zip(hits, groups, strict=True))
        counts, sums = decay * counts + (1 - decay) * n, decay * sums + (1 - decay) * s
        step(codebook, groups)
        seen = counts > 1e-3
        expected = (sums / counts[:, None])[seen]
        torch.testing.assert_close(codebook.embedding.weight[seen], expected)
    torch.testing.assert_close(codebook.usage, counts)
    assert not codebook.embedding.weight.requires_grad


def test_a_group_of_one_vector_counts_as_much_as_a_group_of_a_thousand():
    codebook = build(init="normal", decay=0.0, restart=False)
    few, many = codebook.embedding.weight[:1], codebook.embedding.weight[1:2].expand(1000, 3)
    step(codebook, [few.clone(), many.clone()])
    torch.testing.assert_close(codebook.usage, torch.tensor([4.0, 4, 0, 0, 0, 0, 0, 0]))


def test_a_batch_in_pieces_counts_as_one():
    whole, pieces, vectors = build(), build(), torch.randn(20, 3)
    pieces.load_state_dict(whole.state_dict())
    step(whole, [vectors])
    pieces.observe([vectors[:10]], [pieces.nearest(vectors[:10])])
    step(pieces, [vectors[10:]])
    torch.testing.assert_close(pieces.embedding.weight, whole.embedding.weight)


def test_dead_codes_restart_on_data_lose_their_momentum_and_spare_the_living():
    codebook = build(init="normal", update="gradient", restart_every=2, decay=0.5)
    optimizer = optimizer_of(codebook)
    codebook.embed(torch.arange(8)).sum().backward()
    optimizer.step()
    vectors = codebook.embedding.weight[:1].detach().clone()
    dead = [1, 2, 3, 4, 5, 6, 7]
    for index in range(5):
        step(codebook, [vectors, vectors], optimizer, seed=index)
    before = codebook.embedding.weight.detach().clone()
    scalars = step(codebook, [vectors, vectors], optimizer)  # the sixth: 0.5^6 < 0.05, and even
    moments = optimizer.state[codebook.embedding.weight]
    assert scalars["codes_restarted"] == 7
    torch.testing.assert_close(
        codebook.embedding.weight[dead], vectors.expand(7, 3), rtol=0.2, atol=0.1
    )
    assert torch.equal(codebook.embedding.weight[0], before[0])
    assert not moments["exp_avg"][dead].any() and not moments["exp_avg_sq"][dead].any()
    assert moments["exp_avg"][0].all()
    assert (codebook.usage[dead] == 1).all()


@pytest.mark.parametrize("settings, progress", [({"restart": False}, 0.0), ({}, 0.8)])
def test_nothing_restarts_when_switched_off_or_late_in_the_training(settings, progress):
    codebook = build(init="normal", update="gradient", restart_every=1, decay=0.0, **settings)
    before = codebook.embedding.weight.detach().clone()
    scalars = step(codebook, [torch.randn(1, 3)], progress=progress)
    assert scalars["codes_restarted"] == 0 and scalars["codes_alive"] == pytest.approx(1 / 8)
    assert torch.equal(codebook.embedding.weight, before)


def test_a_restart_draws_groups_evenly_however_many_vectors_they_have():
    codebook = build(vocab_size=2000, restart_every=1, decay=0.0, update="gradient")
    step(codebook, [torch.full((1, 3), 100.0), torch.full((500, 3), -100.0)])
    share = (codebook.embedding.weight.mean(1) > 0).float().mean()
    assert 0.45 < share < 0.55


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_training_goes_on_bit_for_bit_from_a_state_dict(update):
    groups = [[torch.randn(4, 3), torch.randn(9, 3)] for _ in range(8)]
    straight = build(restart_every=2, decay=0.5, update=update)
    straight.seed(groups[0][1], 0, 1)
    for index, vectors in enumerate(groups):
        if index == 3:
            resumed = build(restart_every=2, decay=0.5, update=update)
            resumed.observe(groups[0], [resumed.nearest(v) for v in groups[0]])  # to be forgotten
            resumed.load_state_dict(straight.state_dict())
        step(straight, vectors, seed=index)
        if index >= 3:
            step(resumed, vectors, seed=index)
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert straight.num_steps == 8


def test_a_step_without_a_batch_changes_nothing():
    codebook = build()
    assert codebook.after_step(optimizer_of(codebook), 0.0, torch.Generator()) == {}
    assert codebook.num_steps == 0


@pytest.mark.gpu
def test_lookups_are_exact_where_tf32_is_allowed():
    codebook = build(code_dim=32, vocab_size=4096, init="normal").cuda()
    vectors = torch.randn(4096, 32, device="cuda")
    exact, matmul = codebook.nearest(vectors), torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        assert torch.equal(codebook.nearest(vectors), exact)
        assert not torch.equal(_nearest(vectors, codebook.embedding.weight), exact)
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before
