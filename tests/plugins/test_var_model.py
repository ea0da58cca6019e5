import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sandbox import Layout, Part, SandboxError, Tokens
from sandbox_plugins.attention import (
    FlexAttention,
    MathAttention,
    SdpaAttention,
    XformersAttention,
)
from sandbox_plugins.var import copies, fused
from sandbox_plugins.var.blocks import drop_path_gates
from sandbox_plugins.var.model import VAR

# Compilers and xformers warn of their own affairs (TF32, what they themselves call of Triton).
foreign_warnings = pytest.mark.filterwarnings("default")

GOLDEN = Path(__file__).parent.parent / "golden"
SIDES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SIDES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)

rasters = st.builds(Layout.raster, st.integers(1, 3), st.integers(1, 3))
pyramids = st.lists(
    st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=3, unique=True
).map(lambda sizes: Layout.pyramid(*sorted({(max(s), max(s) + min(s)) for s in sizes})))
layouts = rasters | pyramids
seeds = st.integers(0, 2**16)
variants = st.fixed_dictionaries({"shared_adaln": st.booleans(), "qk_norm": st.booleans()})


def build(layout, cls=SdpaAttention, classes=4, vocab_size=11, code_dim=3, **settings):
    settings = {"depth": 2, "width": 16, "num_heads": 2, **settings}
    attention = Part(cls.__name__, cls, cls.Params())
    params = VAR.Params(attention=attention, **settings)
    return VAR(params, Tokens(layout, vocab_size, code_dim, classes))


