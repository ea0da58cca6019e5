import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sandbox import Part, TrainableTokenizer
from sandbox_plugins.autoencoders import CNN, Patch
from sandbox_plugins.codebooks import VQ
from sandbox_plugins.raster.orders import Raster
from sandbox_plugins.schedules import Published, Sides
from sandbox_plugins.var.dropout import kept_scales
from sandbox_plugins.var.estimators import ESTIMATORS
from sandbox_plugins.var.tokenizer import VarTokenizer, phi_of_step

SMALL = Patch.Params(patch=2, ch=8, num_res_blocks=0, code_dim=3)
seeds = st.integers(0, 2**16)


@st.composite
def pyramids(draw):
    """Growing maps, non-square ones included."""
    sides, side = [], (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    for _ in range(draw(st.integers(1, 4))):
        sides.append(side)
        more = draw(st.sampled_from([(1, 0), (0, 1), (1, 1), (2, 1), (1, 3)]))
        side = (side[0] + more[0], side[1] + more[1])
    return tuple(sides)


@st.composite
def tokenizers(draw):
    """Small tokenizers whose codes have the size of their features."""
    torch.manual_seed(draw(seeds))
    phi = draw(st.sampled_from(["none", "shared", "partial", "per-scale"]))
    tokenizer = build(draw(pyramids()), phi=phi, num_phi=draw(st.integers(2, 5)))
    torch.nn.init.normal_(tokenizer.codebook.embedding.weight, std=0.3)
    return tokenizer.eval()


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


def build(sides=(1, 2, 4), autoencoder=SMALL, codebook=None, **settings):
    book = VQ.Params(**{"vocab_size": 16, **(codebook or {})})
    tokenizer = VarTokenizer(
        VarTokenizer.Params(
            autoencoder=Part("patch", Patch, autoencoder)
            if isinstance(autoencoder, Patch.Params)
            else Part("cnn", CNN, autoencoder),
            codebook=Part("vq", VQ, book),
            schedule=Part("sides", Sides, Sides.Params(sides=sides)),
            **settings,
        )
    )
    assert isinstance(tokenizer, TrainableTokenizer)
    return tokenizer


def images_for(tokenizer, count=2):
    return torch.rand(count, 3, *tokenizer.image_size) * 2 - 1


def ids_for(tokenizer, count=2):
    return torch.randint(tokenizer.vocab_size, (count, tokenizer.layout.seq_len))


def canvases(tokenizer, ids):
    """The canvas before each step, and the last one."""
    found = [tokenizer.canvas(len(ids))]
    for step, span in enumerate(tokenizer.layout.spans):
        found.append(tokenizer.paint(found[-1], tokenizer.embed(ids[:, span]), step))
    return found


@pytest.mark.parametrize(
    "num_steps, expected",
    [
        (1, [0]),
        (6, [0, 0, 1, 2, 3, 3]),
        (7, [0, 0, 1, 2, 2, 3, 3]),
        (8, [0, 0, 1, 1, 2, 2, 3, 3]),
        (9, [0, 0, 1, 1, 2, 2, 2, 3, 3]),
        (10, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]),
        (14, [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]),
    ],
)
def test_four_convolutions_are_shared_as_published(num_steps, expected):
    assert list(phi_of_step(4, num_steps)) == expected


@given(num_phi=st.integers(1, 20), num_steps=st.integers(1, 20))
def test_convolutions_are_shared_in_order_and_one_a_scale_is_one_a_scale(num_phi, num_steps):
    chosen = phi_of_step(num_phi, num_steps)
    assert list(chosen) == sorted(chosen)
    assert chosen[0] >= 0 and chosen[-1] < num_phi
    assert phi_of_step(num_steps, num_steps) == tuple(range(num_steps))


@given(tokenizer=tokenizers())
def test_whole_contexts_are_the_stepwise_ones_side_by_side(tokenizer):
    ids = ids_for(tokenizer)
    before = canvases(tokenizer, ids)
    stepwise = [tokenizer.context(before[k], k) for k in range(len(tokenizer.layout.steps))]
    torch.testing.assert_close(tokenizer.contexts(ids), torch.cat(stepwise, 1))
    assert not stepwise[0].any()


