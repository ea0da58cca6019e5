from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sandbox import Part, TrainableTokenizer
from sandbox_plugins.autoencoders import Patch
from sandbox_plugins.codebooks import VQ
from sandbox_plugins.raster.orders import Raster
from sandbox_plugins.raster.tokenizer import RasterTokenizer
from sandbox_plugins.schedules import Sides

ORDERS = ["row", "snake", "spiral", "random"]
seeds = st.integers(0, 2**16)
sides = st.integers(1, 6)


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


def path(height, width, order, **settings):
    """The cells as (row, column), in the order in which they are filled."""
    layout = Raster(Raster.Params(height=height, width=width, order=order, **settings)).layout()
    assert layout.size == (height, width) and set(layout.lens) == {1}
    return [divmod(step.cells[0], width) for step in layout.steps]


def build(height=2, width=3, order="row", lookup_noise=0.0, **codebook):
    tokenizer = RasterTokenizer(
        RasterTokenizer.Params(
            autoencoder=Part(
                "patch", Patch, Patch.Params(patch=2, ch=8, num_res_blocks=0, code_dim=3)
            ),
            codebook=Part("vq", VQ, VQ.Params(**{"vocab_size": 16, **codebook})),
            schedule=Part("raster", Raster, Raster.Params(height=height, width=width, order=order)),
            lookup_noise=lookup_noise,
        )
    )
    assert isinstance(tokenizer, TrainableTokenizer)
    return tokenizer


@st.composite
def tokenizers(draw):
    torch.manual_seed(draw(seeds))
    tokenizer = build(draw(sides), draw(sides), draw(st.sampled_from(ORDERS)))
    torch.nn.init.normal_(tokenizer.codebook.embedding.weight, std=0.3)
    return tokenizer.eval()


@given(height=sides, width=sides, order=st.sampled_from(ORDERS))
def test_every_order_fills_every_cell_once(height, width, order):
    cells = path(height, width, order)
    assert sorted(cells) == [(row, column) for row in range(height) for column in range(width)]


@given(height=sides, width=sides, order=st.sampled_from(["snake", "spiral"]))
def test_snakes_and_spirals_move_from_neighbour_to_neighbour(height, width, order):
    check_neighbours(path(height, width, order))


