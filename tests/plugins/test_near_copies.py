"""Near copies: a sample that is a training image is found, mirrored or not, and others are not."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import sandbox
from sandbox.testing import sandbox_project
from sandbox_plugins.tasks.near_copies import Nearest
from sandbox_plugins.tasks.npz import to_uint8

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = "{name: shapes, image_size: 16, num_images: 40, num_validation: 20, num_classes: 3}"
RECIPE = f"""\
device: cpu
dataset: {SHAPES}
features: {{name: random, width: 8}}
tasks: [{{name: near-copies, images: made, quantile: 0.1, batch_size: 7, columns: 3}}]
"""


@pytest.fixture
def project(tmp_path):
    return sandbox_project(tmp_path, {"of.yaml": RECIPE})


@pytest.fixture
def shapes(registry):
    cls = registry.find(sandbox.Dataset, "shapes")
    return cls(cls.Params(image_size=(16, 16), num_images=40, num_validation=20, num_classes=3))


def training_images(shapes):
    return torch.cat([batch.images for batch in sandbox.sweep(shapes, "train", 10)])


def keep(project, images):
    folder = project.folder / "made"
    folder.mkdir()
    np.save(folder / "samples.npy", to_uint8(images).numpy())
    np.save(folder / "samples-labels.npy", np.zeros(len(images), np.int64))


def run(project, *words, out="runs/of"):
    words = ["--out", out, *(word for each in words for word in ("--set", each))]
    outcome = project.sandbox("run", "of.yaml", *words)
    if outcome.status:
        (line,) = outcome.err.splitlines()
        return line
    return json.loads((project.folder / out / "1-near-copies/result.json").read_text())


def share(found, space):
    return found["scores"][f"near_copy_share[{space}]"]


def test_copies_are_found_and_shown_over_what_they_copy(project, shapes):
    images = training_images(shapes)[[3, 39]]
    noise = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    keep(project, torch.cat([noise, images]))
    found = run(project)
    assert found["num_images"] == 8
    for space in ("random-conv", "pixels"):
        assert share(found, space) == pytest.approx(2 / 8)
    features, pixels = found["distances"]
    assert (features["space"], pixels["space"]) == ("features", "pixels")
    assert 0 < pixels["near"] <= pixels["validation_median"] < pixels["samples_median"] < 1
    with Image.open(project.folder / "runs/of/1-near-copies/nearest-in-pixels.png") as picture:
        shown = np.asarray(picture)
    side = 64  # small images are enlarged, with 2 px between them
    cells = [[shown[2 + r * (side + 2) :][:side, 2 + c * (side + 2) :][:, :side] for c in range(3)]
             for r in range(4)]  # fmt: skip
    for column, same in enumerate((True, True, False)):
        difference = np.abs(cells[0][column].astype(int) - cells[1][column])
        assert (difference.max() <= 1) == same


def test_mirrored_copies_count_where_mirrored_images_do(project, shapes):
    keep(project, training_images(shapes)[:10].flip(-1))
    assert share(run(project), "pixels") == 1
    assert share(run(project, "tasks.0.mirror=false", out="runs/other"), "pixels") < 1


def test_held_out_images_set_the_yardstick_for_themselves(project, shapes):
    held_out = torch.cat([b.images for b in sandbox.sweep(shapes, "validation", 10)])
    keep(project, held_out)
    found = run(project)
    assert share(found, "pixels") == pytest.approx(0.1, abs=0.051)
    pixels = found["distances"][1]
    assert pixels["samples_median"] == pytest.approx(pixels["validation_median"], abs=0.01)


def test_what_cannot_be_compared_is_refused_in_one_line(project, shapes):
    assert "images: made: no such folder or .npz" in run(project)
    keep(project, torch.zeros(3, 3, 8, 8))
    assert "the images have 8 x 8 px, those of the data set 16 x 16" in run(project)
    told = run(project, "tasks.0.quantile=0.01")
    assert "quantile: 0.01 of 20 held-out images is less than one of them" in told
    assert "no samples yet" in run(project, "tasks.0.images=samples")


def test_the_nearest_row_is_kept_over_batches():
    rng = torch.Generator().manual_seed(0)
    queries, rows = torch.randn(5, 4, generator=rng), torch.randn(12, 4, generator=rng)
    images = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1).expand(12, 3, 2, 2)
    nearest = Nearest(queries, torch.zeros(3, 3, 2, 2, dtype=torch.uint8))
    for part in torch.arange(12).split(5):
        nearest.compare(rows[part], images[part])
    least, where = torch.cdist(queries.double(), rows.double()).min(dim=1)
    torch.testing.assert_close(nearest.distances.double(), least, rtol=1e-5, atol=1e-6)
    assert nearest.copies[:, 0, 0, 0].tolist() == where[:3].tolist()
