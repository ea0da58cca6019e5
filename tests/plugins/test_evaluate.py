"""What the task `evaluate` scores besides a run's own samples, and what it refuses."""

import json

import numpy as np
import pytest
from PIL import Image

from sandbox.testing import sandbox_project

RECIPE = """\
    device: cpu
    dataset: {name: shapes, image_size: 8, num_images: 8, num_validation: 8, num_classes: 2}
    features: {name: random, width: 4}
    tasks: [{name: evaluate, images: IMAGES, metrics: [fid]}]
    """


@pytest.fixture
def project(tmp_path):
    return sandbox_project(tmp_path, {"of.yaml": RECIPE.replace("IMAGES", "pictures")})


def picture(project, name, size=(8, 8)):
    path = project.folder / "pictures" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)
    return path


def scored(project, *words):
    outcome = project.sandbox("run", "of.yaml", *words)
    assert outcome.status == 0, outcome.err
    result = json.loads((project.folder / "runs/of/1-evaluate/result.json").read_text())
    return result["provenance"]["scored images"]


def refused(project, *words):
    outcome = project.sandbox("run", "of.yaml", *words)
    assert outcome.status == 2
    (line,) = outcome.err.splitlines()
    return line


def test_the_pictures_of_a_folder_and_of_its_class_folders_are_scored(project):
    for name in ("a.png", "cat/b.png", "dog/c.jpg"):
        picture(project, name)
    assert scored(project) == 3


def test_the_samples_of_another_run_are_scored(project):
    (project.folder / "other").mkdir()
    np.save(project.folder / "other" / "samples.npy", np.zeros((5, 3, 8, 8), np.uint8))
    np.save(project.folder / "other" / "samples-labels.npy", np.zeros(5, np.int64))
    assert scored(project, "--set", "tasks.0.images=other") == 5


def test_a_picture_that_cannot_be_read_is_named(project):
    picture(project, "a.png")
    cut = picture(project, "b.png")
    cut.write_bytes(cut.read_bytes()[:50])
    assert "pictures/b.png cannot be read as an image" in refused(project)


def test_pictures_of_two_sizes_are_refused_by_name(project):
    picture(project, "a.png")
    picture(project, "b.png", size=(9, 8))
    assert "a.png has (8, 8) px and b.png (8, 9)" in refused(project)


def test_a_recipe_without_a_data_set_is_refused(project):
    picture(project, "a.png")
    told = refused(project, "--set", "dataset=null", "--set", "num_classes=2")
    assert "needs a dataset: add `dataset:` to the recipe" in told


def result(project):
    return json.loads((project.folder / "runs/of/1-evaluate/result.json").read_text())


def test_a_split_of_the_data_set_is_scored_as_the_floor_of_a_score(project):
    assert scored(project, "--set", "tasks.0.images=train") == 8
    provenance = result(project)["provenance"]
    assert provenance["images"] == "train split of shapes"
    assert provenance["reference"] == "validation split of shapes"
    assert provenance["sampler"] is None
    assert result(project)["scores"]["fid[random-conv]"] > 0


def test_the_reference_is_not_scored_against_itself(project):
    told = refused(project, "--set", "tasks.0.images=validation")
    assert "images: validation is the reference itself" in told
    assert scored(project, "--set", "tasks.0.images=validation", "--set", "tasks.0.reference=train")


@pytest.mark.parametrize(("apart", "expected"), [((), (4, 4)), ((6,), (4, 6))])
def test_both_sides_are_limited_together_or_apart(project, apart, expected):
    words = [f"tasks.0.num_reference={number}" for number in apart]
    words = ["tasks.0.images=train", "tasks.0.num_images=4", *words]
    scored(project, *(each for word in words for each in ("--set", word)))
    provenance = result(project)["provenance"]
    assert (provenance["scored images"], provenance["reference images"]) == expected


def test_reconstructions_have_no_reference_of_another_size(project):
    words = ["tasks.0.images=reconstructions", "tasks.0.num_reference=4"]
    told = refused(project, *(each for word in words for each in ("--set", word)))
    assert "one reconstruction an image of the reference: set num_images alone" in told


def test_samples_of_another_run_are_told_with_their_own_sampler(project):
    (project.folder / "other").mkdir()
    np.save(project.folder / "other" / "samples.npy", np.zeros((5, 3, 8, 8), np.uint8))
    np.save(project.folder / "other" / "samples-labels.npy", np.zeros(5, np.int64))
    facts = {"sampler": {"name": "greedy"}, "precision": "bfloat16", "seed": 7}
    (project.folder / "other" / "samples.json").write_text(json.dumps(facts))
    scored(project, "--set", "tasks.0.images=other")
    provenance = result(project)["provenance"]
    assert provenance["sampler"] == {"name": "greedy"}
    assert (provenance["sampled in"], provenance["seed"]) == ("bfloat16", 7)