@given(power=st.integers(0, 5))
def test_the_hilbert_curve_moves_from_neighbour_to_neighbour_and_fills_quarter_by_quarter(power):
    side = 2**power
    cells = path(side, side, "hilbert")
    check_neighbours(cells)
    assert len(set(cells)) == side**2
    if power:
        quarters = [(2 * row // side, 2 * column // side) for row, column in cells]
        changes = sum(a != b for a, b in pairwise(quarters))
        assert changes == 3


def check_neighbours(cells):
    for (row, column), (next_row, next_column) in pairwise(cells):
        assert abs(row - next_row) + abs(column - next_column) == 1


def test_orders_on_a_small_map():
    assert path(2, 2, "row") == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert path(2, 2, "snake") == [(0, 0), (0, 1), (1, 1), (1, 0)]
    assert path(3, 2, "spiral") == [(0, 0), (0, 1), (1, 1), (2, 1), (2, 0), (1, 0)]
    assert path(4, 4, "random") == path(4, 4, "random") != path(4, 4, "random", seed=1)


@pytest.mark.parametrize("height, width", [(4, 2), (3, 3), (12, 12)])
def test_a_hilbert_curve_on_another_map_is_refused(height, width):
    with pytest.raises(ValueError, match="power of two, got"):
        Raster.Params(height=height, width=width, order="hilbert")


@given(tokenizer=tokenizers())
def test_whole_contexts_are_the_stepwise_ones_and_painting_is_decoding(tokenizer):
    ids = torch.randint(16, (2, tokenizer.layout.seq_len))
    canvas, stepwise = tokenizer.canvas(2), []
    for step, span in enumerate(tokenizer.layout.spans):
        stepwise.append(tokenizer.context(canvas, step))
        before = canvas.clone()
        painted = tokenizer.paint(canvas, tokenizer.embed(ids[:, span]), step)
        assert torch.equal(canvas, before)
        canvas = painted
    torch.testing.assert_close(tokenizer.contexts(ids), torch.cat(stepwise, 1))
    torch.testing.assert_close(tokenizer.decode(ids), tokenizer.render(canvas))
    assert not stepwise[0].any()


@given(tokenizer=tokenizers())
def test_the_order_changes_where_ids_stand_and_nothing_else(tokenizer):
    images = torch.rand(2, 3, *tokenizer.image_size) * 2 - 1
    ids = tokenizer.encode(images)
    rows = build(*tokenizer.layout.size)
    rows.load_state_dict(tokenizer.state_dict())
    by_row = rows.eval().encode(images)
    for step, place in enumerate(tokenizer.layout.steps):
        assert torch.equal(ids[:, step], by_row[:, place.cells[0]])
    torch.testing.assert_close(tokenizer.decode(ids), rows.decode(by_row))
    assert torch.equal(ids, torch.cat([tokenizer.encode(image[None]) for image in images]))


@given(tokenizer=tokenizers())
def test_the_loss_pulls_both_ways_and_gradients_pass_straight_through(tokenizer):
    images = torch.rand(2, 3, *tokenizer.image_size) * 2 - 1
    made = tokenizer.reconstruct(images)
    assert torch.equal(made.ids, tokenizer.encode(images))
    torch.testing.assert_close(made.images.clamp(-1, 1), tokenizer.decode(made.ids))
    features = tokenizer.autoencoder.encode(images)
    codes = tokenizer.embed(tokenizer.codebook.nearest(features.permute(0, 2, 3, 1).flatten(0, 2)))
    error = (features.permute(0, 2, 3, 1).flatten(0, 2) - codes).square().mean()
    torch.testing.assert_close(made.loss, 1.25 * error)
    made.images.sum().backward()
    assert tokenizer.autoencoder.encoder.conv_in.weight.grad.any()


def test_training_lowers_the_error_and_uses_the_codes():
    tokenizer = build(4, 4).train()
    images = torch.rand(64, 3, 8, 8).round() * 2 - 1
    optimizer = torch.optim.AdamW([p for p in tokenizer.parameters() if p.requires_grad], lr=5e-3)
    rng, errors = torch.Generator().manual_seed(0), []
    tokenizer.initialise([images])
    for step in range(30):
        made = tokenizer.reconstruct(images)
        errors.append((made.images - images).square().mean())
        optimizer.zero_grad()
        (errors[-1] + made.loss).backward()
        optimizer.step()
        scalars = tokenizer.after_step(optimizer, step / 30, rng)
    assert errors[-1] < 0.8 * errors[0]
    assert scalars["codes_alive"] > 0.8


def test_maps_that_grow_and_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match="var-vq"):
        RasterTokenizer.Params(
            autoencoder=Part("patch", Patch, Patch.Params()),
            codebook=Part("vq", VQ, VQ.Params()),
            schedule=Part("sides", Sides, Sides.Params(sides=(1, 2))),
        )
    with pytest.raises(ValueError, match="images of 4 x 6 px, got 8 x 8"):
        build().encode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="expected 6 ids an image, got 5"):
        build().decode(torch.zeros(1, 5, dtype=torch.int64))


def test_lookup_noise_disturbs_what_is_decoded_and_only_in_training():
    tokenizer, plain = build(lookup_noise=2.0), build()
    plain.load_state_dict(tokenizer.state_dict())
    images = torch.rand(64, 3, *tokenizer.image_size) * 2 - 1
    for each in (tokenizer, plain):
        each.initialise([images])
    undisturbed = plain.eval().reconstruct(images)
    assert torch.equal(tokenizer.eval().reconstruct(images).images, undisturbed.images)
    made = tokenizer.train().reconstruct(images)
    assert not torch.allclose(made.images, undisturbed.images)
    assert torch.equal(made.ids, undisturbed.ids)
