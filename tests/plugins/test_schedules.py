import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox import ScaleSchedule
from sandbox_plugins.schedules import Geometric, Linear, Published, Sides


def layout_of(cls, **settings):
    schedule = cls(cls.Params(**settings))
    assert isinstance(schedule, ScaleSchedule)
    return schedule.layout()


@st.composite
def sizes(draw):
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    num_scales = draw(st.integers(1, max(height, width)))
    return {"height": height, "width": width, "num_scales": num_scales}


@pytest.mark.parametrize(
    "resolution, seq_len, side", [(256, 680, 16), (512, 2240, 32), (1024, 9451, 64)]
)
def test_the_published_pyramids_have_their_known_lengths(resolution, seq_len, side):
    layout = layout_of(Published, resolution=resolution)
    assert (layout.seq_len, layout.size) == (seq_len, (side, side))


@pytest.mark.parametrize("cls", [Linear, Geometric])
@given(size=sizes())
def test_computed_pyramids_grow_from_their_first_map_to_exactly_the_size_asked_for(cls, size):
    layout = layout_of(cls, **size)
    assert layout.size == (size["height"], size["width"])
    assert len(layout.steps) == layout.num_levels == size["num_scales"]
    longer = [max(step.height, step.width) for step in layout.steps]
    assert longer == sorted(set(longer))  # strictly


@pytest.mark.parametrize("cls", [Linear, Geometric])
@given(size=sizes())
def test_more_maps_than_cells_are_refused_with_the_limit(cls, size):
    longer = max(size["height"], size["width"])
    with pytest.raises(ValueError, match=rf"at most {longer} do"):
        cls.Params(**{**size, "num_scales": longer + 1})


def test_linear_adds_and_geometric_multiplies():
    linear = layout_of(Linear, height=16, width=16, num_scales=4)
    assert [step.height for step in linear.steps] == [1, 6, 11, 16]
    geometric = layout_of(Geometric, height=16, width=16, num_scales=5)
    assert [step.height for step in geometric.steps] == [1, 2, 4, 8, 16]
    crowded = layout_of(Geometric, height=6, width=6, num_scales=6)
    assert [step.height for step in crowded.steps] == [1, 2, 3, 4, 5, 6]


def test_the_shape_of_the_image_is_kept_on_the_way():
    layout = layout_of(Linear, height=4, width=16, num_scales=4)
    assert [(s.height, s.width) for s in layout.steps] == [(1, 1), (2, 6), (3, 11), (4, 16)]


def test_own_lists_take_squares_and_pairs_and_must_grow():
    layout = layout_of(Sides, sides=[1, [1, 2], [3, 4]])
    assert [(s.height, s.width) for s in layout.steps] == [(1, 1), (1, 2), (3, 4)]
    with pytest.raises(ValueError, match="must grow"):
        Sides.Params(sides=[1, 3, 2])
    with pytest.raises(ValueError, match="at least one cell"):
        Sides.Params(sides=[0, 2])
    with pytest.raises(ValueError, match="at least 1 item"):
        Sides.Params(sides=[])
