from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from sandbox import Layout, Part, SandboxError, Subject, Tokens
from sandbox_plugins.attention import SdpaAttention
from sandbox_plugins.autoregressive import Autoregressive
from sandbox_plugins.autoregressive import generator as autoregressive
from sandbox_plugins.autoregressive.generator import keep_cells
from sandbox_plugins.objectives import CrossEntropy
from sandbox_plugins.samplers import Greedy, TopKTopP
from sandbox_plugins.var.model import VAR

rasters = st.builds(Layout.raster, st.integers(1, 3), st.integers(1, 3))
pyramids = st.lists(st.integers(1, 4), min_size=1, max_size=3, unique=True).map(
    lambda sides: Layout.pyramid(*((side, side + 1) for side in sorted(sides)))
)
layouts = rasters | pyramids
seeds = st.integers(0, 2**16)


class ToyTokenizer:
    """Residual colours over any layout: a code is a colour, a canvas a small image."""

    code_dim = 3

    def __init__(self, layout, vocab_size=13):
        self.layout, self.vocab_size = layout, vocab_size
        self.image_size = (4 * layout.size[0], 4 * layout.size[1])
        self.colours = torch.randn(vocab_size, 3, generator=torch.Generator().manual_seed(0))

    def encode(self, images):
        image = F.adaptive_avg_pool2d(images, self.layout.size)
        canvas, ids = self.canvas(len(images)), []
        for index in range(len(self.layout.steps)):
            rest = self._cells(image - canvas, index)
            ids.append(torch.cdist(rest, self.colours.expand(len(rest), -1, -1)).argmin(-1))
            canvas = self.paint(canvas, self.embed(ids[-1]), index)
        return torch.cat(ids, 1).int()

    def decode(self, ids):
        *_, canvas = self._canvases(ids)
        return self.render(canvas)

    def contexts(self, ids):
        canvases = list(self._canvases(ids))[:-1]
        return torch.cat([self.context(canvas, step) for step, canvas in enumerate(canvases)], 1)

    def embed(self, ids):
        return self.colours[ids.long()]

    def canvas(self, batch_size):
        return torch.zeros(batch_size, 3, *self.layout.size)

    def paint(self, canvas, codes, step):
        shape = self.layout.steps[step]
        cells = torch.zeros(len(codes), shape.height * shape.width, 3)
        cells[:, list(shape.cells)] = codes
        maps = cells.mT.unflatten(2, (shape.height, shape.width))
        return canvas + F.interpolate(maps, self.layout.size, mode="nearest-exact")

    def context(self, canvas, step):
        return self._cells(canvas, step) + canvas.mean((2, 3))[:, None]

    def render(self, canvas):
        return F.interpolate(canvas, self.image_size, mode="nearest-exact").clamp(-1, 1)

    def _cells(self, maps, step):
        shape = self.layout.steps[step]
        pooled = F.adaptive_avg_pool2d(maps, (shape.height, shape.width))
        return pooled.flatten(2).mT[:, list(shape.cells)]

    def _canvases(self, ids):
        canvas = self.canvas(len(ids))
        yield canvas
        for step, span in enumerate(self.layout.spans):
            canvas = self.paint(canvas, self.embed(ids[:, span]), step)
            yield canvas


def part(cls, **settings):
    return Part(cls.__name__, cls, cls.Params(**settings))


def build(
    layout,
    sampler=None,
    objective=None,
    token_noise=0.0,
    self_correction=0.0,
    tokenizer=None,
    **backbone,
):
    backbone = {"depth": 2, "width": 32, "num_heads": 2, **backbone}
    params = Autoregressive.Params(
        backbone=part(VAR, attention=part(SdpaAttention), **backbone),
        sampler=sampler or part(TopKTopP),
        objective=objective or part(CrossEntropy),
        token_noise=token_noise,
        self_correction=self_correction,
    )
    tokenizer = (tokenizer or (Requantizing if self_correction else ToyTokenizer))(layout)
    return Autoregressive(params, Subject(tokenizer.image_size, 4, tokenizer))


