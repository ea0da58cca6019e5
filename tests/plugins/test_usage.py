"""Codebook usage against counting by hand."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sandbox import Layout
from sandbox_plugins.tasks.usage import CodebookUsage, usage_rows

LAYOUTS = [Layout.pyramid(1, 2, 3), Layout.pyramid((1, 2), (2, 3)), Layout.raster(2, 3)]


def draw_ids(seed, count, layout, vocab_size):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (count, layout.seq_len), generator=rng)


@given(
    seed=st.integers(0, 2**31),
    layout=st.sampled_from(LAYOUTS),
    vocab_size=st.integers(1, 40),
    count=st.integers(1, 9),
    batch_size=st.integers(1, 9),
)
def test_usage_is_what_counting_by_hand_gives_however_batches_are_cut(
    seed, layout, vocab_size, count, batch_size
):
    ids = draw_ids(seed, count, layout, vocab_size)
    usage = CodebookUsage(layout, vocab_size)
    for batch in ids.split(batch_size):
        usage.update(batch)
    result = usage.compute()
    for level in range(layout.num_levels):
        drawn = Counter(ids[:, layout.level_of() == level].flatten().tolist())
        draws = drawn.total()
        entropy = -sum(n / draws * math.log(n / draws) for n in drawn.values())
        assert result["draws"][level] == draws
        assert result["used_codes"][level] == len(drawn)
        assert result["usage"][level] == pytest.approx(len(drawn) / min(vocab_size, draws))
        assert result["entropy_nats"][level] == pytest.approx(entropy, abs=1e-12)
        assert result["perplexity"][level] == pytest.approx(math.exp(entropy))
    assert {len(values) for values in result.values()} == {layout.num_levels}


def test_a_level_that_uses_every_code_equally_has_full_usage_and_perplexity():
    layout = Layout.pyramid(1, 2)
    usage = CodebookUsage(layout, 4)
    usage.update(torch.tensor([[3, 0, 1, 2, 3], [3, 3, 2, 1, 0]]))
    result = usage.compute()
    assert result["usage"] == [0.5, 1.0]  # the first level drew twice, so at most two codes
    assert result["perplexity"] == pytest.approx([1.0, 4.0])
    rows = usage_rows(layout, usage)
    assert [row["entropy"] for row in rows] == [0.0, round(math.log(4), 3)]
    assert usage.dead_codes() == 0


def test_a_code_is_dead_where_no_level_draws_it():
    usage = CodebookUsage(Layout.pyramid(1, 2), 6)
    usage.update(torch.tensor([[3, 0, 0, 0, 0], [3, 0, 1, 1, 1]]))
    assert usage.dead_codes() == 3


def test_ids_of_another_layout_or_outside_the_vocabulary_are_refused():
    usage = CodebookUsage(Layout.pyramid(1, 2), 4)
    with pytest.raises(ValueError, match="5 tokens"):
        usage.update(torch.zeros(2, 6, dtype=torch.long))
    with pytest.raises(RuntimeError):
        usage.update(torch.full((1, 5), 4))  # would otherwise count for the next level
    with pytest.raises(ValueError, match="at least one image"):
        usage.compute()


@pytest.mark.gpu
def test_counting_on_a_gpu_equals_counting_on_the_cpu_and_does_not_wait():
    layout = Layout.pyramid(1, 2, 3)
    ids = draw_ids(0, 64, layout, 50)
    here, there = CodebookUsage(layout, 50), CodebookUsage(layout, 50)
    there.update(ids[:1].cuda())
    here.update(ids[:1])
    on_device = ids.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        there.update(on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    here.update(ids)
    assert here.compute() == there.compute()
