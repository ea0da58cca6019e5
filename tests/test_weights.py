"""Weights come whole, unchanged and fitting, or not at all; a file never runs code."""

import hashlib
import os
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from torch import nn

from sandbox import Layout, Part, SandboxError, Tokens, write_tensors
from sandbox.weights import load_weights, locate
from sandbox_plugins.attention import MathAttention
from sandbox_plugins.var.model import VAR

TOKENS = Tokens(Layout.pyramid(1, 2), vocab_size=8, code_dim=4, num_classes=3)


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(3, 2)


def backbone(tokens=TOKENS, **settings):
    attention = Part("math", MathAttention, MathAttention.Params())
    return VAR(
        VAR.Params(**{"depth": 1, "width": 16, "num_heads": 2, **settings, "attention": attention}),
        tokens,
    )


def same(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    return list(mine) == list(theirs) and all(torch.equal(mine[n], theirs[n]) for n in mine)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def refusal(module, source, role="generator"):
    """The one line that says why weights were not loaded, the module being left as it was."""
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(SandboxError) as caught:
        load_weights(module, str(source), role)
    assert all(torch.equal(before[n], t) for n, t in module.state_dict().items())
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def kept(tmp_path):
    """A network's weights in a safetensors file."""
    path = tmp_path / "weights.safetensors"
    write_tensors(path, small().state_dict())
    return path


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_parameters_that_are_not_finite_are_refused(tmp_path, value, dtype):
    path, state = tmp_path / "sick.safetensors", small().to(dtype).state_dict()
    state["bias"][1] = value
    write_tensors(path, state)
    said = refusal(small(1), path)
    assert "of its 2 parameters 1 are not finite" in said and "bias for one" in said


def test_a_buffer_may_hold_what_it_likes(tmp_path):
    masked = small()
    masked.register_buffer("mask", torch.full((2,), -torch.inf))
    write_tensors(tmp_path / "masked.safetensors", masked.state_dict())
    load_weights(masked, str(tmp_path / "masked.safetensors"), "generator")


def test_a_safetensors_file_is_loaded_and_its_checksum_told(kept):
    module = small(1)
    assert load_weights(module, str(kept), "generator") == sha256(kept)
    assert same(module, small())


def test_a_run_folder_stands_for_the_weights_of_the_role(tmp_path):
    write_tensors(tmp_path / "weights" / "tokenizer.safetensors", small().state_dict())
    module = small(1)
    load_weights(module, str(tmp_path), "tokenizer")
    assert same(module, small())
    assert "weights/generator.safetensors: no such weights file" in refusal(module, tmp_path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "as before torch 1.6"])
def test_a_pth_file_of_plain_weights_is_loaded(tmp_path, zipped):
    path = tmp_path / "weights.pth"
    torch.save(small().state_dict(), path, _use_new_zipfile_serialization=zipped)
    module = small(1)
    load_weights(module, str(path), "generator")
    assert same(module, small())


