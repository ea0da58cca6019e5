"""A tokenizer's weights: published and read back, under another schedule, codebook or lookup."""

import pytest
import torch

from sandbox import Part, SandboxError, load_weights
from sandbox.checkpoint import write_tensors
from sandbox_plugins.autoencoders import CNN, Patch
from sandbox_plugins.codebooks import FSQ, LFQ, VQ, SimVQ
from sandbox_plugins.schedules import Sides
from sandbox_plugins.var.tokenizer import VarTokenizer

CNN_PART = Part("cnn", CNN, CNN.Params(ch=32, ch_mult=(1, 1), num_res_blocks=1, code_dim=4))


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


def vq(**settings):
    return Part("vq", VQ, VQ.Params(vocab_size=16, **settings))


def build(sides=(1, 2, 3), codebook=None, autoencoder=CNN_PART, **settings):
    return VarTokenizer(
        VarTokenizer.Params(
            autoencoder=autoencoder,
            codebook=codebook or vq(),
            schedule=Part("sides", Sides, Sides.Params(sides=sides)),
            **settings,
        )
    )


def refusal(module, path):
    with pytest.raises(SandboxError) as caught:
        load_weights(module, str(path), "tokenizer")
    told = str(caught.value)
    assert str(path) in told and "\n" not in told
    return told


@pytest.mark.parametrize("phi", ["none", "shared", "partial", "per-scale"])
def test_published_names_survive_the_round_trip(phi):
    first, second = (build((1, 2, 3), phi=phi).eval() for _ in range(2))
    first.hits.uniform_()
    published = first.to_published()
    phis = {name.rsplit(".", 1)[0] for name in published if "quant_resi" in name}
    assert (
        phis
        == {
            "none": set(),
            "shared": {"quantize.quant_resi.qresi"},
            "partial": {f"quantize.quant_resi.qresi_ls.{n}" for n in range(4)},
            "per-scale": {f"quantize.quant_resi.{n}" for n in range(3)},
        }[phi]
    )
    second.load_state_dict(second.from_published(published))
    for name, tensor in second.to_published().items():
        assert torch.equal(tensor, published[name]), name
    images = torch.rand(2, 3, *first.image_size) * 2 - 1
    assert torch.equal(second.encode(images), first.encode(images))


def test_usage_counts_of_another_number_of_scales_do_not_hinder_loading():
    published = build((1, 2, 3)).to_published()
    other = build((1, 2))
    other.load_state_dict(other.from_published(published))
    assert not other.hits.any()


def test_our_own_names_are_not_taken_for_published_ones():
    tokenizer = build(autoencoder=Part("patch", Patch, Patch.Params(code_dim=4)))
    assert tokenizer.from_published(tokenizer.state_dict()) is None
    with pytest.raises(ValueError, match="only the autoencoder `cnn`"):
        tokenizer.to_published()


def test_a_state_dict_is_described_in_plain_words():
    tokenizer = build((1, 2, 3), phi="shared")
    assert tokenizer.describe(tokenizer.state_dict()) == {
        "channel count": "32",
        "resolution count": "2",
        "code count": "16",
        "code width": "4",
        "codebook lookup": "euclidean",
        "scale count": "3",
        "phi convolution count": "1",
    }
    assert tokenizer.describe({}) == {}


@pytest.mark.parametrize("phi", ["none", "shared", "partial"])
def test_a_trained_tokenizer_takes_another_schedule(tmp_path, phi):
    path, trained = tmp_path / "ours.safetensors", build((1, 2, 3), phi=phi)
    trained.hits.uniform_()
    write_tensors(path, trained.state_dict())
    torch.manual_seed(1)
    other = build((1, 3), phi=phi)
    load_weights(other, str(path), "tokenizer")
    state = other.state_dict()
    assert not state.pop("hits").any()
    assert all(torch.equal(t, trained.state_dict()[name]) for name, t in state.items())


def test_one_convolution_a_scale_is_refused_for_another_number_of_scales(tmp_path):
    path = tmp_path / "ours.safetensors"
    write_tensors(path, build((1, 2, 3), phi="per-scale").state_dict())
    told = refusal(build((1, 3), phi="per-scale"), path)
    assert "its scale count is 3, the recipe's is 2" in told
    assert "its phi convolution count is 3, the recipe's is 2" in told


def test_weights_trained_with_another_lookup_are_refused(tmp_path):
    euclidean, cosine = build(), build(codebook=vq(lookup="cosine"))
    path = tmp_path / "ours.safetensors"
    write_tensors(path, cosine.state_dict())
    assert "trained with `codebook.lookup: cosine`" in refusal(euclidean, path)
    load_weights(build(codebook=vq(lookup="cosine")), str(path), "tokenizer")
    write_tensors(path, euclidean.to_published())
    assert "trained with `codebook.lookup: euclidean`" in refusal(cosine, path)
    load_weights(euclidean, str(path), "tokenizer")


def test_simvq_is_published_as_the_table_it_amounts_to():
    trained = build(codebook=Part("simvq", SimVQ, SimVQ.Params(vocab_size=16))).eval()
    published = trained.to_published()
    assert not [name for name in published if "projection" in name or "frozen" in name]
    table = build().eval()
    assert set(published) == set(table.to_published())
    table.load_state_dict(table.from_published(published))
    images = torch.rand(4, 3, *trained.image_size) * 2 - 1
    ids = trained.encode(images)
    assert torch.equal(table.encode(images), ids)
    assert torch.equal(table.decode(ids), trained.decode(ids))


@pytest.mark.parametrize(
    ("codebook", "reason"),
    [
        (vq(lookup="cosine"), "`lookup: cosine`"),
        (Part("fsq", FSQ, FSQ.Params(levels=(3, 3, 3, 3))), "`fsq` has levels"),
        (Part("lfq", LFQ, LFQ.Params()), "`lfq` has levels"),
    ],
    ids=["cosine", "fsq", "lfq"],
)
def test_what_the_published_layout_cannot_say_is_not_published(codebook, reason):
    with pytest.raises(ValueError, match=reason):
        build(codebook=codebook).to_published()


@pytest.mark.parametrize(
    "codebook",
    [
        vq(lookup="cosine", update="gradient", entropy_weight=0.1),
        Part("simvq", SimVQ, SimVQ.Params(vocab_size=16)),
        Part("fsq", FSQ, FSQ.Params(levels=(3, 3, 3, 3))),
        Part("lfq", LFQ, LFQ.Params()),
    ],
    ids=["cosine", "simvq", "fsq", "lfq"],
)
def test_every_codebook_trains_a_tokenizer(codebook):
    tokenizer = build((1, 2, 4), codebook).train()
    images = torch.rand(16, 3, *tokenizer.image_size) * 2 - 1
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=2e-3)
    tokenizer.initialise([images])
    errors = []
    for _ in range(12):
        made = tokenizer.reconstruct(images)
        errors.append((made.images - images).square().mean())
        optimizer.zero_grad()
        (errors[-1] + made.loss).backward()
        optimizer.step()
        tokenizer.after_step(optimizer, 0.0, torch.Generator().manual_seed(0))
    assert errors[-1] < 0.95 * errors[0]
