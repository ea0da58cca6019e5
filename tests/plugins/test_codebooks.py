"""The codebook `vq`: lookups, the start, averages, restarts, the entropy penalty."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from sandbox import Codebook, SandboxError
from sandbox_plugins.codebooks import VQ, entropy
from sandbox_plugins.codebooks import lookup as lookups
from sandbox_plugins.codebooks.entropy import entropy_gap, entropy_penalty

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


@given(seed=seeds, num=st.integers(1, 50), vocab_size=st.integers(2, 40))
def test_by_cosine_the_nearest_code_has_the_smallest_angle_and_keeps_its_length(
    seed, num, vocab_size
):
    torch.manual_seed(seed)
    codebook = build(vocab_size=vocab_size, init="normal", lookup="cosine")
    vectors, codes = torch.randn(num, 3), codebook.embedding.weight
    ids = codebook.nearest(vectors)
    cosines = F.cosine_similarity(vectors[:, None].double(), codes[None].double(), dim=2)
    torch.testing.assert_close(cosines.gather(1, ids[:, None])[:, 0], cosines.amax(1))
    assert torch.equal(codebook.nearest(vectors * 100), ids)
    assert torch.equal(codebook.embed(ids), codes[ids])


def test_the_two_lookups_differ_where_codes_have_other_lengths():
    book = {"vocab_size": 2, "init": "normal"}
    euclidean, cosine = build(2, **book), build(2, lookup="cosine", **book)
    for codebook in (euclidean, cosine):
        codebook.embedding.weight.copy_(torch.tensor([[10.0, 0.0], [0.5, 1.0]]))
    vector = torch.tensor([[1.0, 0.1]])
    assert euclidean.nearest(vector) == 1 and cosine.nearest(vector) == 0


@pytest.mark.parametrize("lookup", ["euclidean", "cosine"])
def test_lookup_and_penalty_compile_into_one_graph(lookup):
    codebook = build(vocab_size=16, init="normal", lookup=lookup, entropy_weight=0.1)
    vectors = torch.randn(20, 3)
    compiled = torch.compile(
        lambda v: (codebook.nearest(v), codebook.penalty([v, v[:3]])),
        fullgraph=True,
        backend="eager",
    )
    ids, penalty = compiled(vectors)
    assert torch.equal(ids, codebook.nearest(vectors))
    torch.testing.assert_close(penalty, codebook.penalty([vectors, vectors[:3]]))


def test_a_large_lookup_in_pieces_is_the_lookup_in_one(monkeypatch):
    codebook, vectors = build(vocab_size=16, init="normal"), torch.randn(101, 3)
    whole = codebook.nearest(vectors)
    monkeypatch.setattr(lookups, "MAX_DISTANCES", 64)
    assert torch.equal(codebook.nearest(vectors), whole)


def test_lookups_stay_in_float32_under_autocast_and_leave_the_settings_alone():
    codebook, vectors = build(vocab_size=64, init="normal"), torch.randn(500, 3)
    before = torch.backends.cuda.matmul.fp32_precision
    with torch.autocast("cpu", torch.bfloat16):
        ids, codes = codebook.nearest(vectors), codebook.embed(torch.arange(4))
    assert torch.equal(ids, codebook.nearest(vectors))
    assert codes.dtype == torch.float32
    assert torch.backends.cuda.matmul.fp32_precision == before


@given(seed=seeds, num_groups=st.integers(1, 5), num=st.integers(10, 30))
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


def test_too_few_vectors_and_infinite_ones_are_refused_before_any_code_moves():
    codebook = build(vocab_size=10)
    before = codebook.embedding.weight.clone()
    with pytest.raises(ValueError, match=r"scale 1 has 2 vectors for 5 codes.* at least 3 times"):
        codebook.seed(torch.randn(2, 3), 0, 2)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="scale 2 has vectors that are not finite"):
            codebook.seed(torch.full((9, 3), bad), 1, 2)
    assert torch.equal(codebook.embedding.weight, before)
    build(vocab_size=10, init="uniform").seed(torch.randn(2, 3), 0, 2)


def test_seeding_by_cosine_gives_every_direction_a_code_of_the_length_of_its_vectors():
    directions = torch.randn(4, 8)
    codebook = build(8, vocab_size=8, lookup="cosine")
    vectors = directions[torch.arange(400) % 4] * (1 + torch.rand(400, 1))
    codebook.seed(vectors, 0, 1)
    found = codebook.embed(codebook.nearest(vectors))
    assert F.cosine_similarity(found, vectors).min() > 0.999
    lengths = found.norm(dim=1) / directions[torch.arange(400) % 4].norm(dim=1)
    assert lengths.min() > 1 and lengths.max() < 2


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


def test_statistics_by_tokens_let_the_large_group_count_more():
    codebook = build(init="normal", decay=0.0, restart=False, balance="tokens")
    few, many = codebook.embedding.weight[:1], codebook.embedding.weight[1:2].expand(1000, 3)
    step(codebook, [few.clone(), many.clone()])
    expected = 8 / 1001 * torch.tensor([1.0, 1000, 0, 0, 0, 0, 0, 0])
    torch.testing.assert_close(codebook.usage, expected)


def test_averages_by_cosine_are_of_the_vectors_as_they_are():
    codebook = build(2, vocab_size=2, decay=0.0, restart=False, lookup="cosine")
    codebook.embedding.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    step(codebook, [torch.tensor([[2.0, 0.1], [4.0, 0.1], [0.1, 7.0]])])
    expected = torch.tensor([[3.0, 0.1], [0.1, 7.0]])
    torch.testing.assert_close(codebook.embedding.weight.data, expected)


def test_what_is_noted_keeps_no_graph_and_does_not_grow():
    codebook, vectors = build(init="normal"), torch.randn(9, 3, requires_grad=True)
    for _ in range(5):
        codebook.observe([vectors * 2], [codebook.nearest(vectors)])
    assert len(codebook._vectors) == 1 and len(codebook._noted) == 2
    assert not any(t.requires_grad for t in [*codebook._vectors, *codebook._noted])


def test_a_batch_in_pieces_counts_as_one():
    whole, pieces, vectors = build(), build(), torch.randn(20, 3)
    pieces.load_state_dict(whole.state_dict())
    step(whole, [vectors])
    pieces.observe([vectors[:10]], [pieces.nearest(vectors[:10])])
    step(pieces, [vectors[10:]])
    torch.testing.assert_close(pieces.embedding.weight, whole.embedding.weight)


def test_dead_codes_restart_on_data_lose_their_momentum_and_spare_the_living():
    codebook = build(init="normal", update="gradient", restart_every=6, decay=0.5)
    optimizer = optimizer_of(codebook)
    codebook.embed(torch.arange(8)).sum().backward()
    optimizer.step()
    vectors = codebook.embedding.weight[:1].detach().clone()
    dead = [1, 2, 3, 4, 5, 6, 7]
    for index in range(5):
        step(codebook, [vectors, vectors], optimizer, seed=index)
    before = codebook.embedding.weight.detach().clone()
    scalars = step(codebook, [vectors, vectors], optimizer)  # the sixth
    moments = optimizer.state[codebook.embedding.weight]
    assert scalars["codes_restarted"] == 7
    torch.testing.assert_close(
        codebook.embedding.weight[dead], vectors.expand(7, 3), rtol=0.2, atol=0.1
    )
    assert torch.equal(codebook.embedding.weight[0], before[0])
    assert not moments["exp_avg"][dead].any() and not moments["exp_avg_sq"][dead].any()
    assert moments["exp_avg"][0].all()
    assert (codebook.usage[dead] == 1).all()


def test_codes_that_are_never_chosen_restart_at_the_first_chance_and_then_get_time():
    codebook = build(init="normal", update="gradient", restart_every=20)
    optimizer = optimizer_of(codebook)
    vectors = codebook.embedding.weight[:1].detach().clone()
    restarted = [
        float(step(codebook, [vectors, vectors], optimizer)["codes_restarted"]) for _ in range(60)
    ]
    assert restarted[19] == 7 and sum(restarted) == 7


@pytest.mark.parametrize("settings, progress", [({"restart": False}, 0.0), ({}, 0.8)])
def test_nothing_restarts_when_switched_off_or_late_in_the_training(settings, progress):
    codebook = build(init="normal", update="gradient", restart_every=1, decay=0.0, **settings)
    before = codebook.embedding.weight.detach().clone()
    scalars = step(codebook, [torch.randn(1, 3)], progress=progress)
    assert scalars["codes_restarted"] == 0 and scalars["codes_alive"] == pytest.approx(1 / 8)
    assert torch.equal(codebook.embedding.weight, before)


@pytest.mark.parametrize("balance, low, high", [("scales", 0.45, 0.55), ("tokens", 0.0, 0.01)])
def test_a_restart_draws_groups_evenly_or_tokens(balance, low, high):
    codebook = build(
        vocab_size=2000, restart_every=1, decay=0.0, update="gradient", balance=balance
    )
    step(codebook, [torch.full((1, 3), 100.0), torch.full((500, 3), -100.0)])
    share = (codebook.embedding.weight.mean(1) > 0).float().mean()
    assert low <= share < high


def test_without_a_weight_there_is_no_penalty():
    assert build().penalty is None


@pytest.mark.parametrize("update", ["ema", "gradient"])
@pytest.mark.parametrize("lookup", ["euclidean", "cosine"])
def test_the_penalty_has_gradients_to_vectors_and_learning_codes(update, lookup):
    codebook = build(init="normal", update=update, lookup=lookup, entropy_weight=0.5)
    groups = [torch.randn(n, 3, requires_grad=True) for n in (1, 20)]
    codebook.penalty(groups).backward()
    assert groups[1].grad.isfinite().all() and groups[1].grad.any()
    assert groups[0].grad.isfinite().all()
    if update == "gradient":
        assert codebook.embedding.weight.grad.isfinite().all()
        assert codebook.embedding.weight.grad.any()


def test_the_penalty_falls_as_assignments_are_sure_and_all_codes_are_used():
    codes = torch.eye(4) * 10
    spread = entropy_gap(codes, codes, 0.01)
    torch.testing.assert_close(spread, torch.tensor(-math.log(4)))
    lone = entropy_gap(codes[:1].expand(4, 4), codes, 0.01)
    unsure = entropy_gap(torch.zeros(4, 4), codes, 0.01)
    torch.testing.assert_close(torch.stack([lone, unsure]), torch.zeros(2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("lookup", ["euclidean", "cosine"])
def test_the_penalty_is_its_formula_averaged_over_groups_whatever_their_size(lookup):
    codes, groups = torch.randn(6, 3), [torch.randn(2, 3), torch.randn(50, 3)]
    gaps = []
    for group in groups:
        seen, known = group.double(), codes.double()
        if lookup == "cosine":
            seen, known = F.normalize(seen, dim=1), F.normalize(known, dim=1)
        squares = torch.cdist(seen, known).square()
        odds = (-squares / (0.1 * squares.mean())).softmax(1)
        mean = odds.mean(0)
        gaps.append((-odds * odds.log()).sum(1).mean() + (mean * mean.log()).sum())
    found = entropy_penalty(groups, codes, lookup, 0.1)
    torch.testing.assert_close(found, torch.stack(gaps).mean().float())


def test_a_penalty_in_pieces_has_the_value_and_gradient_of_the_whole(monkeypatch):
    codes, vectors = torch.randn(6, 3, requires_grad=True), torch.randn(50, 3, requires_grad=True)
    whole = entropy_gap(vectors, codes, 0.1)
    expected = torch.autograd.grad(whole, (vectors, codes))
    monkeypatch.setattr(entropy, "MAX_LOGITS", 6 * 7)
    pieces = entropy_gap(vectors, codes, 0.1)
    torch.testing.assert_close(pieces, whole)
    torch.testing.assert_close(torch.autograd.grad(pieces, (vectors, codes)), expected)


def test_a_scale_of_small_residuals_is_judged_as_one_of_large_ones():
    vectors, codes = torch.randn(30, 3), torch.randn(6, 3)
    small = entropy_gap(vectors / 1000, codes / 1000, 0.05)
    torch.testing.assert_close(small, entropy_gap(vectors, codes, 0.05), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("there, here", [("cosine", "euclidean"), ("euclidean", "cosine")])
def test_codes_are_not_loaded_for_another_lookup(there, here):
    with pytest.raises(SandboxError, match=f"`codebook.lookup: {there}`, the recipe has .*{here}"):
        build(lookup=here).load_state_dict(build(lookup=there).state_dict())
    build(lookup=here).load_state_dict(build(lookup=here).state_dict())


def test_codes_looked_up_by_cosine_are_not_published():
    with pytest.raises(ValueError, match=r"vq.* `lookup: cosine`"):
        build(lookup="cosine").published_codes()
    codebook = build()
    assert torch.equal(codebook.published_codes(), codebook.embedding.weight)


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
        assert not torch.equal(lookups.nearest_codes(vectors, codebook.embedding.weight), exact)
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


@pytest.mark.gpu
@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_care_never_waits_for_the_gpu_after_the_first_step(update):
    codebook = build(vocab_size=64, update=update, restart_every=2, entropy_weight=0.1).cuda()
    groups = [torch.randn(n, 3, device="cuda", requires_grad=True) for n in (8, 32, 128)]
    optimizer, rng = optimizer_of(codebook), torch.Generator("cuda").manual_seed(0)
    try:
        for index in range(6):
            torch.cuda.set_sync_debug_mode("error" if index else "default")
            codebook.penalty(groups).backward()
            codebook.observe(groups, [codebook.nearest(group) for group in groups])
            codebook.after_step(optimizer, 0.0, rng)
    finally:
        torch.cuda.set_sync_debug_mode("default")
