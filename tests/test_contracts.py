"""The laws of `sandbox.testing` over every registered class: registering a part tests it.

A part whose defaults are too large, or which needs settings, has small ones in SMALL.
"""

import numpy as np
import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

import sandbox
from sandbox import Layout, Tokens
from sandbox.plugins import load_plugins
from sandbox.testing import (
    GreyTokenizer,
    attention_law,
    backbone_law,
    check,
    layout_law,
    metric_order_law,
    objective_law,
    sampler_law,
    settle,
    tokenizer_law,
)
from sandbox.testing.strategies import (
    attention_calls,
    layouts,
    pyramids,
    seeds,
)

REGISTRY = load_plugins()
ENTRIES = {f"{e.interface.__name__}-{e.name}": e for e in REGISTRY}

PATCH = {"name": "patch", "code_dim": 4}
VQ = {"name": "vq", "vocab_size": 16}
SIDES = {"name": "sides", "sides": [1, 2, [2, 3], 4]}
SMALL_VAR = {"depth": 2, "width": 16, "num_heads": 2}
TOKENIZER = {"autoencoder": PATCH, "codebook": VQ, "schedule": SIDES}

SMALL = {
    "ScaleSchedule-sides": [{"sides": [1, [2, 1], [3, 4]]}],
    "ScaleSchedule-linear": [{}, {"height": 3, "width": 7, "num_scales": 7}],
    "ScaleSchedule-geometric": [{}, {"height": 7, "width": 3, "num_scales": 7}],
    "ScaleSchedule-raster": [
        {"height": 4, "width": 4, "order": order}
        for order in ("row", "snake", "spiral", "hilbert", "random")
    ],
    "Autoencoder-cnn": [{"ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "code_dim": 4}],
    "Codebook-vq": [
        {
            "vocab_size": 16,
            "update": update,
            "lookup": lookup,
            "restart_every": 5,
            "entropy_weight": 0.1,
        }
        for update in ("ema", "gradient")
        for lookup in ("euclidean", "cosine")
    ],
    "Codebook-simvq": [{"vocab_size": 16}],
    "Codebook-fsq": [{"levels": [4, 3, 5, 2, 3], "scale": 0.5}],
    "Codebook-lfq": [{}, {"scale": 0.5, "entropy_weight": 0.0}],
    "Tokenizer-var-vq": [
        *({**TOKENIZER, "phi": phi} for phi in ("none", "shared", "partial", "per-scale")),
        {**TOKENIZER, "estimator": "rotation", "prefix_dropout": 0.2},
        {**TOKENIZER, "lookup_noise": 0.1, "scale_dropout": 0.2},
        {**TOKENIZER, "codebook": {"name": "fsq", "levels": [4, 3, 5, 2]}},
    ],
    "Tokenizer-raster-vq": [
        {**TOKENIZER, "schedule": {"name": "raster", "height": 2, "width": 3, "order": "snake"}}
    ],
    "Backbone-var": [SMALL_VAR, {**SMALL_VAR, "shared_adaln": True, "qk_norm": False}],
    "Sampler-top-k-top-p": [
        {},
        {"top_k": 3, "top_p": 1.0},
        {"top_k": 0, "top_p": 0.5, "temperature": 2.0},
        {"top_k": 5, "top_p": 0.7, "smoothing": True},
    ],
    "Objective-cross-entropy": [{}, {"level_weights": "sqrt", "label_smoothing": 0.1}],
    "Generator-autoregressive": [{"backbone": {"name": "var", **SMALL_VAR}}],
    "Dataset-shapes": [{"num_images": 7, "num_validation": 5, "image_size": [16, 24]}],
    "Dataset-image-folder": [{"root": "pictures", "image_size": [16, 24], "flip": True}],
    "Dataset-cifar10": [{"root": "cifar", "allow_partial": True, "flip": True, "pad_crop_px": 2}],
    "Dataset-idx": [{"root": "idx"}],
    "ImageLoss-lpips": [{"network": "alexnet", "weights": "alexnet.safetensors"}],
    "ImageLoss-perceptual": [{"features": "random", "logits_weight": 0.1}],
    "Adversary-patchgan": [
        {"channels": 8},
        {"channels": 8, "norm": "group", "feature_matching": 1.0, "augment": [], "lecam": 0.0},
        {"channels": 8, "start": 0.0, "ramp": 0.0, "adaptive": False},
    ],
    "Adversary-dino": [
        {"weights": "vit.safetensors", "model": "test_vit", "depths": [1, 5], "norm": norm}
        for norm in ("spectral", "group")
    ],
    "Metric-kid": [{"subset_size": 24, "num_subsets": 2}],
    "Metric-inception-score": [{"splits": 1}],
    "Task-train-tokenizer": [{"num_images": 4, "batch_size": 2}],
    "Task-train-classifier": [{"num_images": 4, "batch_size": 2}],
    "Task-train-generator": [{"num_images": 4, "batch_size": 2}],
    "Task-sample": [{"untrained": True}],
    "Task-tune-sampler": [{"grid": {"top_p": [0.9, 1.0]}, "untrained": True}],
    "Task-evaluate": [{"metrics": ["psnr"], "images": "reconstructions"}],
}
CASES = [(key, params) for key in ENTRIES for params in SMALL.get(key, [{}])]

RECIPE = {
    "device": "cpu",
    "dataset": {"name": "shapes", "image_size": 16},
    "tokenizer": {"name": "var-vq", **TOKENIZER},
    "generator": {"name": "autoregressive", "backbone": {"name": "var", **SMALL_VAR}},
    "features": {"name": "classifier", "width": 4},
}


@pytest.fixture(scope="session")
def backbones(tmp_path_factory):
    """Random weights in the layouts of published networks."""
    folder = tmp_path_factory.mktemp("backbones")
    alexnet, vit = torchvision.models.alexnet().features, timm.create_model("test_vit")
    save_file(alexnet.state_dict(), folder / "alexnet.safetensors")
    save_file(vit.state_dict(), folder / "vit.safetensors")
    return folder


@pytest.fixture
def files(tmp_path, backbones):
    """The files that parts read: weights, pictures, CIFAR-10 records, MNIST arrays."""
    for path in backbones.iterdir():
        (tmp_path / path.name).symlink_to(path)
    rng = np.random.default_rng(0)
    for number, split in enumerate(["train/cat", "train/dog", "val/cat", "val/dog"]):
        (tmp_path / "pictures" / split).mkdir(parents=True)
        pixels = rng.integers(0, 256, (20, 30 + number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / split / "one.png")
    (tmp_path / "cifar").mkdir()
    for name in ("data_batch_1.bin", "test_batch.bin"):
        records = rng.integers(0, 256, (4, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        records.tofile(tmp_path / "cifar" / name)
    (tmp_path / "idx").mkdir()
    for prefix in ("train", "t10k"):
        pixels, labels = rng.integers(0, 256, (3, 28, 28), np.uint8), np.arange(3, dtype=np.uint8)
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            shape = np.array(array.shape, dtype=">u4").tobytes()
            head = bytes([0, 0, 8, array.ndim])
            path = tmp_path / "idx" / f"{prefix}-{kind}-ubyte"
            path.write_bytes(head + shape + array.tobytes())
    return tmp_path


@pytest.fixture
def run(tmp_path):
    from sandbox.recipe import Recipe
    from sandbox.run import LiveRun

    recipe = Recipe.model_validate(RECIPE, context={"registry": REGISTRY})
    live = LiveRun(recipe, tmp_path / "run")
    live.label = "1-task"
    return live


def named(interface):
    cases = [case for case in CASES if ENTRIES[case[0]].interface is interface]
    return pytest.mark.parametrize(("key", "params"), cases, ids=[key for key, _ in cases])


def build(key, params, *handed, seed=0):
    torch.manual_seed(seed)
    cls = ENTRIES[key].cls
    return cls(settle(cls, REGISTRY, params), *handed)


def test_no_built_in_plugin_is_broken():
    assert REGISTRY.broken == {}


def test_settings_in_the_table_are_of_registered_parts():
    assert not set(SMALL) - set(ENTRIES)


@pytest.mark.parametrize(("key", "params"), CASES, ids=[key for key, _ in CASES])
def test_every_registered_part_obeys_its_laws(key, params, files, run, monkeypatch):
    monkeypatch.chdir(files)
    entry = ENTRIES[key]
    try:
        settle(entry.cls, REGISTRY, params)
    except AssertionError as error:
        pytest.fail(f"{key}: {error}; add small settings to SMALL in {__file__}")
    check(entry.interface, entry.cls, REGISTRY, params, run=run)


@given(layout=layouts)
def test_drawn_layouts_obey_the_laws_of_layouts(layout):
    layout_law(layout)


@given(layout=layouts, seed=seeds)
def test_the_toy_tokenizer_obeys_the_laws_over_drawn_layouts(layout, seed):
    tokenizer_law(GreyTokenizer(layout), seed)


@named(sandbox.Backbone)
@settings(max_examples=10)
@given(layout=layouts, code_dim=st.integers(1, 4), seed=seeds)
def test_backbones_obey_their_laws_over_drawn_layouts(key, params, layout, code_dim, seed):
    tokens = Tokens(layout, vocab_size=5, code_dim=code_dim, num_classes=2)
    backbone_law(build(key, params, tokens, seed=seed), tokens, seed)


@named(sandbox.AttentionBackend)
@settings(max_examples=15)
@given(call=attention_calls, heads=st.integers(1, 3), seed=seeds, needs_grad=st.booleans())
def test_attention_obeys_its_law_over_drawn_calls(key, params, call, heads, seed, needs_grad):
    attention_law(build(key, params), *call, heads=heads, seed=seed, needs_grad=needs_grad)


@settings(max_examples=8)
@given(layout=pyramids, phi=st.sampled_from(["none", "shared", "partial", "per-scale"]), seed=seeds)
def test_var_vq_obeys_the_laws_over_drawn_pyramids(layout, phi, seed):
    sides = [[step.height, step.width] for step in layout.steps]
    params = {**TOKENIZER, "phi": phi, "schedule": {"name": "sides", "sides": sides}}
    tokenizer_law(build("Tokenizer-var-vq", params, seed=seed), seed)


@settings(max_examples=8)
@given(
    height=st.integers(1, 3),
    width=st.integers(1, 3),
    order=st.sampled_from(["row", "snake", "spiral", "random"]),
    seed=seeds,
)
def test_raster_vq_obeys_the_laws_over_drawn_maps(height, width, order, seed):
    schedule = {"name": "raster", "height": height, "width": width, "order": order, "seed": seed}
    params = {**TOKENIZER, "schedule": schedule}
    tokenizer_law(build("Tokenizer-raster-vq", params, seed=seed), seed)


@given(
    top_k=st.integers(0, 12),
    top_p=st.floats(0.05, 1.0),
    temperature=st.floats(0.2, 4.0),
    smoothing=st.booleans(),
    seed=seeds,
)
def test_top_k_top_p_stays_in_its_set(top_k, top_p, temperature, smoothing, seed):
    wishes = {"top_k": top_k, "top_p": top_p, "temperature": temperature, "smoothing": smoothing}
    sampler = build("Sampler-top-k-top-p", wishes)
    sampler_law(sampler, sampler.params, seed)


@named(sandbox.Objective)
@given(layout=layouts, seed=seeds)
def test_objectives_obey_their_law_over_drawn_layouts(key, params, layout, seed):
    objective_law(build(key, params), layout, seed)


@named(sandbox.Metric)
def test_metrics_do_not_depend_on_the_order_of_images(key, params):
    metric_order_law(lambda: build(key, params))


# The laws can fail: each is shown a part that breaks it.


class Peeking(torch.nn.Module):
    """A backbone that adds up the whole sequence."""

    class Params(sandbox.Params):
        pass

    def __init__(self, params, tokens):
        super().__init__()
        self.layout = tokens.layout
        self.head = torch.nn.Linear(tokens.code_dim, tokens.vocab_size)

    def forward(self, contexts, labels):
        return self.head(contexts + contexts.mean(1, keepdim=True))

    def begin(self, labels):
        return None

    def step(self, state, context, step):
        return self.head(context)

    def no_weight_decay(self):
        return set()


class Fixed:
    """A sampler that ignores what it is asked."""

    class Params(sandbox.Params):
        top_k: int = 2

    def __init__(self, params):
        self.params = params

    def guidance(self, progress):
        return 0.0

    def draw(self, logits, progress, rng):
        return torch.randint(logits.shape[-1], logits.shape[:-1], generator=rng)


class Unmasked:
    """An attention backend that forgets the mask."""

    class Params(sandbox.Params):
        pass

    def __init__(self, params):
        self.params = params

    def refusal(self, request):
        return None

    def attend(self, q, k, v, mask, scale):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)


class Overpainting(GreyTokenizer):
    """A tokenizer that paints into the canvas it is given."""

    def paint(self, canvas, codes, step):
        return canvas.copy_(super().paint(canvas, codes, step))


@pytest.mark.parametrize(
    ("interface", "cls", "law"),
    [
        (sandbox.Backbone, Peeking, "stepwise"),
        (sandbox.Sampler, Fixed, "-inf"),
        (sandbox.AttentionBackend, Unmasked, "formula"),
    ],
)
def test_a_part_that_breaks_a_law_is_told_which(interface, cls, law):
    with pytest.raises(AssertionError, match=law):
        check(interface, cls, REGISTRY)


def test_painting_over_the_given_canvas_is_found():
    with pytest.raises(AssertionError, match="leaves the canvas"):
        tokenizer_law(Overpainting(Layout.pyramid(1, 2)))


def test_a_part_that_needs_settings_says_so():
    with pytest.raises(AssertionError, match="sides: Field required"):
        check(sandbox.ScaleSchedule, ENTRIES["ScaleSchedule-sides"].cls, REGISTRY)


def test_an_interface_without_laws_is_named():
    with pytest.raises(ValueError, match="has no laws"):
        check(Tokens, Peeking, REGISTRY)