def awake(model, seed=0):
    """The model with weights large enough that everything in it matters."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng))
    return model.eval()


def test_a_subclass_with_steps_of_its_own_is_guided_by_these():
    class Own(VAR):
        def step(self, state, context, step):
            return torch.arange(8.0).view(4, 1, 2)

    network = Own(build(Layout.pyramid(1, 2)).params, build(Layout.pyramid(1, 2)).tokens)
    network.fused = True
    found = network.guided_step(None, torch.zeros(4, 1, 3), 0, 2.0)
    assert torch.equal(found, torch.tensor([[[-8.0, -7.0]], [[-6.0, -5.0]]]))


def inputs(layout, seed, b=2, code_dim=3, classes=4):
    rng = torch.Generator().manual_seed(seed)
    contexts = torch.randn(b, layout.seq_len, code_dim, generator=rng)
    return contexts, torch.randint(classes + 1, (b,), generator=rng)


def stepwise(model, contexts, labels):
    state = model.begin(labels)
    spans = model.tokens.layout.spans
    return [model.step(state, contexts[:, span], step) for step, span in enumerate(spans)]


@given(layout=layouts, seed=seeds, variant=variants)
def test_stepwise_logits_are_the_teacher_forced_ones(layout, seed, variant):
    model = awake(build(layout, **variant), seed)
    contexts, labels = inputs(layout, seed)
    whole = model(contexts, labels)
    assert whole.std() > 0.1
    torch.testing.assert_close(torch.cat(stepwise(model, contexts, labels), 1), whole)


@given(layout=layouts, seed=seeds, variant=variants, dropout=st.sampled_from([0.0, 0.3]))
def test_blocks_that_are_computed_again_give_the_same_numbers(layout, seed, variant, dropout):
    """Bit for bit, with paths, labels and channels dropped by the same chance."""
    contexts, labels = inputs(layout, seed)
    found = []
    for recompute in (False, True):
        settings = {"dropout": dropout, "drop_path": 0.3, "recompute": recompute, **variant}
        model = awake(build(layout, **settings), seed).train()
        torch.manual_seed(seed)
        logits = model(contexts, labels)
        logits.logsumexp(-1).mean().backward()
        found.append([logits.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler itself looks
def test_blocks_that_are_compiled_are_computed_again_as_such():
    contexts, labels = inputs(Layout.pyramid(1, 2, 3), 0)
    settings = {"label_dropout": 0.0, "drop_path": 0.0}
    plain, again = (
        awake(build(Layout.pyramid(1, 2, 3), recompute=recompute, **settings)).train()
        for recompute in (False, True)
    )
    again.compile(backend="aot_eager")
    for model in (plain, again):
        model(contexts, labels).logsumexp(-1).mean().backward()
    for one, other in zip(plain.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_blocks_that_are_computed_again_keep_less():
    contexts, labels = inputs(Layout.pyramid(1, 2, 3), 0)

    def kept(recompute):
        model, seen = build(Layout.pyramid(1, 2, 3), depth=4, recompute=recompute).train(), {}
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(tensor):
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = 0 if storage.data_ptr() in own else storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            kept_alive = model(contexts, labels)
        assert kept_alive.requires_grad
        return sum(seen.values())

    assert kept(True) < kept(False) / 3


@given(layout=layouts, seed=seeds, variant=variants)
def test_a_later_context_never_moves_an_earlier_logit(layout, seed, variant):
    model = awake(build(layout, **variant), seed)
    contexts, labels = inputs(layout, seed)
    before = model(contexts, labels)
    step = seed % len(layout.steps)
    start = layout.spans[step].start
    contexts[:, start:] += 1
    after = model(contexts, labels)
    torch.testing.assert_close(after[:, :start], before[:, :start])
    if step > 0:
        assert (after[:, layout.spans[step]] - before[:, layout.spans[step]]).abs().max() > 1e-3


@given(layout=layouts, seed=seeds, variant=variants)
def test_a_batch_of_two_is_two_batches_of_one(layout, seed, variant):
    model = awake(build(layout, **variant), seed)
    contexts, labels = inputs(layout, seed)
    alone = [model(contexts[i : i + 1], labels[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(model(contexts, labels), torch.cat(alone))


@given(layout=layouts, seed=seeds)
def test_tokens_of_one_step_see_one_another(layout, seed):
    model = awake(build(layout), seed)
    contexts, labels = inputs(layout, seed)
    before = model(contexts, labels)
    for span in layout.spans[1:]:
        changed = contexts.clone()
        changed[:, span.stop - 1] += 1
        assert (model(changed, labels)[:, span.start] - before[:, span.start]).abs().max() > 1e-5


def test_the_first_step_reads_the_label_and_not_its_context():
    layout = Layout.pyramid(2, 3)
    model = awake(build(layout))
    contexts, _ = inputs(layout, 0)
    labels = torch.tensor([0, 1])
    before = model(contexts, labels)
    contexts[:, :4] = torch.nan
    torch.testing.assert_close(model(contexts, labels), before)
    assert (model(contexts, labels.flip(0)) - before)[:, :4].abs().max() > 1e-2


def test_steps_must_be_taken_in_order():
    layout = Layout.pyramid(1, 2)
    model = build(layout).eval()
    state = model.begin(torch.tensor([0]))
    with pytest.raises(ValueError, match="step 0 comes next, not step 1"):
        model.step(state, torch.zeros(1, 4, 3), 1)


def test_labels_are_dropped_in_training_only():
    layout, batch = Layout.pyramid(1, 2), 400
    model = awake(build(layout, label_dropout=0.25, drop_path=0.0))
    contexts = inputs(layout, 0, b=1)[0].expand(batch, -1, -1)
    labels = torch.zeros(batch, dtype=torch.long)
    with_label = model(contexts[:1], labels[:1])
    without = model(contexts[:1], labels[:1] + 4)
    assert torch.allclose(model(contexts, labels), with_label, atol=1e-5)
    torch.manual_seed(0)
    trained = model.train()(contexts, labels)
    dropped = torch.isclose(trained, without, atol=1e-5).flatten(1).all(1)
    kept = torch.isclose(trained, with_label, atol=1e-5).flatten(1).all(1)
    assert torch.all(dropped ^ kept)
    assert 0.17 < dropped.float().mean() < 0.33


def test_drop_path_grows_linearly_with_depth_and_acts_in_training_only():
    model = build(Layout.pyramid(1, 2), depth=12, label_dropout=0.0)
    assert model.last_drop == pytest.approx(0.05)
    torch.manual_seed(0)
    gates = drop_path_gates(3, 20_000, 0.4, torch.device("cpu"))[..., 0, :, 0]
    closed, rates = (gates == 0).float().mean(1), torch.tensor([0.0, 0.2, 0.4])
    torch.testing.assert_close(closed[:, :2], rates[:, None].expand(3, 2), atol=0.02, rtol=0)
    assert not closed[:, 2:].any() and not (gates[1, :, 0] == gates[1, :, 1]).all()
    torch.testing.assert_close(gates.mean(1), torch.ones(3, 6), atol=0.03, rtol=0)
    awake(model)
    contexts, labels = inputs(model.tokens.layout, 0)
    assert torch.equal(model(contexts, labels), model(contexts, labels))
    model.train()
    drawn = [model(contexts, labels) for _ in range(8)]
    assert any(not torch.equal(drawn[0], other) for other in drawn)


def test_dropout_acts_in_training_only():
    layout = Layout.pyramid(1, 2)
    model = awake(build(layout, label_dropout=0.0, drop_path=0.0, dropout=0.5))
    contexts, labels = inputs(layout, 0)
    assert torch.equal(model(contexts, labels), model(contexts, labels))
    model.train()
    assert not torch.equal(model(contexts, labels), model(contexts, labels))


def test_the_attention_backend_changes_nothing_but_how_it_is_computed():
    layout = Layout.pyramid(1, 2, 3)
    plain, fused = awake(build(layout, MathAttention)), awake(build(layout, SdpaAttention))
    contexts, labels = inputs(layout, 0)
    torch.testing.assert_close(plain(contexts, labels), fused(contexts, labels))


class Rehearsing(SdpaAttention):
    """Remembers what it was shown."""

    def rehearse(self, q, k, v, mask, scale):
        kept = q.shape, k.shape, v.shape, mask, scale, q.dtype, q.requires_grad
        self.rehearsed = [*getattr(self, "rehearsed", []), kept]


def test_training_shows_the_attention_what_is_to_come_where_it_cannot_measure():
    layout = Layout.pyramid(1, 2, 3)
    model = awake(build(layout, Rehearsing))
    backend, (contexts, labels) = model.blocks[0].attn.backend, inputs(layout, 0)
    stepwise(model, contexts, labels)
    model(contexts, labels)
    assert not hasattr(backend, "rehearsed")  # there, nothing is ever compiled
    model.train()(contexts, labels)
    shape = (2, 2, layout.seq_len, 8)
    expected = (shape, shape, shape, model.mask, 1.0, torch.float32, True)
    assert backend.rehearsed == [expected]


@pytest.mark.parametrize("shared", [False, True])
def test_every_parameter_gets_a_gradient(shared):
    model = awake(build(Layout.pyramid(1, 2), shared_adaln=shared))
    contexts, labels = inputs(model.tokens.layout, 0)
    model(contexts, labels).logsumexp(-1).mean().backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent


def test_the_scale_of_normalised_attention_is_capped_at_100():
    layout = Layout.pyramid(1, 2)
    model = awake(build(layout))
    contexts, labels = inputs(layout, 0)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.scale_mul_1H11.fill_(math.log(100))
        capped = model(contexts, labels)
        for block in model.blocks:
            block.attn.scale_mul_1H11.fill_(9.0)
    assert torch.equal(model(contexts, labels), capped)


def test_a_fresh_model_is_as_published_close_to_uniform():
    model = build(Layout.pyramid(1, 2, 3), depth=4, width=None, num_heads=None).eval()
    model.requires_grad_(False)
    block, width = model.blocks[0], 256
    std = math.sqrt(1 / (3 * width))
    assert model.word_embed.weight.std() == pytest.approx(std, rel=0.2)
    assert block.attn.mat_qkv.weight.std() == pytest.approx(std, rel=0.05)
    assert block.attn.proj.weight.std() == pytest.approx(std / math.sqrt(8), rel=0.05)
    assert block.ffn.fc2.weight.std() == pytest.approx(std / math.sqrt(8), rel=0.05)
    assert block.ada_lin[1].weight[: 2 * width].std() == pytest.approx(std * 1e-3, rel=0.05)
    assert block.ada_lin[1].weight[2 * width :].std() == pytest.approx(std * 0.5, rel=0.05)
    assert model.head.weight.std() == pytest.approx(std * 0.02, rel=0.2)
    assert torch.all(block.attn.scale_mul_1H11 == math.log(4))
    contexts, labels = inputs(model.tokens.layout, 0)
    assert model(contexts, labels).std() < 0.05


def test_autocast_changes_the_blocks_and_leaves_the_head_in_float32():
    layout = Layout.pyramid(1, 2)
    model = awake(build(layout))
    contexts, labels = inputs(layout, 0)
    exact = model(contexts, labels)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(contexts, labels)
        steps = torch.cat(stepwise(model, contexts, labels), 1)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.1 * exact.abs().max()
    assert (steps - exact).abs().max() < 0.1 * exact.abs().max()
    whole = awake(build(layout)).bfloat16()(contexts, labels)
    assert whole.dtype == torch.float32
    assert (whole - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("halved", [False, True])
def test_only_beside_16_bit_blocks_the_head_may_multiply_in_tf32(halved):
    model, seen = build(Layout.pyramid(1, 2)), []
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    model.head.register_forward_pre_hook(lambda *_: seen.append(products.fp32_precision))
    with torch.autocast("cpu", torch.bfloat16, enabled=halved):
        stepwise(model, *inputs(model.tokens.layout, 0))
    assert set(seen) == {"tf32" if halved else before}
    assert products.fp32_precision == before


def test_weight_decay_spares_biases_scales_and_positions():
    model = build(Layout.pyramid(1, 2), shared_adaln=True)
    decayed = {name for name, _ in model.named_parameters()} - model.no_weight_decay()
    linear = {f"{name}.weight" for name, m in model.named_modules() if hasattr(m, "in_features")}
    assert decayed == linear | {"class_emb.weight"}


def test_a_width_that_the_heads_do_not_divide_is_refused():
    with pytest.raises(SandboxError, match="a width of 16 is not divisible into 3 heads"):
        build(Layout.pyramid(1, 2), num_heads=3)


def test_the_default_attention_comes_from_the_registry(registry):
    params = VAR.Params.model_validate({"depth": 3}, context={"registry": registry})
    assert params.attention.name == "auto"
    assert params.model_dump(mode="json")["attention"] == {"name": "auto"}


@pytest.mark.parametrize(
    ("depth", "shared", "sides", "millions"),
    [
        (6, False, SIDES_256, 18.49),
        (16, False, SIDES_256, 310.28),
        (20, False, SIDES_256, 600.92),
        (24, False, SIDES_256, 1033.40),
        (30, False, SIDES_256, 2010.02),
        (36, True, SIDES_512, 2353.89),
    ],
)
def test_the_parameter_counts_are_the_published_ones(depth, shared, sides, millions):
    model = published_model(depth, shared, sides)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert round(count / 1e6, 2) == millions


def published_model(depth, shared, sides, device="meta"):
    with torch.device(device):
        return build(
            Layout.pyramid(*sides),
            depth=depth,
            width=None,
            num_heads=None,
            shared_adaln=shared,
            classes=1000,
            vocab_size=4096,
            code_dim=32,
        )


@pytest.mark.parametrize(
    ("name", "depth", "shared", "sides"),
    [
        ("var_d16", 16, False, SIDES_256),
        ("var_d30", 30, False, SIDES_256),
        ("var_d36", 36, True, SIDES_512),
    ],
)
def test_the_exported_layout_is_the_published_one(name, depth, shared, sides):
    expected = json.loads((GOLDEN / "published_layout.json").read_text())[name]
    exported = published_model(depth, shared, sides).to_published()
    described = {
        key: [list(value.shape), str(value.dtype).removeprefix("torch.")]
        for key, value in exported.items()
    }
    assert described == expected


@pytest.mark.parametrize("shared", [False, True])
def test_a_published_state_loads_strictly_and_is_exported_unchanged(shared):
    layout = Layout.pyramid(1, 2, 3)
    published = awake(build(layout, shared_adaln=shared), seed=1).to_published()
    model = awake(build(layout, shared_adaln=shared), seed=2)
    model.load_state_dict(model.from_published(published), strict=True)
    exported = model.to_published()
    assert exported.keys() == published.keys()
    assert all(torch.equal(exported[key], published[key]) for key in published)


def test_the_buffers_of_the_published_layout_follow_from_the_schedule():
    published = build(Layout.pyramid(1, 2)).to_published()
    assert published["lvl_1L"].tolist() == [[0, 1, 1, 1, 1]]
    bias = published["attn_bias_for_masking"]
    assert bias.shape == (1, 1, 5, 5)
    assert bias[0, 0, 0].tolist() == [0, *[-math.inf] * 4]
    assert not bias[0, 0, 1:].any()
    assert not published["blocks.1.attn.zero_k_bias"].any()


def test_a_state_under_our_names_is_not_taken_for_a_published_one():
    model = build(Layout.pyramid(1, 2))
    assert model.from_published(model.state_dict()) is None
    assert model.from_published({}) is None


def test_buffers_that_contradict_the_model_are_refused_in_plain_words():
    layout = Layout.pyramid(1, 2, 3)
    model = build(layout)
    other_scales = build(Layout.pyramid((1, 1), (2, 2), (3, 3))).to_published()
    other_scales["lvl_1L"] = torch.tensor([[0] * 2 + [1] * 4 + [2] * 8])
    with pytest.raises(SandboxError, match=r"\[2, 4, 8\], but the schedule has \[1, 4, 9\]"):
        model.from_published(other_scales)
    causal = model.to_published()
    causal["attn_bias_for_masking"] = torch.full((14, 14), -math.inf).triu(1)[None, None]
    with pytest.raises(SandboxError, match="another attention mask"):
        model.from_published(causal)
    biased = model.to_published()
    biased["blocks.0.attn.zero_k_bias"] = torch.ones(16)
    with pytest.raises(SandboxError, match="a bias on its keys"):
        model.from_published(biased)


def test_a_state_is_described_by_what_sets_it_apart():
    small = build(Layout.pyramid(1, 2))
    large = build(Layout.pyramid(1, 2, 3), depth=3, width=32, num_heads=4, shared_adaln=True)
    here, there = small.describe(small.state_dict()), small.describe(large.to_published())
    assert {fact: (here[fact], there[fact]) for fact in here if here[fact] != there[fact]} == {
        "depth": ("2", "3"),
        "AdaLN": ("per block", "shared"),
        "head count": ("2", "4"),
        "width": ("16", "32"),
        "token count": ("5", "14"),
        "scale count": ("2", "3"),
    }
    without = build(Layout.pyramid(1, 2), qk_norm=False)
    assert without.describe(without.state_dict())["query-key normalisation"] == "off"
    assert small.describe({"unrelated": torch.zeros(1)}) == {}


def test_the_whole_network_can_be_compiled():
    layout = Layout.pyramid(1, 2, 3)
    model = awake(build(layout))
    contexts, labels = inputs(layout, 0)
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(whole(contexts, labels), model(contexts, labels))


@pytest.mark.gpu
@foreign_warnings
@pytest.mark.parametrize("cls", [SdpaAttention, FlexAttention, XformersAttention])
def test_every_backend_trains_and_steps_on_cuda_in_bfloat16(cls):
    layout = Layout.pyramid(1, 2, 3, 5)
    contexts, labels = (x.cuda() for x in inputs(layout, 0))
    plain = awake(build(layout, MathAttention, width=64)).cuda()
    fused = awake(build(layout, cls, width=64)).cuda()
    plain(contexts, labels).logsumexp(-1).mean().backward()
    with torch.autocast("cuda", torch.bfloat16):
        whole = fused(contexts, labels)
        steps = torch.cat(stepwise(fused, contexts, labels), 1)
    whole.logsumexp(-1).mean().backward()
    assert (steps - whole).abs().max() < 0.05 * whole.abs().max()
    ours, exact = (
        torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
        for model in (fused, plain)
    )
    assert (ours - exact).norm() < 0.05 * exact.norm()


def test_one_product_makes_the_modulations_of_all_blocks_with_weights_as_they_are():
    model = awake(build(Layout.pyramid(1, 2), depth=3))
    cast = copies.cast(model, torch.bfloat16)
    for seed in (0, 1):
        awake(model, seed)
        copies.refresh(cast, model)
        label = model.label(model.class_emb(torch.tensor([0, 2]))).bfloat16()
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            made = fused.at_once(label, *cast.ada_lin)
            plain = [model._modulation(block, label) for block in model.blocks]
        torch.testing.assert_close(made, plain, rtol=1e-2, atol=1e-2)
    assert copies.cast(build(Layout.pyramid(1), shared_adaln=True), torch.bfloat16).ada_lin is None
