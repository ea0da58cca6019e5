"""Layouts and masks, over drawn pyramids and raster orders."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sandbox import Layout, Mask, Step

seeds = st.integers(0, 2**31 - 1)


@st.composite
def pyramids(draw):
    """Growing maps, square or not, with repeated heights or widths allowed."""
    grows = st.tuples(st.integers(0, 3), st.integers(0, 3)).filter(any)
    sides = [draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))]
    for height, width in draw(st.lists(grows, max_size=4)):
        sides.append((sides[-1][0] + height, sides[-1][1] + width))
    return Layout.pyramid(*sides)


@st.composite
def rasters(draw):
    height, width = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    order = draw(st.none() | st.permutations(range(height * width)))
    return Layout.raster(height, width, order)


@st.composite
def partial_maps(draw):
    """Layouts that are neither: every step fills a drawn share of its map."""
    steps = []
    for _ in range(draw(st.integers(1, 5))):
        height, width = draw(st.integers(1, 4)), draw(st.integers(1, 4))
        cells = draw(st.permutations(range(height * width)))
        steps.append(Step(height, width, tuple(cells[: draw(st.integers(1, height * width))])))
    return Layout(tuple(steps))


layouts = pyramids() | rasters() | partial_maps()


@given(layouts)
def test_spans_tile_the_sequence(layout):
    tokens = [token for span in layout.spans for token in range(span.start, span.stop)]
    assert tokens == list(range(layout.seq_len))
    assert tuple(span.stop - span.start for span in layout.spans) == layout.lens
    assert layout.lens == tuple(len(step.cells) for step in layout.steps)


@given(layouts)
def test_mask_rows_only_grow_and_steps_are_seen_whole(layout):
    mask = layout.mask()
    assert mask.shape == (layout.seq_len, layout.seq_len)
    assert bool((mask[1:] >= mask[:-1]).all())
    for span in layout.spans:
        assert bool(mask[span, : span.stop].all())
        assert not mask[span, span.stop :].any()


@given(rasters())
def test_a_raster_is_causal_and_names_every_cell_once(layout):
    num = layout.seq_len
    assert torch.equal(layout.mask(), torch.ones(num, num).tril().bool())
    assert set(layout.lens) == {1} and layout.num_levels == 1
    assert sorted(cell for step in layout.steps for cell in step.cells) == list(range(num))


def test_a_raster_without_an_order_goes_row_by_row():
    assert [step.cells for step in Layout.raster(2, 3).steps] == [(i,) for i in range(6)]


@given(pyramids())
def test_a_pyramid_has_one_level_a_step_and_ends_at_its_size(layout):
    assert layout.level_of_step == tuple(range(len(layout.steps)))
    assert layout.num_levels == len(layout.steps)
    assert layout.size == (layout.steps[-1].height, layout.steps[-1].width)
    assert layout.lens == tuple(step.height * step.width for step in layout.steps)


@given(layouts)
def test_every_token_knows_its_step_and_its_level(layout):
    steps, levels = layout.step_of(), layout.level_of()
    assert steps.shape == levels.shape == (layout.seq_len,)
    assert torch.equal(steps.bincount(), torch.tensor(layout.lens))
    assert levels.tolist() == [layout.level_of_step[step] for step in steps]
    assert int(levels.max()) + 1 == layout.num_levels


@given(layouts)
def test_levels_change_exactly_where_the_map_changes(layout):
    for index, (before, after) in enumerate(zip(layout.steps, layout.steps[1:], strict=False)):
        moved = (before.height, before.width) != (after.height, after.width)
        assert layout.level_of_step[index + 1] - layout.level_of_step[index] == moved


@given(layouts)
def test_centers_lie_inside_the_image_at_their_cells(layout):
    centers = layout.centers()
    assert centers.shape == (layout.seq_len, 2)
    for step, span in zip(layout.steps, layout.spans, strict=True):
        rows = centers[span, 0] * step.height - 0.5
        columns = centers[span, 1] * step.width - 0.5
        found = (rows.round() * step.width + columns.round()).long()
        assert tuple(found.tolist()) == step.cells
        assert torch.allclose(rows, rows.round(), atol=1e-5)


@given(pyramids())
def test_the_centers_of_a_whole_map_balance_at_the_middle(layout):
    for span in layout.spans:
        assert torch.allclose(layout.centers()[span].mean(0), torch.tensor([0.5, 0.5]), atol=1e-6)


def test_published_layout_has_680_tokens():
    layout = Layout.pyramid(1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    assert layout.seq_len == 680 and layout.num_levels == 10 and layout.size == (16, 16)


@given(layouts)
def test_equal_layouts_are_equal_and_hash_alike(layout):
    again = Layout(tuple(Step(s.height, s.width, s.cells) for s in layout.steps))
    assert again == layout and hash(again) == hash(layout)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Layout(()), "at least one step"),
        (lambda: Layout.pyramid(), "at least one step"),
        (lambda: Layout.pyramid(2, 1), "must grow"),
        (lambda: Layout.pyramid(2, 2), "must grow"),
        (lambda: Layout.pyramid((1, 3), (2, 2)), "must grow"),
        (lambda: Layout.pyramid(0), "a map"),
        (lambda: Layout.raster(2, 2, [0, 1, 2]), "each of the 4 cells once"),
        (lambda: Layout.raster(2, 2, [0, 1, 2, 2]), "each of the 4 cells once"),
        (lambda: Layout.raster(2, 2, [1, 2, 3, 4]), "each of the 4 cells once"),
        (lambda: Step(1, 1, ()), "at least one cell"),
        (lambda: Step(2, 2, (0, 0)), "once"),
        (lambda: Step(2, 2, (4,)), r"0\.\.3"),
        (lambda: Step(2, 2, (-1,)), r"0\.\.3"),
    ],
)
def test_impossible_layouts_are_refused_in_words(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@given(layouts)
def test_a_described_mask_is_the_layouts_own(layout):
    tensor = Mask(layout.lens).to_tensor()
    if len(layout.steps) == 1:
        assert tensor is None and bool(layout.mask().all())
    else:
        assert torch.equal(tensor, layout.mask())


@pytest.mark.parametrize(
    ("mask", "kind"),
    [
        (Mask(), "full"),
        (Mask((5,)), "full"),
        (Mask((1,)), "full"),
        (Mask((1, 1, 1)), "causal"),
        (Mask((1, 4)), "steps"),
        (Mask((2, 2)), "steps"),
        (Mask(dense=torch.eye(3).bool()), "dense"),
        (Mask((1, 1), torch.ones(2, 2).bool()), "dense"),
    ],
)
def test_a_mask_says_its_kind(mask, kind):
    assert mask.kind == kind


@given(seeds, st.integers(1, 6), st.integers(1, 6))
def test_a_dense_mask_is_handed_on_as_it_is(seed, num_queries, num_keys):
    dense = torch.rand(num_queries, num_keys, generator=torch.Generator().manual_seed(seed)) < 0.5
    assert torch.equal(Mask((1,) * num_keys, dense).to_tensor(), dense)


def test_a_mask_that_hides_nothing_is_no_tensor():
    assert Mask().to_tensor() is None and Mask((7,)).to_tensor() is None
