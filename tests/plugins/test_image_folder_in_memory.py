"""What is kept in memory is what would have been decoded."""

import numpy as np
import pytest
import torch
from PIL import Image

from sandbox_plugins.datasets import ImageFolder


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(6):
        for split in ("train", "val"):
            path = tmp_path / split / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    return tmp_path


def build(root, **settings):
    return ImageFolder(ImageFolder.Params(root=root, image_size=16, flip=True, **settings))


@pytest.mark.parametrize("augment", ["random-crop", "center-crop"])
def test_batches_are_those_of_the_files(root, augment):
    held, read = build(root, in_memory=True, augment=augment), build(root, augment=augment)
    there = held.to(torch.device("cpu"))
    indices = torch.tensor([5, 0, 0, 3, 1])
    for split in ("train", "validation"):
        wanted = read.batch(split, indices, torch.Generator().manual_seed(3))
        for dataset in (held, there):
            found = dataset.batch(split, indices, torch.Generator().manual_seed(3))
            assert torch.equal(found.images, wanted.images)
            assert torch.equal(found.labels, wanted.labels)


def test_files_are_read_once_and_only_where_asked(root):
    held, read = build(root, in_memory=True), build(root)
    assert read.to(torch.device("cpu")) is read
    held.to(torch.device("cpu"))
    for path in root.rglob("*.png"):
        path.unlink()
    assert held.batch("train", torch.arange(6), torch.Generator()).images.std() > 0


def test_of_long_images_the_middle_is_kept(tmp_path):
    for split in ("train", "val"):
        pixels = np.zeros((18, 90, 3), dtype=np.uint8)
        pixels[:, 36:54] = 255
        (tmp_path / split).mkdir()
        Image.fromarray(pixels).save(tmp_path / split / "long.png")
    held = build(tmp_path, in_memory=True)
    images = held.batch("train", torch.zeros(8, dtype=torch.long), torch.Generator()).images
    assert images.mean() > 0.95
