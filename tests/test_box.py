"""The trained model that comes with the sandbox: small, whole, and really trained."""

from pathlib import Path

import pytest
import torch

import sandbox
from sandbox.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = Path("recipes/cifar10_sample.yaml")
MOST_BYTES = 16e6


@pytest.fixture(scope="module")
def run():
    return sandbox.load(RECIPE, device="cpu")


def test_the_weights_are_small():
    files = list(Path("plugins/weights").glob("*.safetensors"))
    assert len(files) == 2 and sum(path.stat().st_size for path in files) <= MOST_BYTES


def test_the_recipe_draws_a_grid(tmp_path):
    assert main(["run", str(RECIPE), "--out", str(tmp_path), "--set", "tasks.0.num_images=10"]) == 0
    assert (tmp_path / "1-sample" / "samples.png").stat().st_size > 5_000


@torch.no_grad()
def test_the_tokenizer_reconstructs_what_it_never_saw(run, registry):
    """Drawn shapes are no photographs: less than on CIFAR-10, far more than without training."""
    shapes = registry.find(sandbox.Dataset, "shapes")
    drawn = shapes(shapes.Params(image_size=32, num_images=64, num_validation=8))
    images = drawn.batch("train", torch.arange(64), torch.Generator().manual_seed(0)).images
    ids = run.tokenizer.encode(images)
    error = (run.tokenizer.decode(ids) - images).square().mean()
    assert 10 * torch.log10(4 / error) > 18
    assert len(ids.unique()) > 256


@torch.no_grad()
def test_the_generator_knows_which_class_it_drew(run):
    labels = torch.arange(20) % 10
    drawn = run.generator.generate(labels, torch.Generator().manual_seed(0))
    ids = run.generator.prepare(drawn)
    right, wrong = (run.generator.loss(ids, each).total for each in (labels, labels.roll(1)))
    assert right < wrong - 0.05
