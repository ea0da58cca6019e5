"""The promise that tokenizers train without codebook collapse, kept against the way they collapse.

The same short training twice, from the recipe to the log: with codes that start as N(0, 1) and are
left alone it collapses at the coarse scales, and the run says so; with the defaults it does not.
"""

import json

import pytest

from sandbox.testing import sandbox_project

RECIPE = """
seed: 0
device: cpu
dataset: {name: shapes, image_size: 15, num_images: 4000, radius: [0.6, 0.9], edge_px: 1.5}
tokenizer:
  name: var-vq
  autoencoder: {name: patch, patch: 3, ch: 32, code_dim: 16}
  codebook: {name: vq, vocab_size: 128}
  schedule: {name: sides, sides: [1, 2, 3, 5]}
tasks:
  - name: train-tokenizer
    num_images: 12_800
    learning_rate: 3e-3
    report_every: 6400
    validate_every: 6400
    num_validation_images: 1000
"""
COLLAPSING = ("init=normal", "update=gradient", "restart=false")


def trained(project, name, *settings):
    words = [word for s in settings for word in ("--set", f"tokenizer.codebook.{s}")]
    outcome = project.sandbox("run", "recipe.yaml", "--out", name, *words)
    assert outcome.status == 0, outcome.err
    result = json.loads((project.folder / name / "1-train-tokenizer" / "result.json").read_text())
    lines = (project.folder / name / "log.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines]
    said = [event["text"] for event in log if event["event"] == "message"]
    return result, said


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_normal_codes_collapse_and_the_defaults_do_not(tmp_path):
    project = sandbox_project(tmp_path, {"recipe.yaml": RECIPE})
    sick, complaints = trained(project, "sick", *COLLAPSING)
    well, silence = trained(project, "well")
    assert sick["codebook"][0]["perplexity"] < 12 < 24 < well["codebook"][0]["perplexity"]
    assert all(row["used"] < 64 for row in sick["codebook"])
    assert well["codebook"][-1]["used"] > 115
    assert well["psnr"] > sick["psnr"] + 1
    assert any("collapsed" in text and "codebook.init: data" in text for text in complaints)
    assert not any("collapsed" in text for text in silence)
