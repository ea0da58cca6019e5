"""K-means against clusters that are known, and what the task `inspect-tokenizer` reports."""

import json
import math

import pytest
import torch

from sandbox.testing import sandbox_project
from sandbox_plugins.tasks.kmeans import kmeans_perplexity

RECIPE = """\
    device: cpu
    dataset: {name: shapes, image_size: 6, num_images: 64, num_validation: 48, num_classes: 2}
    tokenizer:
      name: var-vq
      autoencoder: {name: patch, patch: 2, ch: 8, code_dim: 4}
      codebook: {name: vq, vocab_size: 16}
      schedule: {name: sides, sides: [1, 2, 3]}
    tasks:
      - {name: train-tokenizer, num_images: 64, batch_size: 16}
      - {name: inspect-tokenizer, num_images: 40, batch_size: 16, precisions: true}
    """
RASTER = {
    "tokenizer.name": "raster-vq",
    "tokenizer.schedule": "{name: raster, height: 3, width: 3}",
}


def clusters(sizes, at=0.0, spread=0.01, seed=0):
    """`sizes[i]` vectors around the i-th of well-separated points."""
    rng = torch.Generator().manual_seed(seed)
    centers = torch.nn.functional.one_hot(torch.arange(len(sizes)), len(sizes)).float() * 10 + at
    vectors = centers.repeat_interleave(torch.tensor(sizes), 0)
    return vectors + spread * torch.randn(vectors.shape, generator=rng)


def entropy_exp(sizes):
    shares = [size / sum(sizes) for size in sizes]
    return math.exp(-sum(share * math.log(share) for share in shares))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("cosine", [False, True])
def test_kmeans_finds_clusters_that_stand_apart(seed, cosine):
    sizes = [10, 20, 30, 40, 100]
    alone, shared = kmeans_perplexity([clusters(sizes)], 5, cosine=cosine, seed=seed)
    assert alone == pytest.approx([entropy_exp(sizes)]) and shared == pytest.approx(alone)


def test_with_as_many_codes_as_vectors_each_has_its_own():
    vectors = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    alone, _ = kmeans_perplexity([vectors, torch.ones(9, 4)], 64)
    assert alone == pytest.approx([30.0, 1.0])


def test_one_codebook_for_all_scales_counts_scales_not_vectors():
    """A scale of few vectors far apart gets codes beside one of many vectors close together."""
    coarse = clusters([5, 5, 5, 5], at=100.0)
    fine = 0.1 * torch.randn(4000, 4, generator=torch.Generator().manual_seed(1))
    alone, shared = kmeans_perplexity([coarse, fine], 8)
    assert alone[0] > 4 and alone[1] > 7
    assert shared[0] == pytest.approx(4.0)
    assert 2 < shared[1] <= 4.0


def test_kmeans_is_decided_by_the_seed_and_uses_at_most_so_many_vectors():
    vectors = [torch.randn(500, 3, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    first, again, other = (kmeans_perplexity(vectors, 20, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    few, _ = kmeans_perplexity(vectors, 20, max_vectors=10)
    assert few == pytest.approx([10.0, 10.0])


def test_empty_codes_move_to_vectors_that_no_code_is_near():
    """Most vectors are the same point, where first centers would otherwise pile up."""
    vectors = torch.cat([torch.zeros(1000, 2), clusters([3, 3])])
    alone, _ = kmeans_perplexity([vectors], 3)
    assert alone == pytest.approx([entropy_exp([1000, 3, 3])])


def test_a_scale_without_vectors_is_refused():
    with pytest.raises(ValueError, match="at least one vector of every scale"):
        kmeans_perplexity([torch.zeros(2, 3), torch.zeros(0, 3)], 4)


@pytest.mark.gpu
def test_kmeans_finds_the_same_on_a_gpu():
    vectors = [clusters([10, 20, 30, 40, 100]), clusters([7, 7, 7, 7, 7], at=3.0)]
    there = kmeans_perplexity([each.cuda() for each in vectors], 5)
    assert there[0] == pytest.approx(kmeans_perplexity(vectors, 5)[0])


def inspected(tmp_path, sets=()):
    project = sandbox_project(tmp_path, {"of.yaml": RECIPE})
    words = [word for key, value in dict(sets).items() for word in ("--set", f"{key}={value}")]
    outcome = project.sandbox("run", "of.yaml", *words)
    assert outcome.status == 0, outcome.err
    folder = tmp_path / "runs/of/2-inspect-tokenizer"
    return folder, json.loads((folder / "result.json").read_text())


def test_inspection_of_a_trained_tokenizer(tmp_path, one_thread):
    folder, result = inspected(tmp_path)
    assert [row["scale"] for row in result["codebook"]] == [1, 2, 3]
    for row in result["codebook"]:
        for ratio, yardstick in (
            ("of_kmeans", "kmeans_shared_perplexity"),
            ("of_kmeans_alone", "kmeans_perplexity"),
        ):
            assert row[ratio] == pytest.approx(row["perplexity"] / row[yardstick], abs=2e-3)
        assert 1 <= row["kmeans_shared_perplexity"] <= 16 and row["kmeans_perplexity"] > 4
        assert row["residual"] > 0 and "psnr_upto" in row and "ids_changed" not in row
    assert 0 <= result["dead_codes"] < 16
    assert set(result["precisions"]["psnr"]) == {"float32", "bfloat16"}  # a CPU has no TF32
    assert result["precisions"]["psnr"]["float32"] == pytest.approx(result["psnr"], abs=0.01)
    changed = result["precisions"]["ids_changed"]
    assert [set(row) for row in changed] == [{"scale", "bfloat16"}] * 3
    assert 0 < max(row["bfloat16"] for row in changed) < 0.5
    assert {path.name for path in folder.glob("*.png")} == {"reconstructions.png", "scales.png"}
    log = (folder.parent / "log.jsonl").read_text()
    assert '"validation/perplexity/scale3"' in log and "TF32 is left out" in log


def test_inspection_of_a_raster_tokenizer_has_one_row(tmp_path, one_thread):
    _, result = inspected(tmp_path, RASTER)
    (row,) = result["codebook"]
    assert row["tokens"] == 9
    assert row["kmeans_perplexity"] == pytest.approx(row["kmeans_shared_perplexity"], rel=0.1)


def test_what_cannot_be_inspected_is_refused_in_one_line(tmp_path):
    project = sandbox_project(tmp_path, {"of.yaml": RECIPE})
    outcome = project.sandbox("run", "of.yaml", "--set", "tasks=[{name: inspect-tokenizer}]")
    assert outcome.status == 2
    (line,) = outcome.err.splitlines()
    assert "no trained weights: run train-tokenizer" in line