def awake(generator):
    """The generator with weights large enough that what it predicts varies."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in generator.network.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng))
    return generator


def images_for(generator, seed, b=3):
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(b, 3, *generator.layout.size, generator=rng) * 2 - 1
    return F.interpolate(coarse, generator.tokenizer.image_size, mode="nearest-exact")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


LABELS = torch.tensor([0, 3, 1])


@given(layout=layouts, seed=seeds)
def test_the_loss_is_the_mean_over_tokens_and_its_parts_add_up(layout, seed):
    generator = awake(build(layout, label_dropout=0.0, drop_path=0.0))
    ids = generator.prepare(images_for(generator, seed))
    losses = generator.loss(ids, LABELS)
    logits = generator.network(generator.tokenizer.contexts(ids), LABELS)
    per_token = F.cross_entropy(logits.mT, ids.long(), reduction="none")
    torch.testing.assert_close(losses.total, per_token.mean())
    torch.testing.assert_close(losses.parts["loss"], losses.total.detach())
    assert losses.parts["accuracy"] == (logits.argmax(-1) == ids).float().mean()
    scales = [name for name in losses.parts if name.startswith("loss/")]
    if layout.num_levels == 1:
        assert not scales
    else:
        assert scales == [f"loss/scale{k + 1}" for k in range(layout.num_levels)]
        for name, span in zip(scales, layout.spans, strict=True):
            torch.testing.assert_close(losses.parts[name], per_token[:, span].mean().detach())
    assert not any(value.requires_grad for value in losses.parts.values())


def gradients(generator, ids, labels, half=False, shares=(1.0,)):
    """The last losses with the gradient of each parameter, in training mode, after one backward
    pass a share of the loss; `half` computes in bfloat16, as the loop does."""
    generator.network.train().zero_grad()
    for share in shares:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            losses = generator.loss(ids, labels)
        (losses.total * share).backward()
    return losses, {name: p.grad.clone() for name, p in generator.network.named_parameters()}


def agree(ours, exact, half):
    for name, gradient in exact.items():
        rtol, atol = (2e-2, 2e-2) if half else (1e-5, 1e-6)
        atol *= float(gradient.abs().max())
        torch.testing.assert_close(ours[name], gradient, rtol=rtol, atol=atol)


objectives = st.sampled_from(
    [{}, {"label_smoothing": 0.3}, {"level_weights": "sqrt"}, {"label_smoothing": 0.1}]
)


@given(
    layout=layouts,
    seed=seeds,
    b=st.integers(1, 7),
    images=st.integers(1, 4),
    settings=objectives,
    half=st.booleans(),
    shares=st.sampled_from([(1.0,), (0.3, 0.7), (65536.0,)]),
)
def test_logits_made_a_few_images_at_a_time_give_the_same_losses_and_gradients(
    layout, seed, b, images, settings, half, shares
):
    plain = {"label_dropout": 0.0, "drop_path": 0.0}
    generator = awake(build(layout, objective=part(CrossEntropy, **settings), **plain))
    ids = generator.prepare(images_for(generator, seed, b))
    labels, held = torch.arange(b) % 4, []
    logits = generator.network.logits
    generator.network.logits = lambda *features: held.append(len(features[0])) or logits(*features)
    whole, exact = gradients(generator, ids, labels, half, shares)
    assert held == [b] * len(shares)
    held.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(autoregressive, "MAX_LOGITS", images * layout.seq_len * 13)
        pieces, ours = gradients(generator, ids, labels, half, shares)
    assert max(held) <= images and sum(held) == b * len(shares)  # each once
    torch.testing.assert_close(dict(pieces.parts), dict(whole.parts))
    torch.testing.assert_close(pieces.total, whole.total)
    agree(ours, exact, half)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler itself looks
@pytest.mark.parametrize(("images", "half"), [(1, False), (2, True)])
def test_what_is_compiled_learns_the_same_a_few_images_at_a_time(monkeypatch, images, half):
    generator = awake(build(Layout.pyramid(1, 2, 3), label_dropout=0.0, drop_path=0.0))
    ids = generator.prepare(images_for(generator, 0))
    whole, exact = gradients(generator, ids, LABELS, half)
    monkeypatch.setattr(autoregressive, "MAX_LOGITS", images * 14 * 13)
    monkeypatch.setattr(
        torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True)
    )
    generator.network.compile = lambda: None  # blocks are compiled alone, and tested so
    generator.compile()
    pieces, ours = gradients(generator, ids, LABELS, half)
    torch.testing.assert_close(dict(pieces.parts), dict(whole.parts))
    agree(ours, exact, half)


def test_what_is_measured_a_few_images_at_a_time_makes_no_gradients(monkeypatch):
    generator = awake(build(Layout.pyramid(1, 2)))
    generator.network.eval()
    ids = generator.prepare(images_for(generator, 0))
    with torch.no_grad():
        whole = generator.loss(ids, LABELS)
        monkeypatch.setattr(autoregressive, "MAX_LOGITS", 1)
        monkeypatch.setattr(torch.autograd, "grad", None)
        pieces = generator.loss(ids, LABELS)
    assert not pieces.total.requires_grad
    torch.testing.assert_close(dict(pieces.parts), dict(whole.parts))


def test_the_work_of_a_loss_is_counted_and_the_same_a_few_images_at_a_time(monkeypatch):
    generator = build(Layout.pyramid(1, 2, 3))
    ids = generator.prepare(images_for(generator, 0))
    flops = []
    for most in (2**25, 2 * 14 * 13):
        monkeypatch.setattr(autoregressive, "MAX_LOGITS", most)
        with FlopCounterMode(display=False) as counter:
            gradients(generator, ids, LABELS)
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0


@pytest.mark.parametrize(
    ("num_images", "most", "size"),
    [(96, 12, 12), (256, 29, 16), (512, 252, 128), (251, 29, 29), (7, 9, 7), (5, 0, 1), (13, 6, 6)],
)
def test_the_pieces_of_a_batch_are_equal_where_that_costs_little(num_images, most, size):
    assert autoregressive.images_at_once(num_images, most) == size


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # of torch's compiler about itself
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("b", [256, 251])
def test_on_a_gpu_a_training_step_never_holds_its_logits_in_float32(b, compiled):
    layout, device, v = Layout.pyramid(1, 2, 16), torch.device("cuda"), 4096
    tokens = Tokens(layout, v, 3, 4)
    generator = build(layout)
    generator.tokenizer.vocab_size = v
    generator.tokenizer.contexts = lambda ids: torch.zeros(*ids.shape, 3, device=device)
    params = VAR.Params(depth=1, width=64, attention=part(SdpaAttention))
    generator.network = VAR(params, tokens).to(device).train()
    if compiled:
        generator.compile()
    ids = torch.randint(v, (b, layout.seq_len), device=device)
    labels = torch.zeros(b, dtype=torch.long, device=device)
    for _ in range(2):  # what compiling takes does not count
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            generator.loss(ids, labels).total.backward()
        peak = torch.cuda.max_memory_allocated() - before
        generator.network.zero_grad()
    assert peak < 4 * b * layout.seq_len * v


class Listening(torch.nn.Module):
    """A network that keeps the contexts it read; `calls` counts those of the module itself."""

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size, self.read, self.calls = vocab_size, None, 0

    def __call__(self, contexts, labels):
        self.calls += 1
        return super().__call__(contexts, labels)

    def forward(self, contexts, labels):
        self.read = contexts
        return torch.zeros(*contexts.shape[:2], self.vocab_size)


def listening(token_noise, training):
    generator = build(Layout.pyramid(1, 2, 8), token_noise=token_noise)
    generator.network = Listening(generator.tokenizer.vocab_size).train(training)
    ids = torch.randint(13, (40, generator.layout.seq_len), generator=rng())
    return generator, ids, generator.tokenizer.contexts(ids)


def test_token_noise_disturbs_what_is_read_in_training_and_nothing_else():
    generator, ids, clean = listening(token_noise=0.2, training=True)
    seen = []
    generator.objective.losses = lambda logits, targets, layout: (
        seen.append(targets) or logits.sum(-1)
    )
    generator.loss(ids, torch.zeros(40, dtype=torch.long))
    assert torch.equal(seen[0], ids)
    moved = (generator.network.read[:, 1:5] != clean[:, 1:5]).any(-1).any(-1)
    assert 0.02 < moved.float().mean() < 0.5  # the first token: 0.2 x 12/13 of the images
    assert torch.equal(generator.network.read[:, 0], clean[:, 0])
    torch.manual_seed(1)  # with 0 the noise would be the ids themselves
    disturbed = generator._disturbed(ids)
    assert 0.14 < (disturbed != ids).float().mean() < 0.23
    assert disturbed.min() >= 0 and disturbed.max() == 12


@pytest.mark.parametrize(("token_noise", "training"), [(0.0, True), (0.5, False)])
def test_without_noise_or_training_the_true_ids_are_read(token_noise, training):
    generator, ids, clean = listening(token_noise, training)
    generator.loss(ids, torch.zeros(40, dtype=torch.long))
    assert torch.equal(generator.network.read, clean)


class Requantizing(ToyTokenizer):
    """Its features are the small images; noise of 1 and more finds ids by chance alone."""

    def features(self, images):
        return F.adaptive_avg_pool2d(images, self.layout.size)

    def quantize(self, features, noise):
        right = self.encode(F.interpolate(features, self.image_size, mode="nearest-exact"))
        drawn = torch.randint(self.vocab_size, right.shape).int()
        return torch.where(torch.rand(right.shape) < noise[:, None], drawn, right), right


def correcting(self_correction, training):
    generator = build(Layout.pyramid(1, 2, 4), self_correction=self_correction)
    generator.network = Listening(generator.tokenizer.vocab_size).train(training)
    images = images_for(generator, 0, b=40)
    return generator, generator.prepare(images), generator.tokenizer.encode(images)


def test_with_self_correction_the_network_reads_disturbed_ids_and_learns_the_right_ones():
    generator, features, ids = correcting(0.8, training=True)
    assert features.shape == (40, 3, 4, 4) and features.is_floating_point()
    seen = []
    generator.objective.losses = lambda logits, targets, layout: (
        seen.append(targets) or logits.sum(-1)
    )
    generator.loss(features, torch.zeros(40, dtype=torch.long))
    assert torch.equal(seen[0], ids)
    moved = (generator.network.read != generator.tokenizer.contexts(ids)).any(-1)[:, 1:]
    each = moved.float().mean(1)  # an image's own noise, evenly from 0 to 0.8
    assert each.min() < 0.3 and each.max() > 0.6


def test_self_correction_disturbs_nothing_outside_training():
    generator, features, ids = correcting(0.8, training=False)
    generator.loss(features, torch.zeros(40, dtype=torch.long))
    assert torch.equal(generator.network.read, generator.tokenizer.contexts(ids))


def test_self_correction_wants_a_tokenizer_whose_lookup_can_be_disturbed():
    with pytest.raises(SandboxError, match="no features\\(\\) and quantize\\(\\)"):
        build(Layout.pyramid(1, 2), tokenizer=ToyTokenizer, self_correction=0.5)


def test_a_compiled_network_is_called_as_such_in_training_alone():
    generator, ids, _ = listening(0.0, training=True)
    labels = torch.zeros(40, dtype=torch.long)
    generator.loss(ids, labels)
    assert generator.network.calls == 1
    generator.network.eval()
    generator.loss(ids, labels)
    assert generator.network.calls == 1


def test_the_losses_of_scales_do_not_lose_digits_in_autocast():
    generator = awake(build(Layout.pyramid(1, 2, 4), label_dropout=0.0))
    ids = generator.prepare(images_for(generator, 0))
    with torch.autocast("cpu", torch.bfloat16):
        losses = generator.loss(ids, LABELS)
    parts = [losses.parts[f"loss/scale{k}"] for k in (1, 2, 3)]
    together = sum(part * count for part, count in zip(parts, (1, 4, 16), strict=True)) / 21
    torch.testing.assert_close(together, losses.total.detach())


@given(layout=layouts, seed=seeds, guidance=st.sampled_from([0.0, 2.0]))
def test_generating_repeats_with_the_seed_and_leaves_the_training_mode(layout, seed, guidance):
    generator = awake(build(layout, part(TopKTopP, guidance=guidance)))
    generator.network.train()
    state = torch.get_rng_state()
    first, second = (generator.generate(LABELS, rng(seed)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (3, 3, *generator.tokenizer.image_size)
    assert first.abs().max() <= 1
    assert generator.network.training
    assert torch.equal(torch.get_rng_state(), state)  # no label was dropped, no path either


def test_generated_images_can_be_used_in_a_computation_with_gradients():
    image = awake(build(Layout.pyramid(1, 2))).generate(LABELS, rng())
    weight = torch.ones(3, 1, 1, requires_grad=True)
    (image * weight).sum().backward()
    assert torch.equal(weight.grad.flatten(), image.sum((0, 2, 3)))


def test_the_training_mode_is_restored_when_sampling_fails():
    generator = build(Layout.pyramid(1, 2))
    generator.network.train()
    with pytest.raises(RuntimeError, match="enough"):
        generator.generate(LABELS, rng(), watch=_fail)
    assert generator.network.training


def _fail(step, images):
    raise RuntimeError("enough")


@given(layout=layouts, seed=seeds)
def test_every_step_is_shown_and_the_last_is_the_image(layout, seed):
    generator = awake(build(layout))
    seen = []
    images = generator.generate(LABELS, rng(seed), lambda step, shown: seen.append((step, shown)))
    assert [step for step, _ in seen] == list(range(len(layout.steps)))
    assert torch.equal(seen[-1][1], images)


@given(layout=layouts, seed=seeds)
def test_an_edit_that_keeps_everything_is_the_reconstruction(layout, seed):
    generator = awake(build(layout))
    images = images_for(generator, seed)
    kept = generator.edit(images, torch.ones(images.shape[2:]), LABELS, rng(seed))
    expected = generator.tokenizer.decode(generator.prepare(images))
    torch.testing.assert_close(kept, expected)


@given(layout=rasters, seed=seeds)
def test_an_edit_that_keeps_nothing_of_a_single_map_is_a_sample(layout, seed):
    generator = awake(build(layout))
    images = images_for(generator, seed)
    edited = generator.edit(images, torch.zeros(images.shape[2:]), LABELS, rng(seed))
    assert torch.equal(edited, generator.generate(LABELS, rng(seed)))


def test_an_edit_of_a_raster_layout_keeps_the_masked_cells():
    generator = awake(build(Layout.raster(3, 2, order=[5, 4, 3, 2, 1, 0])))
    images = images_for(generator, 0)
    masks = torch.tensor([[1, 0], [0, 1], [1, 1]]).float().expand(3, 3, 2).clone()
    masks[0] = 0
    edited = generator.edit(images, masks, LABELS, rng(0))
    expected = generator.tokenizer.decode(generator.prepare(images))
    pixels = F.interpolate(masks[:, None], images.shape[2:], mode="nearest-exact").bool()
    assert torch.equal(edited[pixels.expand_as(edited)], expected[pixels.expand_as(edited)])
    assert not torch.equal(edited, expected)


def test_maps_of_at_most_three_cells_are_kept_whole_and_larger_ones_by_the_resized_mask():
    layout = Layout.pyramid((1, 1), (1, 3), (2, 3), (4, 6))
    left = torch.zeros(1, 8, 12)
    left[..., :6] = 1
    kept = [keep_cells(layout, left)[0, span] for span in layout.spans]
    assert kept[0].all() and kept[1].all()
    assert kept[2].view(2, 3).tolist() == [[True, False, False]] * 2
    assert kept[3].view(4, 6).tolist() == [[True] * 3 + [False] * 3] * 4


def test_a_batch_that_is_trained_on_is_learned_and_drawn_again():
    torch.manual_seed(0)
    generator = build(Layout.pyramid(1, 2), part(Greedy, guidance=0.0), label_dropout=0.0)
    images = images_for(generator, 0)
    ids = generator.prepare(images)
    optimizer = torch.optim.AdamW(generator.network.parameters(), lr=1e-2)
    for _ in range(150):
        losses = generator.loss(ids, LABELS)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    assert losses.parts["accuracy"] == 1
    torch.testing.assert_close(generator.generate(LABELS, rng()), generator.tokenizer.decode(ids))


def test_a_recipe_without_a_tokenizer_is_told_so():
    params = build(Layout.pyramid(1, 2)).params
    with pytest.raises(SandboxError, match="name a tokenizer"):
        Autoregressive(params, Subject((8, 8), 4, None))


def test_sampler_and_objective_have_defaults(registry):
    params = Autoregressive.Params.model_validate(
        {"backbone": {"name": "var", "depth": 2}}, context={"registry": registry}
    )
    assert (params.sampler.name, params.objective.name) == ("top-k-top-p", "cross-entropy")
    assert params.sampler.params.top_k == 900
