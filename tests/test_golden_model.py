"""The transformer and its sampling, held against what the published code computes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from golden.fill import fill_

import sandbox

GOLDEN = Path(__file__).parent / "golden"
CASES = {
    "small": {
        "image_size": (64, 64),
        "num_classes": 10,
        "sides": (1, 2, 3, 4),
        "vocab_size": 128,
        "code_dim": 16,
        "backbone": {"depth": 4, "width": 128, "num_heads": 2},
    },
    "shared_adaln": {
        "image_size": (96, 96),
        "num_classes": 5,
        "sides": (1, 2, 4, 6),
        "vocab_size": 64,
        "code_dim": 8,
        "backbone": {"depth": 2, "width": 64, "num_heads": 2, "shared_adaln": True},
    },
}
GREEDY = {"name": "greedy", "guidance": 1.5}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    arrays = np.load(GOLDEN / f"{request.param}.npz")
    return CASES[request.param], {name: torch.from_numpy(arrays[name]) for name in arrays}


def named(registry, interface, settings):
    """The part that a recipe would mean by `settings`."""
    cls = registry.find(interface, settings["name"])
    rest = {key: value for key, value in settings.items() if key != "name"}
    return cls, cls.Params.model_validate(rest, context={"registry": registry})


def generator_of(registry, facts, sampler, attention="sdpa"):
    """The case's generator with its golden weights, loaded through the published layout.

    Attention as the published code computes it: smoothing divides logits by a temperature of down
    to 0.005, which makes another order of summation visible in the images.
    """
    cls, params = named(
        registry,
        sandbox.Tokenizer,
        {
            "name": "var-vq",
            "autoencoder": {"name": "cnn", "ch": 32, "code_dim": facts["code_dim"]},
            "codebook": {"name": "vq", "vocab_size": facts["vocab_size"]},
            "schedule": {"name": "sides", "sides": facts["sides"]},
        },
    )
    tokenizer = cls(params)
    filled(tokenizer)
    backbone = {"name": "var", "attention": attention, **facts["backbone"]}
    cls, params = named(
        registry,
        sandbox.Generator,
        {"name": "autoregressive", "backbone": backbone, "sampler": sampler},
    )
    generator = cls(params, sandbox.Subject(facts["image_size"], facts["num_classes"], tokenizer))
    filled(generator.network)
    return generator


def filled(module):
    published = fill_({name: value.clone() for name, value in module.to_published().items()})
    module.load_state_dict(module.from_published(published), strict=True)
    module.eval()


def drawn(generator, arrays, seed=7):
    """The ids and the images in [0, 1] that the case's labels give."""
    sampled = sandbox.sample(
        generator.tokenizer,
        generator.network,
        generator.sampler,
        arrays["label"],
        torch.Generator().manual_seed(seed),
        no_label=generator.num_classes,
    )
    rng = torch.Generator().manual_seed(seed)
    return sampled.ids, (generator.generate(arrays["label"], rng) + 1) / 2


def assert_close(ours, golden, tolerance=1e-4):
    assert ours.shape == golden.shape
    assert (ours - golden).abs().max() <= tolerance * golden.abs().max()


@pytest.mark.parametrize("attention", ["math", "sdpa", "flex"])
def test_the_logits_are_the_published_ones(registry, case, attention):
    facts, arrays = case
    generator = generator_of(registry, facts, GREEDY, attention)
    first = torch.zeros(len(arrays["label"]), 1, facts["code_dim"])
    contexts = torch.cat([first, arrays["teacher_forcing_input"]], dim=1)
    with torch.no_grad():
        assert_close(generator.network(contexts, arrays["label"]), arrays["logits"])
        from_ids = generator.tokenizer.contexts(arrays["tokens"].long())
        assert_close(generator.network(from_ids, arrays["label"]), arrays["logits"])


@pytest.mark.parametrize("kind", ["greedy", "sampled", "smooth"])
def test_samples_are_the_published_ones(registry, case, kind):
    facts, arrays = case
    sampler = GREEDY
    if kind != "greedy":
        sampler = {
            "name": "top-k-top-p",
            "guidance": 3.0,
            "top_k": facts["vocab_size"] // 4,
            "top_p": 0.9,
            "smoothing": kind == "smooth",
        }
    ids, images = drawn(generator_of(registry, facts, sampler), arrays)
    assert torch.equal(ids, arrays[f"{kind}_tokens"].long())
    # Codes are mixed by a softmax at a temperature down to 0.0135: of each rounding error in the
    # logits, which differ from processor to processor, it makes up to a hundred.
    assert_close(images, arrays[f"{kind}_image"], 1e-3 if kind == "smooth" else 1e-4)


def test_greedy_is_the_likeliest_one_of_top_k(registry, case):
    facts, arrays = case
    top_1 = {"name": "top-k-top-p", "guidance": 1.5, "top_k": 1, "top_p": 1.0}
    ids, images = drawn(generator_of(registry, facts, top_1), arrays)
    assert torch.equal(ids, arrays["greedy_tokens"].long())
    assert_close(images, arrays["greedy_image"])


@pytest.mark.parametrize("kind", ["inpaint", "outpaint"])
def test_edits_are_the_published_ones(registry, case, kind):
    facts, arrays = case
    generator = generator_of(registry, facts, GREEDY)
    edited = generator.edit(
        arrays["image"], arrays[f"{kind}_keep_mask"], arrays["label"], torch.Generator()
    )
    assert_close((edited + 1) / 2, arrays[f"{kind}_image"])
