"""The tokenizer against numbers that the published code computed (see golden/fill.py)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden.fill import fill_

from sandbox import Tokenizer

GOLDEN = Path(__file__).parent / "golden"
CASES = {
    "small": ({"ch": 32, "code_dim": 16}, 128, {"name": "sides", "sides": [1, 2, 3, 4]}),
    "shared_adaln": ({"ch": 32, "code_dim": 8}, 64, {"name": "sides", "sides": [1, 2, 4, 6]}),
}


def build(registry, cnn, vocab_size, schedule):
    cls = registry.find(Tokenizer, "var-vq")
    settings = {
        "autoencoder": {"name": "cnn", **cnn},
        "codebook": {"name": "vq", "vocab_size": vocab_size},
        "schedule": schedule,
    }
    return cls(cls.Params.model_validate(settings, context={"registry": registry})).eval()


@pytest.fixture(scope="module", params=CASES)
def case(request, registry):
    tokenizer = build(registry, *CASES[request.param])
    published = fill_(tokenizer.to_published())
    tokenizer.load_state_dict(tokenizer.from_published(published), strict=True)
    with np.load(GOLDEN / f"{request.param}.npz") as arrays:
        return tokenizer, {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def check(found, expected):
    """To 1e-4 of the largest value."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_tokens_are_exactly_the_published_ones(case):
    tokenizer, golden = case
    assert torch.equal(tokenizer.encode(golden["image"]), golden["tokens"].long())


@torch.no_grad()
def test_features_and_canvases_are_the_published_ones(case):
    tokenizer, golden = case
    check(tokenizer.autoencoder.encode(golden["image"]), golden["feature"])
    canvas = tokenizer.canvas(len(golden["image"]))
    for step, span in enumerate(tokenizer.layout.spans):
        codes = tokenizer.embed(golden["tokens"].long()[:, span])
        canvas = tokenizer.paint(canvas, codes, step)
        if step == 0:
            check(canvas, golden["f_hat_scale0"])
    check(canvas, golden["f_hat"])
    check(tokenizer.render(canvas), golden["reconstruction"])


def test_contexts_are_the_published_teacher_forcing_input(case):
    tokenizer, golden = case
    contexts = tokenizer.contexts(golden["tokens"].long())
    assert not contexts[:, 0].any()
    check(contexts[:, 1:], golden["teacher_forcing_input"])


@torch.no_grad()
def test_reconstruction_is_the_published_one(case):
    tokenizer, golden = case
    check(tokenizer.decode(golden["tokens"].long()), golden["reconstruction"])
    check(tokenizer.reconstruct(golden["image"]).images.clamp(-1, 1), golden["reconstruction"])


def test_a_file_with_the_published_layout_loads_strictly(registry):
    layout = json.loads((GOLDEN / "published_layout.json").read_text())["vae_ch160v4096z32"]
    with torch.device("meta"):
        tokenizer = build(registry, {}, 4096, {"name": "published"})
        file = {
            name: torch.empty(shape, dtype=getattr(torch, kind))
            for name, (shape, kind) in layout.items()
        }
    tokenizer.load_state_dict(tokenizer.from_published(file), strict=True, assign=True)
    ours = tokenizer.to_published()
    assert {name: [list(t.shape), str(t.dtype)[6:]] for name, t in ours.items()} == layout
    weights = [tensor.numel() for name, tensor in ours.items() if "hit" not in name]
    assert round(sum(weights) / 1e6, 2) == 108.95
    assert sum(p.numel() for p in tokenizer.parameters()) == sum(weights)
