"""Tasks that draw: how `sample` measures and obeys its settings, and what `tune-sampler` finds."""

import json
from textwrap import dedent

import numpy as np
import pytest
import torch

import sandbox
from sandbox.testing import sandbox_project
from sandbox_plugins.tasks.drawing import adjusted, in_turn
from sandbox_plugins.tasks.settings import autocast, precision_on
from sandbox_plugins.tasks.tune_sampler import TuneSampler

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = """\
    device: cpu
    dataset: {name: shapes, image_size: 8, num_images: 8, num_validation: 12, num_classes: 2}
    tokenizer:
      name: var-vq
      autoencoder: {name: patch, patch: 4, ch: 8, code_dim: 4}
      codebook: {name: vq, vocab_size: 16}
      schedule: {name: sides, sides: [1, 2]}
    generator:
      name: autoregressive
      backbone: {name: var, depth: 1, width: 16, num_heads: 2}
    features: {name: random, width: 4}
    tasks:
"""
TUNE = "{name: tune-sampler, num_images: 12, batch_size: 5, untrained: true, grid: GRID}"
SAMPLE = "{name: sample, num_images: 6, strip_images: 2, untrained: true, SETTINGS}"


def tasks(*lines):
    return dedent(RECIPE) + "".join(f"  - {line}\n" for line in lines)


@pytest.fixture
def start(tmp_path):
    """Run a recipe of these tasks: the folder, or the one line that refuses."""

    def run(*lines, out="runs/of"):
        project = sandbox_project(tmp_path, {"of.yaml": tasks(*lines)})
        outcome = project.sandbox("run", "of.yaml", "--out", out)
        if outcome.status == 0:
            return tmp_path / out
        (line,) = outcome.err.splitlines()
        return line

    return run


def result(folder, label):
    return json.loads((folder / label / "result.json").read_text())


def test_samples_are_drawn_in_the_precision_that_is_asked_for(start):
    exact = start(SAMPLE.replace("SETTINGS", ""), out="runs/exact")
    half = start(SAMPLE.replace("SETTINGS", "precision: bfloat16"), out="runs/half")
    assert result(exact, "1-sample")["precision"] == "float32"
    assert result(half, "1-sample")["precision"] == "bfloat16"
    same = start(SAMPLE.replace("SETTINGS", "precision: float32"), out="runs/same")
    assert np.array_equal(np.load(exact / "samples.npy"), np.load(same / "samples.npy"))
    told = json.loads((half / "samples.json").read_text())
    assert told["precision"] == "bfloat16" and told["sampler"]["name"] == "top-k-top-p"


def test_autocast_is_on_where_bfloat16_is_asked_for_and_auto_depends_on_the_device():
    cpu = torch.device("cpu")
    assert precision_on(torch.device("cuda"), "auto") == "bfloat16"
    assert precision_on(cpu, "auto") == "float32"
    for precision, dtype in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        with autocast(cpu, precision):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_the_time_of_an_image_and_images_in_a_second_are_one_measurement(start):
    found = result(start(SAMPLE.replace("SETTINGS", "")), "1-sample")
    assert found["seconds_per_image"] > 0
    assert found["images_per_second"] == pytest.approx(1 / found["seconds_per_image"])


def test_classes_are_drawn_in_turn():
    assert in_turn([3, 1], 5).tolist() == [3, 1, 3, 1, 3]
    assert in_turn(range(3), 4).tolist() == [0, 1, 2, 0]


def test_every_combination_is_scored_and_the_best_is_used_by_later_samples(start):
    tune = TUNE.replace("GRID", "{top_k: [0, 9], top_p: [0.5, 1.0]}")
    folder = start(tune, SAMPLE.replace("SETTINGS", "sampler: best"))
    found = result(folder, "1-tune-sampler")
    rows = found["settings"]
    assert [(row["top_k"], row["top_p"]) for row in rows] == [(0, 0.5), (0, 1), (9, 0.5), (9, 1)]
    assert len({row["fid[random-conv]"] for row in rows}) == 4
    best = min(rows, key=lambda row: row["fid[random-conv]"])
    assert found["best"] == best and found["decided by"] == "fid[random-conv]"
    assert not any(name.startswith("class_accuracy") for name in best)  # those logits are noise
    kept = json.loads((folder / "1-tune-sampler" / "sampler.json").read_text())
    assert kept["setting"] == {"top_k": best["top_k"], "top_p": best["top_p"]}
    used = json.loads((folder / "samples.json").read_text())["sampler"]
    assert kept["setting"].items() <= used.items() and used["guidance"] == 1.5
    assert result(folder, "2-sample")["sampler"] == used


def test_a_sweep_leaves_the_recipes_own_sampler_in_place(start):
    sample = SAMPLE.replace("SETTINGS", "")
    after = start(TUNE.replace("GRID", "{temperature: [0.1]}"), sample, out="runs/after")
    alone = start(TUNE.replace("GRID", "{temperature: [3.0]}"), sample, out="runs/other")
    assert np.array_equal(np.load(after / "samples.npy"), np.load(alone / "samples.npy"))


def test_a_score_of_which_more_is_better_is_maximised(start):
    tune = TUNE.replace("GRID", "{temperature: [0.2, 1.0, 5.0]}, score: class-accuracy")
    found = result(start(tune), "1-tune-sampler")
    accuracies = [row["class_accuracy[random-conv]"] for row in found["settings"]]
    assert found["best"]["class_accuracy[random-conv]"] == max(accuracies)


def test_a_sweep_that_was_stopped_goes_on_with_the_next_setting(start, monkeypatch):
    grid = TUNE.replace("GRID", "{temperature: [0.5, 1.0, 2.0]}")
    whole = result(start(grid, out="runs/whole"), "1-tune-sampler")
    scored, calls = TuneSampler._scored, []

    def stopping(self, run, reference, number, num_settings):
        calls.append(number)
        if calls == [0, 1]:
            raise sandbox.RunError("the power went")
        return scored(self, run, reference, number, num_settings)

    monkeypatch.setattr(TuneSampler, "_scored", stopping)
    assert "the power went" in start(grid)
    assert result(start(grid), "1-tune-sampler")["settings"] == whole["settings"]
    assert calls == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("grid", "told"),
    [
        ("{guidence: [1]}", "grid: sampler 'top-k-top-p': guidence: unknown key (did you mean"),
        ("{top_p: [0.5, 2]}", "top_p: Input should be less than or equal to 1"),
        ("{}", "grid"),
        ("{top_p: []}", "grid.top_p"),
        ("{top_p: [1]}, score: psnr", "score: psnr compares image by image"),
    ],
)
def test_a_grid_that_cannot_be_tried_is_refused_in_one_line(start, grid, told):
    assert told in start(TUNE.replace("GRID", grid))


def test_the_best_sampler_needs_a_sweep_before(start):
    told = start(SAMPLE.replace("SETTINGS", "sampler: best"))
    assert "1-sample: sampler: best needs a task tune-sampler before it in this run" in told


def test_settings_of_a_sampler_are_replaced_and_checked(registry):
    greedy = registry.find(sandbox.Sampler, "greedy")
    part = sandbox.Part("greedy", greedy, greedy.Params(guidance_shape="cosine"))
    made = adjusted(part, {"guidance": 3})
    assert made.to_dict() == {"name": "greedy", "guidance": 3.0, "guidance_shape": "cosine"}
    with pytest.raises(ValueError, match=r"^sampler 'greedy': guidance: [^\n]*$"):
        adjusted(part, {"guidance": -1})