@given(tokenizer=tokenizers())
def test_painting_every_step_and_rendering_is_decoding(tokenizer):
    ids = ids_for(tokenizer)
    canvas = canvases(tokenizer, ids)[-1]
    images = tokenizer.render(canvas)
    torch.testing.assert_close(images, tokenizer.decode(ids))
    assert images.shape == (2, 3, *tokenizer.image_size)
    assert images.abs().max() <= 1


@given(tokenizer=tokenizers())
def test_encoding_quantizes_what_the_scales_before_have_left(tokenizer):
    images = images_for(tokenizer)
    ids = tokenizer.encode(images)
    assert ids.shape == (2, tokenizer.layout.seq_len)
    assert ids.min() >= 0 and ids.max() < tokenizer.vocab_size
    features = tokenizer.autoencoder.encode(images)
    before = canvases(tokenizer, ids)
    for step, span in enumerate(tokenizer.layout.spans):
        pooled = tokenizer.context(features - before[step], step)
        expected = tokenizer.codebook.nearest(pooled.flatten(0, 1)).view(2, -1)
        found = tokenizer.embed(ids[:, span])
        far = (tokenizer.embed(expected) - pooled).norm(dim=-1)
        torch.testing.assert_close((found - pooled).norm(dim=-1), far)  # rounding may break a tie
    made = tokenizer.reconstruct(images)
    assert torch.equal(made.ids, ids)
    torch.testing.assert_close(made.images.clamp(-1, 1), tokenizer.decode(ids))


@given(tokenizer=tokenizers())
def test_a_batch_of_two_is_two_batches_of_one(tokenizer):
    images = images_for(tokenizer)
    ids = tokenizer.encode(images)
    assert torch.equal(ids, torch.cat([tokenizer.encode(image[None]) for image in images]))
    alone = torch.cat([tokenizer.decode(row[None]) for row in ids])
    torch.testing.assert_close(tokenizer.decode(ids), alone)


@given(tokenizer=tokenizers())
def test_the_loss_is_the_mean_over_scales_and_gradients_pass_straight_through(tokenizer):
    images = images_for(tokenizer)
    made = tokenizer.reconstruct(images)
    features = tokenizer.autoencoder.encode(images)
    sums = canvases(tokenizer, made.ids)[1:]
    expected = sum((f_k - features).square().mean() for f_k in sums) / len(sums)
    torch.testing.assert_close(made.loss, expected * (1 + tokenizer.params.beta))
    tokenizer.zero_grad()
    made.images.sum().backward()
    direct = tokenizer.autoencoder.decode(sums[-1].detach() + features - features.detach())
    expected = torch.autograd.grad(direct.sum(), tokenizer.autoencoder.encoder.conv_in.weight)[0]
    torch.testing.assert_close(tokenizer.autoencoder.encoder.conv_in.weight.grad, expected)


def test_painting_leaves_the_given_canvas_alone_and_stays_in_float32_under_autocast():
    tokenizer = build().eval()
    ids, canvas = ids_for(tokenizer), tokenizer.canvas(2)
    codes = tokenizer.embed(ids[:, :1])
    painted = tokenizer.paint(canvas, codes, 0)
    assert not canvas.any() and painted.any()
    with torch.autocast("cpu", torch.bfloat16):
        again = tokenizer.paint(canvas, codes, 0)
    assert again.dtype == torch.float32
    assert torch.equal(again, painted)


def test_codes_start_where_the_features_of_the_first_images_are():
    tokenizer = build(codebook={"vocab_size": 12}).train()
    before = tokenizer.embed(torch.arange(12)).clone()
    images = images_for(tokenizer, 8)
    tokenizer.reconstruct(images)
    assert torch.equal(tokenizer.embed(torch.arange(12)), before)
    tokenizer.initialise(images.split(3))
    seeded = tokenizer.embed(torch.arange(12)).clone()
    assert not torch.equal(seeded, before)
    tokenizer.initialise([images])
    torch.testing.assert_close(tokenizer.embed(torch.arange(12)), seeded)
    tokenizer.reconstruct(images)
    torch.testing.assert_close(tokenizer.embed(torch.arange(12)), seeded)


