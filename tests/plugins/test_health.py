"""Health of hand-made tokenizers, whose numbers are known, and what is said about sick ones."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import sandbox
from sandbox import Layout
from sandbox.testing import GreyTokenizer
from sandbox_plugins.tasks.health import NUM_PARTIAL_IMAGES, Health

LAYOUT = Layout.pyramid(1, 2, 4)
HEALTHY = {
    "name": "var-vq",
    "beta": 0.25,
    "phi": "partial",
    "estimator": "straight-through",
    "prefix_dropout": 0.0,
    "codebook": {
        "name": "vq",
        "init": "data",
        "restart": True,
        "restart_until": 0.9,
        "lookup": "euclidean",
    },
}


class Images:
    """Held-out images of random greys that a tokenizer of few shades cannot hit."""

    num_classes, class_names = 1, ("grey",)

    def __init__(self, tokenizer, count, seed=0):
        rng = torch.Generator().manual_seed(seed)
        self.image_size = tokenizer.image_size
        self.images = torch.rand(count, 3, *self.image_size, generator=rng) * 2 - 1

    def size(self, split):
        return len(self.images)

    def batch(self, split, indices, rng):
        return sandbox.Batch(self.images[indices], torch.zeros(len(indices), dtype=torch.long))


class Told(GreyTokenizer):
    """Gives the ids it is told, whatever the images; `energy` is its residual energy."""

    def __init__(self, layout, ids, vocab_size, energy=None):
        super().__init__(layout, vocab_size)
        self.ids, self.at = ids, 0
        if energy is not None:
            self.residual_energy = lambda images: torch.tensor(energy)

    def encode(self, images):
        begin, self.at = self.at, (self.at + len(images)) % len(self.ids)
        return self.ids[begin : begin + len(images)]


def run_of(tokenizer, count, settings=HEALTHY):
    said = []
    return SimpleNamespace(
        dataset=Images(tokenizer, count),
        device=torch.device("cpu"),
        label="1-train-tokenizer",
        settings=lambda slot: settings,
        say=said.append,
        said=said,
    )


def health_of(tokenizer, count=40, batch_size=16, settings=HEALTHY):
    return Health(run_of(tokenizer, count, settings), tokenizer, count, batch_size)


def told(vocab_size=256, count=512, codes=None, seed=0, **more):
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(codes or vocab_size, (count, LAYOUT.seq_len), generator=rng)
    return Told(LAYOUT, ids, vocab_size, **more)


def test_scores_are_what_the_images_and_their_reconstructions_give():
    tokenizer = GreyTokenizer(LAYOUT)
    health = health_of(tokenizer)
    scores = health.measure()
    images = health.run.dataset.images
    ids = tokenizer.encode(images)
    errors = (tokenizer.decode(ids) - images).square().flatten(1).mean(1).double()
    assert scores["l2"] == pytest.approx(errors.mean().item())
    assert scores["psnr"] == pytest.approx((-10 * torch.log10(errors / 4)).mean().item())
    canvas = tokenizer.canvas(len(ids))
    for number, span in enumerate(LAYOUT.spans):
        canvas = tokenizer.paint(canvas, tokenizer.embed(ids[:, span]), number)
        errors = (tokenizer.render(canvas) - images).square().flatten(1).mean(1).double()
        upto = (-10 * torch.log10(errors / 4)).mean().item()
        assert scores[f"psnr_upto/scale{number + 1}"] == pytest.approx(upto)
        share = torch.bincount(ids[:, span].flatten(), minlength=8).double()
        entropy = torch.distributions.Categorical(share).entropy().item()
        assert scores[f"entropy/scale{number + 1}"] == pytest.approx(entropy)
        assert scores[f"perplexity/scale{number + 1}"] == pytest.approx(math.exp(entropy))
        assert scores[f"used/scale{number + 1}"] == (share > 0).sum()
    assert scores["psnr_upto/scale3"] == pytest.approx(scores["psnr"])
    assert scores["dead_codes"] == 8 - len(ids.unique())
    assert scores["feature_std"] == pytest.approx(canvas.std(correction=0).item(), rel=1e-5)
    assert not [name for name in scores if "residual" in name or "drift" in name]
    assert [row["scale"] for row in health.rows] == [1, 2, 3]
    assert set(health.rows[0]) == {
        "scale", "tokens", "used", "usage", "perplexity", "entropy", "psnr_upto",
    }  # fmt: skip


def test_scores_do_not_depend_on_how_the_images_are_cut(monkeypatch):
    monkeypatch.setattr("sandbox_plugins.tasks.health.NUM_PARTIAL_IMAGES", 10)
    tokenizer = GreyTokenizer(LAYOUT)
    whole, cut = (health_of(tokenizer, batch_size=size).measure() for size in (40, 7))
    assert whole == pytest.approx(cut)
    assert whole["psnr_upto/scale3"] != pytest.approx(whole["psnr"])  # of 10 images, not of 40


def test_residual_energy_is_that_of_the_tokenizer_and_counts_images_not_batches():
    tokenizer = told(energy=[0.5, 0.25, 0.125])
    tokenizer.residual_energy = lambda images: torch.tensor([1.0, 0.5, 0.25]) * len(images) / 48
    scores = health_of(tokenizer, count=64, batch_size=48).measure()
    expected = (48 * 48 / 48 + 16 * 16 / 48) / 64
    assert scores["residual/scale1"] == pytest.approx(expected)
    assert scores["residual/scale3"] == pytest.approx(expected / 4)


def test_drift_is_the_share_of_ids_and_the_size_of_codes_that_changed():
    tokenizer = told(count=40)
    health = health_of(tokenizer)
    assert "ids_changed/scale1" not in health.measure(0.2)
    moved = tokenizer.ids.clone()
    moved[:10, LAYOUT.spans[0]] = (moved[:10, LAYOUT.spans[0]] + 1) % 256
    moved[:, LAYOUT.spans[2].start] = (moved[:, LAYOUT.spans[2].start] + 1) % 256
    tokenizer.ids = moved
    tokenizer.shades = tokenizer.shades * 2
    scores = health.measure(0.4)
    assert scores["ids_changed/scale1"] == 0.25
    assert scores["ids_changed/scale2"] == 0
    assert scores["ids_changed/scale3"] == pytest.approx(1 / 16)
    assert scores["feature_drift"] == pytest.approx(1.0, abs=0.02)
    assert health.rows[2]["ids_changed"] == 0.0625
    again = health.measure(0.5)
    assert again["ids_changed/scale1"] == again["feature_drift"] == 0


def test_a_resumed_run_reports_the_same_and_repeats_no_warning(tmp_path):
    def tokenizers():
        return [told(codes=2, seed=seed) for seed in (1, 2)]

    first, second = tokenizers()
    whole = health_of(first, count=512)
    whole.measure(0.5)
    checkpoints = sandbox.Checkpoints(tmp_path)
    checkpoints.save(64, {"health": whole.state_dict()})
    whole.tokenizer = second
    expected = whole.measure(0.6)

    resumed = health_of(tokenizers()[1], count=512)
    resumed.load_state_dict(checkpoints.newest()["health"])
    assert len(resumed.rows) == 3
    assert resumed.measure(0.6) == expected
    assert "ids_changed/scale1" in expected and resumed.rows == whole.rows
    assert len(whole.run.said) == 2 and not resumed.run.said  # collapsed, and so hardly varies
    assert checkpoints.newest()["health"]["ids"].dtype == torch.int32


def test_another_validation_set_than_before_is_refused():
    health = health_of(told(count=40))
    health.measure()
    health.num_images = 39
    with pytest.raises(sandbox.SandboxError, match=r"of 40 images .* of 39 .*--fresh"):
        health.measure()


def test_no_validation_images_are_refused_in_one_line():
    with pytest.raises(sandbox.SandboxError, match="no validation images"):
        health_of(told(count=40), count=0).measure()


def test_raster_has_one_row_and_long_layouts_are_not_painted():
    short = health_of(GreyTokenizer(Layout.raster(4, 4)))
    scores = short.measure()
    (row,) = short.rows
    assert row["tokens"] == 16 and row["psnr_upto"] == pytest.approx(scores["psnr"], abs=0.01)
    tokenizer = GreyTokenizer(Layout.raster(6, 6))
    long = health_of(tokenizer)
    scores = long.measure()
    assert "psnr_upto/scale1" not in scores and len(long.rows) == 1
    codes = tokenizer.embed(tokenizer.encode(long.run.dataset.images))
    assert scores["feature_std"] == pytest.approx(codes.std(correction=0).item(), rel=1e-5)


def test_a_healthy_tokenizer_is_left_in_peace():
    health = health_of(told(energy=[0.5, 0.3, 0.1]), count=512)
    for progress in (0.05, 0.5, 0.8, 0.9, 1.0):
        health.measure(progress)
    assert health.run.said == []


def test_a_collapsed_tokenizer_is_named_once_with_the_remedy_that_its_settings_lack():
    sick = {**HEALTHY, "codebook": {"name": "vq", "init": "normal", "restart": False}}
    health = health_of(told(codes=4), count=512, settings=sick)
    health.measure(0.05)
    assert health.run.said == []  # too early to tell
    health.measure(0.5)
    health.measure(1.0)
    (said,) = health.run.said
    assert said.startswith("scale 1 has collapsed: 4 of 256 codes carry it (perplexity 4.0)")
    assert "so have scales 2 and 3" in said
    assert said.endswith(
        "start codes on data (codebook.init: data) and move dead ones (codebook.restart: true)"
    )


def test_the_history_of_errors_is_kept_from_measurement_to_measurement():
    tokenizer = told(energy=[0.5, 0.3, 0.1])
    health = health_of(tokenizer, count=512)
    for last in (0.1, 0.12, 0.14, 0.16, 0.18):
        tokenizer.residual_energy = lambda images, last=last: torch.tensor([0.5, 0.3, last])
        health.measure(0.5)
    (said,) = health.run.said
    assert "no scale explains has risen for 3 measurements, from 0.1 to 0.16" in said


@pytest.mark.gpu
def test_measuring_does_not_wait_for_the_device_batch_by_batch(monkeypatch):
    class OnDevice(GreyTokenizer):
        def __init__(self):
            super().__init__(LAYOUT)
            self.shades = self.shades.cuda()

        def canvas(self, batch_size):
            return torch.zeros(batch_size, 1, *LAYOUT.size, device="cuda")

        def paint(self, canvas, codes, step):
            place = LAYOUT.steps[step]
            maps = codes.transpose(1, 2).reshape(len(codes), 1, place.height, place.width)
            return canvas + F.interpolate(maps, LAYOUT.size, mode="nearest")

        def context(self, canvas, step):
            place = LAYOUT.steps[step]
            maps = F.interpolate(canvas, (place.height, place.width), mode="area")
            return maps.flatten(2).transpose(1, 2)

    tokenizer = OnDevice()
    health = health_of(tokenizer)
    health.run.device = torch.device("cuda")
    health.run.dataset.images = health.run.dataset.images.cuda()
    monkeypatch.setattr(
        health.run.dataset,
        "batch",
        lambda split, indices, rng: sandbox.Batch(
            health.run.dataset.images[int(indices[0]) : int(indices[-1]) + 1],
            torch.zeros(len(indices), dtype=torch.long),
        ),
    )
    expected = health.measure()
    read = torch.Tensor.cpu

    def read_at_the_end(tensor, *words, **more):
        torch.cuda.set_sync_debug_mode("default")
        return read(tensor, *words, **more)

    monkeypatch.setattr(torch.Tensor, "cpu", read_at_the_end)
    monkeypatch.setattr(health, "_ids", None)
    monkeypatch.setattr(health, "_magnitude", None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert health.measure() == pytest.approx(expected)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert NUM_PARTIAL_IMAGES >= 40