class Malice:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "as before torch 1.6"])
def test_a_malicious_pickle_is_refused_and_runs_no_code(tmp_path, zipped):
    path, trace = tmp_path / "evil.pth", tmp_path / "trace"
    content = {**small().state_dict(), "evil": Malice(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert "evil.pth: truncated, or not a file of plain weights" in refusal(small(1), path)
    assert not trace.exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "as before torch 1.6"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_pth_file_is_refused(tmp_path, share, zipped):
    path = tmp_path / "weights.pth"
    state = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    assert "weights.pth: truncated, or not a file of plain weights" in refusal(small(), path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_safetensors_file_is_refused(kept, share):
    whole = kept.read_bytes()
    kept.write_bytes(whole[: int(share * len(whole))])
    assert "weights.safetensors: truncated or not a safetensors file" in refusal(small(), kept)


@pytest.mark.parametrize("content", [[torch.ones(2)], {"state": {"a": torch.ones(1)}}, 3])
def test_a_pth_file_of_something_else_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    assert "expected a mapping of names to tensors" in refusal(small(), tmp_path / "weights.pth")


def test_a_missing_file_is_refused_with_the_kinds_there_are(tmp_path):
    told = refusal(small(), tmp_path / "absent.pth")
    assert "no such weights file" in told and "hf://" in told


def test_a_checksum_holds_a_file_to_its_bytes(kept):
    load_weights(small(1), f"{kept}#sha256={sha256(kept).upper()}", "generator")
    told = refusal(small(1), f"{kept}#sha256={'0' * 64}")
    assert sha256(kept) in told and "0" * 64 in told


def test_weights_that_do_not_fit_are_named(tmp_path, kept):
    assert "weight is (2, 3) there, (2, 5) here" in refusal(nn.Linear(5, 2), kept)
    assert "it has bias, which is unknown here" in refusal(nn.Linear(3, 2, bias=False), kept)
    write_tensors(tmp_path / "less.safetensors", {"weight": torch.ones(2, 3)})
    assert "it lacks bias" in refusal(small(), tmp_path / "less.safetensors")


@pytest.mark.parametrize(
    ("settings", "tokens", "says"),
    [
        ({"depth": 2}, TOKENS, "its depth is 2, the recipe's is 1"),
        ({"width": 32}, TOKENS, "its width is 32, the recipe's is 16"),
        ({"num_heads": 4}, TOKENS, "its head count is 4, the recipe's is 2"),
        ({"shared_adaln": True}, TOKENS, "its AdaLN is shared, the recipe's is per block"),
        ({}, Tokens(Layout.pyramid(1, 2, 3), 8, 4, 3), "its token count is 14, the recipe's is 5"),
        ({}, Tokens(Layout.pyramid(1, 2), 9, 4, 3), "its vocabulary size is 9, the recipe's is 8"),
        ({}, Tokens(Layout.pyramid(1, 2), 8, 4, 7), "its class count is 7, the recipe's is 3"),
    ],
)
def test_another_models_weights_are_refused_in_plain_words(tmp_path, settings, tokens, says):
    other = backbone(tokens, **settings)
    for name, state in (("ours", other.state_dict()), ("published", other.to_published())):
        path = tmp_path / f"{name}.safetensors"
        write_tensors(path, state)
        assert says in refusal(backbone(), path)


def test_the_published_layout_is_translated(tmp_path):
    path, module = tmp_path / "var.pth", backbone()
    torch.manual_seed(1)
    other = backbone()
    assert not same(module, other)
    torch.save(other.to_published(), path)
    load_weights(module, str(path), "generator")
    assert same(module, other)


def test_published_weights_of_other_scales_of_the_same_length_are_refused(tmp_path):
    one = Tokens(Layout.pyramid((1, 1), (1, 2), (2, 2)), 8, 4, 3)
    other = Tokens(Layout.pyramid((1, 2), (1, 5)), 8, 4, 3)
    assert one.layout.seq_len == other.layout.seq_len
    write_tensors(tmp_path / "var.safetensors", backbone(other).to_published())
    assert "other scales" in refusal(backbone(one), tmp_path / "var.safetensors")


class Hub:
    """Stands in for huggingface_hub's functions, which would use the network."""

    def __init__(self, monkeypatch, path=None, etag="", cached=None):
        self.path, self.etag, self.cached, self.asked = path, etag, cached, []
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.download)
        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", self.metadata)
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", self.from_cache)

    def download(self, repo, name, *, revision):
        self.asked.append((repo, name, revision))
        if self.path is None:
            raise OSError("no network\nin two lines")
        return str(self.path)

    def metadata(self, url):
        self.asked.append(url)
        return SimpleNamespace(etag=self.etag)

    def from_cache(self, repo, name, *, revision):
        self.asked.append((repo, name, revision))
        return str(self.cached) if self.cached else None


def test_a_hub_file_is_fetched_at_its_pinned_revision_and_checked(kept, monkeypatch):
    hub, module = Hub(monkeypatch, kept, sha256(kept)), small(1)
    load_weights(module, "hf://owner/models/deep/var.safetensors@abc123", "generator")
    assert same(module, small())
    assert hub.asked[0] == ("owner/models", "deep/var.safetensors", "abc123")
    assert "abc123" in hub.asked[1]


def test_a_hub_file_without_a_revision_is_that_of_main(kept, monkeypatch):
    hub = Hub(monkeypatch, kept, "a-short-etag-is-no-checksum")
    source = f"hf://owner/models/var.safetensors#sha256={sha256(kept)}"
    assert locate(source, "generator") == (kept, sha256(kept))
    assert hub.asked[0] == ("owner/models", "var.safetensors", "main")


def test_hub_bytes_that_differ_from_the_hubs_checksum_are_refused(kept, monkeypatch):
    Hub(monkeypatch, kept, "0" * 64)
    told = refusal(small(1), "hf://owner/models/var.safetensors")
    assert str(kept) in told and "do not match" in told and "delete it" in told


def test_hub_bytes_that_differ_from_the_recipes_checksum_are_refused(kept, monkeypatch):
    Hub(monkeypatch, kept, sha256(kept))
    told = refusal(small(1), f"hf://owner/models/var.safetensors#sha256={'1' * 64}")
    assert sha256(kept) in told


def test_without_a_network_one_line_tells_how_to_get_the_file(monkeypatch):
    Hub(monkeypatch)
    told = refusal(small(), "hf://owner/models/deep/var.pth@abc123")
    assert "hf download owner/models deep/var.pth --revision abc123" in told
    assert "hf://owner/models/deep/var.pth" in told


def test_without_a_network_a_cached_file_will_do(kept, monkeypatch):
    hub = Hub(monkeypatch, cached=kept)
    assert locate("hf://owner/models/var.safetensors@abc123", "generator")[0] == kept
    assert hub.asked[-1] == ("owner/models", "var.safetensors", "abc123")


@pytest.mark.parametrize("place", ["hf://", "hf://var.pth", "hf://owner/models", "hf://a/b/@main"])
def test_an_incomplete_hub_address_is_refused(place, monkeypatch):
    hub = Hub(monkeypatch)
    assert "expected hf://owner/repository/file" in refusal(small(), place)
    assert not hub.asked


def test_nothing_is_fetched_for_a_local_file(kept, monkeypatch):
    hub = Hub(monkeypatch)
    assert locate(str(kept), "generator") == (Path(kept), None)
    assert not hub.asked


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package that brings a file of weights."""
    folder = tmp_path / "bringing_weights"
    (folder / "weights").mkdir(parents=True)
    (folder / "__init__.py").touch()
    write_tensors(folder / "weights" / "small.safetensors", small().state_dict())
    monkeypatch.syspath_prepend(tmp_path)
    return "package://bringing_weights/weights/small.safetensors"


def test_the_weights_of_an_installed_package_are_loaded(package):
    module = small(1)
    digest = load_weights(module, package, "generator")
    assert same(module, small())
    load_weights(module, f"{package}#sha256={digest}", "generator")


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("package://bringing_weights/weights/smal.safetensors", "mean 'weights/small.safetensors'"),
        ("package://bringing_weights/x.pth", "(there: weights/small.safetensors)"),
        ("package://not_installed/x.safetensors", "no package 'not_installed' is installed here"),
        ("package://json.decoder/x.safetensors", "no package 'json.decoder' is installed here"),
        ("package://bringing_weights", "expected package://package/path/to/file"),
        ("package://bringing_weights/../x.pth", "expected package://package/path/to/file"),
    ],
)
def test_what_a_package_does_not_bring_is_refused(package, source, told):
    assert told in refusal(small(1), source)


def test_half_precision_files_load_into_full_precision_modules(tmp_path):
    half = {name: tensor.bfloat16() for name, tensor in small().state_dict().items()}
    write_tensors(tmp_path / "half.safetensors", half)
    module = small(1)
    load_weights(module, str(tmp_path / "half.safetensors"), "generator")
    for name, tensor in module.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, half[name].float())