def test_too_few_images_to_start_from_are_refused():
    with pytest.raises(ValueError, match="init: uniform"):
        build(codebook={"vocab_size": 12}).initialise([torch.zeros(3, 3, 8, 8)])


@given(tokenizer=tokenizers())
def test_resampling_is_the_published_one_with_and_without_gradients(tokenizer):
    canvas = torch.randn(2, tokenizer.code_dim, *tokenizer.layout.size)
    for step, span in enumerate(tokenizer.layout.spans):
        codes = torch.randn(2, span.stop - span.start, tokenizer.code_dim)
        for resample, maps in ((tokenizer.pyramid.shrink, canvas), (tokenizer.pyramid.grow, codes)):
            with torch.no_grad():
                published = resample(maps, step)
            torch.testing.assert_close(resample(maps, step), published, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("setting", [{"scale_dropout": 0.9}, {"prefix_dropout": 1.0}])
def test_dropped_scales_add_nothing_and_only_in_training(setting):
    torch.manual_seed(0)
    tokenizer, plain = build(**setting), build()
    plain.load_state_dict(tokenizer.state_dict())
    images = images_for(tokenizer, 64)
    assert torch.equal(
        tokenizer.eval().reconstruct(images).images, plain.eval().reconstruct(images).images
    )
    tokenizer.train()
    kept = kept_scales(torch.zeros(4096, 1), 3, *dropouts(tokenizer))
    share = kept.mean(dim=1)
    if "scale_dropout" in setting:
        assert share[2] == 1 and 0.05 < share[0] < 0.15
    else:  # a third each keeps one, two and three scales
        assert share[0] == 1 and 0.6 < share[1] < 0.73 and 0.28 < share[2] < 0.4
    assert not torch.allclose(
        tokenizer.reconstruct(images).images, plain.reconstruct(images).images
    )


def test_lookup_noise_disturbs_what_is_decoded_and_only_in_training():
    torch.manual_seed(0)
    tokenizer, plain = build(lookup_noise=2.0), build()
    plain.load_state_dict(tokenizer.state_dict())
    images = images_for(tokenizer, 32)
    for each in (tokenizer, plain):
        each.initialise([images])
    undisturbed = plain.eval().reconstruct(images)
    assert torch.equal(tokenizer.eval().reconstruct(images).images, undisturbed.images)
    made = tokenizer.train().reconstruct(images)
    assert not torch.allclose(made.images, undisturbed.images)
    first = tokenizer.layout.spans[0]  # what is noted are the right ids, not those decoded
    assert torch.equal(made.ids[:, first], undisturbed.ids[:, first])


def dropouts(tokenizer):
    p = tokenizer.params
    return p.scale_dropout, p.prefix_dropout, p.prefix_min


def test_the_rotation_gives_the_codes_and_turns_the_gradient_as_features_turn():
    features = torch.randn(2, 5, 3, 3, requires_grad=True)
    quantized = 2 * torch.randn(2, 5, 3, 3)
    through = ESTIMATORS["rotation"](features, quantized)
    torch.testing.assert_close(through, quantized)
    (gradient,) = torch.autograd.grad((through * quantized).sum(), features)
    lengths = quantized.norm(dim=1, keepdim=True) / features.norm(dim=1, keepdim=True)
    expected = features / features.norm(dim=1, keepdim=True)
    expected = expected * quantized.norm(dim=1, keepdim=True) * lengths
    torch.testing.assert_close(gradient, expected.detach(), atol=1e-4, rtol=1e-4)
    straight = ESTIMATORS["straight-through"](features, quantized)
    (gradient,) = torch.autograd.grad((straight * quantized).sum(), features)
    torch.testing.assert_close(gradient, quantized)


def test_the_missing_energy_falls_from_scale_to_scale_once_codes_fit():
    torch.manual_seed(0)
    tokenizer = build(codebook={"vocab_size": 60}, phi="none").train()
    images = images_for(tokenizer, 32)
    tokenizer.initialise([images])
    missing = tokenizer.residual_energy(images)
    assert missing.shape == (3,)
    assert (missing.diff() < 0).all() and missing[0] < 1.5


def train(init, num_steps=150):
    """Codes in use per scale after a short training on random flat images with a blob."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    restart = init == "data"
    book = {"vocab_size": 64, "init": init, "restart": restart, "update": "gradient"}
    tokenizer = build((1, 2, 4), Patch.Params(patch=2, ch=16, num_res_blocks=1), book).train()
    images = (
        torch.rand(256, 3, 1, 1, generator=rng) * 2
        - torch.rand(256, 3, 8, 8, generator=rng).round()
    )
    tokenizer.initialise([images])
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=2e-3, betas=(0.5, 0.9))
    for step in range(num_steps):
        batch = images[torch.randint(256, (32,), generator=rng)]
        made = tokenizer.reconstruct(batch)
        optimizer.zero_grad()
        ((made.images - batch).square().mean() + made.loss).backward()
        optimizer.step()
        tokenizer.after_step(optimizer, step / num_steps, rng)
    ids = tokenizer.eval().encode(images)
    error = (tokenizer.decode(ids) - images.clamp(-1, 1)).square().mean().item()
    return [len(ids[:, span].unique()) for span in tokenizer.layout.spans], error


def test_codes_that_start_on_data_are_used_and_normal_ones_collapse():
    (first, *_, last), error = train("data")
    (first_normal, *_, last_normal), error_normal = train("normal")
    assert first >= 15 and last >= 48
    assert first_normal < first / 2 and last_normal < last / 2
    assert error < error_normal


def test_images_and_ids_of_another_size_and_partial_maps_are_refused():
    tokenizer = build((1, (2, 3)))
    assert tokenizer.image_size == (4, 6)
    with pytest.raises(ValueError, match="images of 4 x 6 px, got 6 x 4"):
        tokenizer.encode(torch.zeros(1, 3, 6, 4))
    with pytest.raises(ValueError, match="expected 7 ids an image, got 6"):
        tokenizer.decode(torch.zeros(1, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match="raster-vq"):
        VarTokenizer.Params(
            autoencoder=Part("patch", Patch, SMALL),
            codebook=Part("vq", VQ, VQ.Params()),
            schedule=Part("raster", Raster, Raster.Params(height=2, width=2)),
        )


def test_defaults_are_the_published_ones():
    with torch.device("meta"):
        tokenizer = VarTokenizer(
            VarTokenizer.Params(
                autoencoder=Part("cnn", CNN, CNN.Params()),
                codebook=Part("vq", VQ, VQ.Params()),
                schedule=Part("published", Published, Published.Params()),
            )
        )
    assert tokenizer.image_size == (256, 256)
    assert tokenizer.phi_of_step == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)
    assert (tokenizer.vocab_size, tokenizer.code_dim) == (4096, 32)


@pytest.mark.gpu
def test_training_never_waits_for_the_gpu_after_the_first_step():
    tokenizer = build(codebook={"vocab_size": 512}).cuda().train()
    images = images_for(tokenizer, 64).cuda()
    rng = torch.Generator("cuda").manual_seed(0)
    optimizer = torch.optim.AdamW(
        [p for p in tokenizer.parameters() if p.requires_grad], fused=True
    )
    for step in range(3):
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        made = tokenizer.reconstruct(images)
        (made.images.square().mean() + made.loss).backward()
        optimizer.step()
        tokenizer.after_step(optimizer, 0.0, rng)
    torch.cuda.set_sync_debug_mode("default")


@torch.no_grad()
def test_later_scales_make_up_for_a_disturbed_lookup():
    """The right ids of what is left over bring the canvas nearer than the image's own ids do."""
    tokenizer = build((1, 2, 4, 8), codebook={"vocab_size": 64}, phi="none").eval()
    images = images_for(tokenizer, 64)
    tokenizer.initialise([images])
    features, own = tokenizer.features(images), tokenizer.encode(images)
    found, right = tokenizer.quantize(features, torch.full((64,), 0.5))
    last = tokenizer.layout.spans[-1]
    assert (found != own)[:, : last.start].float().mean() > 0.2

    def missing(ids):
        return (canvases(tokenizer, ids)[-1] - features).square().mean()

    corrected, uncorrected = found.clone(), found.clone()
    corrected[:, last], uncorrected[:, last] = right[:, last], own[:, last]
    assert missing(corrected) < 0.9 * missing(uncorrected)
