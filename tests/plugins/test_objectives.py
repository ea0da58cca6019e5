import torch
from hypothesis import given
from hypothesis import strategies as st

from sandbox import Layout
from sandbox_plugins.image_losses import L1, L2
from sandbox_plugins.objectives import CrossEntropy

rasters = st.builds(Layout.raster, st.integers(1, 4), st.integers(1, 4))
pyramids = st.lists(st.integers(1, 4), min_size=1, max_size=4, unique=True).map(
    lambda sides: Layout.pyramid(*sorted(sides))
)
seeds = st.integers(0, 2**16)


def build(**settings):
    return CrossEntropy(CrossEntropy.Params(**settings))


def predictions(layout, seed, b=3, v=7):
    rng = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(b, layout.seq_len, v, generator=rng)
    return logits, torch.randint(v, (b, layout.seq_len), generator=rng)


def surprise(logits, ids):
    return -logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]


@given(layout=rasters | pyramids, seed=seeds)
def test_the_loss_of_a_token_is_its_surprise(layout, seed):
    logits, ids = predictions(layout, seed)
    for dtype in (torch.int32, torch.int64):
        losses = build().losses(logits, ids.to(dtype), layout)
        torch.testing.assert_close(losses, surprise(logits, ids))


@given(layout=pyramids, seed=seeds)
def test_root_weights_make_a_scale_weigh_the_root_of_its_token_count(layout, seed):
    logits, ids = predictions(layout, seed)
    losses = build(level_weights="sqrt").losses(logits, ids, layout)
    means = torch.stack([surprise(logits, ids)[:, span].mean() for span in layout.spans])
    roots = torch.tensor(layout.lens).sqrt()
    torch.testing.assert_close(losses.mean(), (means * roots / roots.sum()).sum())


@given(layout=rasters, seed=seeds)
def test_a_single_level_is_weighed_alike_under_every_rule(layout, seed):
    logits, ids = predictions(layout, seed)
    weighed = build(level_weights="sqrt").losses(logits, ids, layout)
    torch.testing.assert_close(weighed, build().losses(logits, ids, layout))


@given(layout=pyramids, seed=seeds, share=st.floats(0.01, 0.9))
def test_label_smoothing_spreads_the_target_over_the_vocabulary(layout, seed, share):
    logits, ids = predictions(layout, seed)
    smoothed = build(label_smoothing=share).losses(logits, ids, layout)
    everywhere = -logits.log_softmax(-1).mean(-1)
    expected = (1 - share) * surprise(logits, ids) + share * everywhere
    torch.testing.assert_close(smoothed, expected)


@given(seed=seeds, weight=st.floats(0.1, 4))
def test_image_losses_are_weighted_means_over_pixels(seed, weight):
    rng = torch.Generator().manual_seed(seed)
    ours, images = torch.randn(2, 2, 3, 4, 5, generator=rng)
    l1 = L1(L1.Params(weight=weight)).loss(ours, images)
    l2 = L2(L2.Params(weight=weight)).loss(ours, images)
    torch.testing.assert_close(l1, weight * (ours - images).abs().mean())
    torch.testing.assert_close(l2, weight * (ours - images).square().mean())
    assert L1(L1.Params()).loss(images, images) == 0
