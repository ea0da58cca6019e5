"""The parts of a run in a few lines of Python, as in a notebook."""

import pytest
import torch

import sandbox
from sandbox.recipe import load_recipe
from sandbox.run import execute
from sandbox.scaffold import write_plugin
from sandbox.weights import load_weights

pytestmark = pytest.mark.usefixtures("one_thread")

TRAINING = "num_images: 32, batch_size: 16, num_validation_images: 8, report_every: 32"
RECIPE = f"""\
seed: 1
device: cpu
dataset: {{name: shapes, image_size: 16, num_images: 32, num_validation: 8, num_classes: 4}}
tokenizer:
  name: var-vq
  autoencoder: {{name: cnn, ch: 32, ch_mult: [1, 1, 1], num_res_blocks: 1, code_dim: 4}}
  codebook: {{name: vq, vocab_size: 16}}
  schedule: {{name: sides, sides: [1, 2, 4]}}
generator:
  name: autoregressive
  backbone: {{name: var, depth: 1, width: 16, num_heads: 2}}
tasks:
  - {{name: train-tokenizer, {TRAINING}}}
  - {{name: train-generator, strips: false, {TRAINING}}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, registry, one_thread):
    """A run folder with a trained tokenizer and generator."""
    home = tmp_path_factory.mktemp("notebook")
    (home / "tiny.yaml").write_text(RECIPE)
    execute(load_recipe(home / "tiny.yaml", [], registry), home / "run", name="tiny")
    return home / "run"


@pytest.fixture
def run(folder):
    return sandbox.load(folder, device="cpu")


def test_a_run_folder_gives_its_trained_parts(run, folder):
    for role, module in (("tokenizer", run.tokenizer), ("generator", run.generator.network)):
        kept, _ = sandbox.read_tensors(folder / "weights" / f"{role}.safetensors")
        assert run.has_weights(role) and not module.training
        assert all(torch.equal(kept[name], t) for name, t in module.state_dict().items())


def test_a_folder_of_plugins_may_be_given_as_text(folder, tmp_path):
    write_plugin(tmp_path, "notebook_sampler", "sampler")
    words = ["generator.sampler=notebook-sampler", "device=cpu"]
    run = sandbox.load(folder, *words, plugins=[str(tmp_path)])
    assert run.settings("generator")["sampler"]["name"] == "notebook-sampler"
    with pytest.raises(sandbox.SandboxError, match="no such folder"):
        sandbox.load(folder, plugins=["nowhere"])


def test_images_are_generated_from_labels_and_a_seed(run):
    labels = torch.tensor([0, 1, 3])
    images = run.generator.generate(labels, run.rng("mine"))
    assert images.shape == (3, 3, 16, 16)
    assert float(images.min()) >= -1 and float(images.max()) <= 1
    assert torch.equal(images, run.generator.generate(labels, run.rng("mine")))
    assert not torch.equal(images, run.generator.generate(labels, run.rng("another")))


def test_every_scale_can_be_watched(run):
    seen = []
    images = run.generator.generate(
        torch.tensor([0, 1]),
        run.rng("mine"),
        watch=lambda step, images: seen.append((step, images)),
    )
    assert [step for step, _ in seen] == [0, 1, 2]
    assert all(shown.shape == images.shape for _, shown in seen)
    assert torch.equal(seen[-1][1], images) and not torch.equal(seen[0][1], images)


def test_images_are_tokenized_and_reconstructed(run):
    batch = next(iter(sandbox.sweep(run.dataset, "validation", 4)))
    ids = run.tokenizer.encode(batch.images)
    again = run.tokenizer.decode(ids)
    assert ids.shape == (4, 1 + 4 + 16) and again.shape == batch.images.shape
    assert int(ids.min()) >= 0 and int(ids.max()) < 16
    images = run.generator.edit(
        batch.images, torch.ones(16, 16), batch.labels, run.rng("edit")
    )  # all of it kept: the reconstruction
    assert torch.allclose(images, again, atol=1e-5)


def test_a_recipe_file_gives_untrained_parts_and_overrides_apply(tmp_path, folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = folder.parent / "tiny.yaml"
    run = sandbox.load(recipe, "generator.backbone.depth=2", device="cpu")
    assert len(run.generator.network.blocks) == 2 and not run.has_weights("generator")
    assert not list(tmp_path.iterdir()), "loading writes nothing"


def test_overrides_also_apply_to_a_run_folder(folder):
    run = sandbox.load(folder, "generator.sampler={name: greedy}", device="cpu")
    labels = torch.tensor([0, 1])
    images = run.generator.generate(labels, run.rng("mine"))
    assert torch.equal(images, run.generator.generate(labels, run.rng("another")))


def test_a_folder_that_holds_no_run_is_refused(tmp_path):
    with pytest.raises(sandbox.SandboxError, match="no such recipe"):
        sandbox.load(tmp_path)


def test_exported_weights_load_back_as_they_were(run, folder, tmp_path):
    written = sandbox.export(run, tmp_path / "published")
    assert [path.name for path in written] == ["vae.safetensors", "var.safetensors"]
    fresh = sandbox.load(folder.parent / "tiny.yaml", "seed=9", device="cpu")
    for path, module, other, role in (
        (written[0], run.tokenizer, fresh.tokenizer, "tokenizer"),
        (written[1], run.generator.network, fresh.generator.network, "generator"),
    ):
        load_weights(other, str(path), role)
        for name, tensor in module.to_published().items():
            assert torch.equal(other.to_published()[name], tensor), name
    assert {"pos_1LC", "lvl_1L", "attn_bias_for_masking"} <= set(
        sandbox.read_tensors(written[1])[0]
    )
    assert "quantize.embedding.weight" in sandbox.read_tensors(written[0])[0]
    labels = torch.tensor([0, 1, 2])
    images = run.generator.generate(labels, torch.Generator().manual_seed(0))
    assert torch.equal(images, fresh.generator.generate(labels, torch.Generator().manual_seed(0)))


def test_exported_weights_serve_another_recipe_as_its_weights(run, folder, tmp_path):
    vae, var = sandbox.export(run, tmp_path)
    words = [f"weights.tokenizer={vae}", f"weights.generator={var}"]
    other = sandbox.load(folder.parent / "tiny.yaml", *words, device="cpu")
    labels = torch.tensor([0, 1, 2])
    images = run.generator.generate(labels, torch.Generator().manual_seed(0))
    assert torch.equal(images, other.generator.generate(labels, torch.Generator().manual_seed(0)))


def test_own_weights_are_exported_in_half_precision_where_they_are_large(run, folder, tmp_path):
    paths = sandbox.export(run, tmp_path, layout="own", dtype="bfloat16")
    assert [path.name for path in paths] == ["tokenizer.safetensors", "generator.safetensors"]
    for path, module in zip(paths, (run.tokenizer, run.generator.network), strict=True):
        kept, _ = sandbox.read_tensors(path)
        own = module.state_dict()
        assert kept.keys() == own.keys()
        for name, tensor in own.items():
            large = tensor.is_floating_point() and tensor.numel() > 1024
            assert kept[name].dtype == (torch.bfloat16 if large else tensor.dtype), name
            torch.testing.assert_close(kept[name].to(tensor.dtype), tensor, rtol=4e-3, atol=0)
        assert any(tensor.dtype == torch.bfloat16 for tensor in kept.values())
    words = [f"weights.{path.stem}={path}" for path in paths]
    other = sandbox.load(folder.parent / "tiny.yaml", *words, device="cpu")
    assert {t.dtype for t in other.generator.network.parameters()} == {torch.float32}
    images = other.generator.generate(torch.tensor([0, 1]), torch.Generator().manual_seed(0))
    assert bool(images.isfinite().all())


def test_published_weights_load_from_half_precision_too(run, folder, tmp_path):
    vae, var = sandbox.export(run, tmp_path, dtype="bfloat16")
    words = [f"weights.tokenizer={vae}", f"weights.generator={var}"]
    other = sandbox.load(folder.parent / "tiny.yaml", *words, device="cpu")
    for name, tensor in run.generator.network.state_dict().items():
        found = other.generator.network.state_dict()[name]
        torch.testing.assert_close(found, tensor, rtol=4e-3, atol=0)


def test_an_unknown_layout_or_type_is_refused(run, tmp_path):
    with pytest.raises(sandbox.SandboxError, match="'theirs' is none of published, own"):
        sandbox.export(run, tmp_path, layout="theirs")
    with pytest.raises(sandbox.SandboxError, match="'int8' is none of float32, bfloat16"):
        sandbox.export(run, tmp_path, dtype="int8")
