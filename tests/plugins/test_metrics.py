"""Every score against an independent computation, and what must not move it."""

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import torch
from hypothesis import given
from hypothesis import strategies as st

import sandbox
from sandbox_plugins import metrics


def evidence(features, *, logits=None, images=None, labels=None):
    b = len(features)
    return sandbox.Evidence(
        images=torch.zeros(b, 3, 8, 8) if images is None else images,
        features=features,
        logits=features if logits is None else logits,
        labels=torch.zeros(b, dtype=torch.long) if labels is None else labels,
    )


def draw(seed, n, d=6, shift=0.0, stretch=1.0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=rng) * stretch + shift


def score(cls, real, fake, batch_size=1000, **params):
    """Feed both sides batch by batch; a side that runs out is None from then on."""
    metric = cls(cls.Params(**params))
    for start in range(0, max(len(real), len(fake)), batch_size):
        sides = (rows[start : start + batch_size] for rows in (real, fake))
        metric.update(*(evidence(rows) if len(rows) else None for rows in sides))
    return dict(metric.compute())


def fid_by_scipy(real, fake):
    real, fake = real.double().numpy(), fake.double().numpy()
    product = np.cov(real, rowvar=False) @ np.cov(fake, rowvar=False)
    root = scipy.linalg.sqrtm(product).real
    traces = np.trace(np.cov(real, rowvar=False)) + np.trace(np.cov(fake, rowvar=False))
    return np.square(real.mean(0) - fake.mean(0)).sum() + traces - 2 * np.trace(root)


@given(seed=st.integers(0, 2**31), d=st.integers(2, 12), shift=st.floats(-3, 3))
def test_fid_is_what_scipy_says(seed, d, shift):
    real, fake = draw(seed, 50, d), draw(seed + 1, 40, d, shift=shift, stretch=2.0)
    expected = fid_by_scipy(real, fake)
    assert score(metrics.Fid, real, fake)["fid"] == pytest.approx(expected, rel=1e-6, abs=1e-8)


def test_fid_of_a_set_with_itself_is_zero_even_with_fewer_images_than_features():
    for count in (100, 10):
        rows = draw(0, count, 24)
        assert score(metrics.Fid, rows, rows)["fid"] == pytest.approx(0, abs=1e-5)


def test_fid_keeps_small_differences_beside_large_means_which_float32_would_lose():
    real, fake = draw(0, 200, 4) + 1000, draw(1, 200, 4, shift=0.1) + 1000
    assert score(metrics.Fid, real, fake)["fid"] == pytest.approx(
        fid_by_scipy(real, fake), rel=1e-6
    )


def test_rfid_is_the_fid_of_reconstructions_under_its_own_name():
    real, fake = draw(0, 30), draw(1, 30)
    assert score(metrics.Rfid, real, fake)["rfid"] == score(metrics.Fid, real, fake)["fid"]
    assert metrics.Rfid.paired and not metrics.Fid.paired


def kid_by_numpy(real, fake):
    real, fake = real.double().numpy(), fake.double().numpy()
    n, d = real.shape

    def kernel(x, y):
        return (x @ y.T / d + 1) ** 3

    within = sum(kernel(x, x).sum() - np.trace(kernel(x, x)) for x in (real, fake))
    return within / (n * (n - 1)) - 2 * kernel(real, fake).mean()


@given(seed=st.integers(0, 2**31), d=st.integers(1, 8), n=st.integers(2, 30))
def test_kid_over_whole_sets_is_what_numpy_says(seed, d, n):
    real, fake = draw(seed, n, d), draw(seed + 1, n, d, shift=0.5)
    result = score(metrics.Kid, real, fake, num_subsets=2, subset_size=n)
    assert result["kid"] == pytest.approx(kid_by_numpy(real, fake), rel=1e-9, abs=1e-12)
    assert result["kid_std"] == pytest.approx(0, abs=1e-9)


def test_kid_refuses_a_subset_larger_than_a_side_and_names_both_numbers():
    with pytest.raises(sandbox.SandboxError, match=r"kid: 7 fake images .*subset_size: 10"):
        score(metrics.Kid, draw(0, 20), draw(1, 7), subset_size=10)


def inception_score_by_numpy(parts):
    scores = []
    for part in parts:
        p = np.exp(part - part.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        scores.append(np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()))
    return np.mean(scores), np.std(scores)


@given(seed=st.integers(0, 2**31), n=st.integers(2, 30), classes=st.integers(2, 8))
def test_inception_score_of_one_split_is_what_numpy_says(seed, n, classes):
    logits = draw(seed, n, classes, stretch=3.0)
    mean, _ = inception_score_by_numpy([logits.double().numpy()])
    result = score(metrics.Inception, logits, logits, splits=1)
    assert result == {"inception_score": pytest.approx(mean, rel=1e-9)}


def test_inception_score_over_splits_is_what_numpy_says_of_the_same_splits():
    logits = draw(3, 43, 5, stretch=3.0)
    rng = torch.Generator().manual_seed(9)
    kept = logits[torch.randperm(43, generator=rng)[:40]]
    kept = kept[torch.randperm(40, generator=rng)].double().numpy()
    mean, std = inception_score_by_numpy(np.split(kept, 4))
    result = score(metrics.Inception, logits, logits, splits=4, seed=9)
    assert result["inception_score"] == pytest.approx(mean, rel=1e-9)
    assert result["inception_score_std"] == pytest.approx(std, rel=1e-9)


def test_inception_score_spans_one_to_the_number_of_classes():
    sure = torch.eye(5).repeat(4, 1) * 100
    assert score(metrics.Inception, sure, sure, splits=1)["inception_score"] == pytest.approx(5)
    with pytest.raises(sandbox.SandboxError, match="splits: 20"):
        score(metrics.Inception, sure, sure, splits=20)


def precision_recall_by_loops(real, fake, k):
    def share(points, centers):
        radii = [sorted(np.linalg.norm(c - o) for o in centers)[k] for c in centers]
        hits = [
            any(np.linalg.norm(p - c) <= r for c, r in zip(centers, radii, strict=True))
            for p in points
        ]
        return np.mean(hits)

    real, fake = real.double().numpy(), fake.double().numpy()
    return {"precision": share(fake, real), "recall": share(real, fake)}


@given(seed=st.integers(0, 2**31), d=st.integers(1, 5), k=st.integers(1, 4))
def test_precision_and_recall_are_what_loops_say(seed, d, k):
    real, fake = draw(seed, 14, d), draw(seed + 1, 11, d, shift=0.7)
    assert score(metrics.PrecisionRecall, real, fake, neighbours=k) == pytest.approx(
        precision_recall_by_loops(real, fake, k)
    )


def test_precision_and_recall_do_not_depend_on_how_the_distances_are_sliced(monkeypatch):
    real, fake = draw(0, 50), draw(1, 40, shift=0.5)
    whole = score(metrics.PrecisionRecall, real, fake)
    monkeypatch.setattr(metrics.manifolds, "DISTANCES_AT_ONCE", 130)
    assert score(metrics.PrecisionRecall, real, fake) == whole


def test_precision_and_recall_of_equal_disjoint_and_mode_dropping_sets():
    one, other = draw(0, 40), draw(1, 40, shift=100.0)
    both = torch.cat([one, other])
    assert score(metrics.PrecisionRecall, one, one) == {"precision": 1, "recall": 1}
    assert score(metrics.PrecisionRecall, one, other) == {"precision": 0, "recall": 0}
    assert score(metrics.PrecisionRecall, both, one) == {"precision": 1, "recall": 0.5}
    assert score(metrics.PrecisionRecall, one, both) == {"precision": 0.5, "recall": 1}


def test_precision_and_recall_need_more_images_than_neighbours():
    with pytest.raises(sandbox.SandboxError, match=r"3 real images .*neighbours: 3.*at least 4"):
        score(metrics.PrecisionRecall, draw(0, 3), draw(1, 9))


def paired_score(cls, real, fake, batch_size):
    metric = cls(cls.Params())
    for r, f in zip(real.split(batch_size), fake.split(batch_size), strict=True):
        metric.update(evidence(r, images=r), evidence(f, images=f))
    return metric.compute()


@given(seed=st.integers(0, 2**31), batch_size=st.integers(1, 5))
def test_psnr_is_the_mean_over_images_of_its_formula(seed, batch_size):
    rng = torch.Generator().manual_seed(seed)
    real, fake = torch.rand(5, 3, 8, 9, generator=rng), torch.rand(5, 3, 8, 9, generator=rng)
    errors = np.square(real.double().numpy() - fake.double().numpy()).mean(axis=(1, 2, 3))
    expected = {"psnr": pytest.approx(np.mean(10 * np.log10(1 / errors)), rel=1e-6)}
    assert paired_score(metrics.Psnr, real, fake, batch_size) == expected


def ssim_by_scipy(real, fake):
    """One image; the 11 x 11 Gaussian window of Wang et al. with mirrored edges."""

    def blur(x):
        return scipy.ndimage.gaussian_filter(x, 1.5, mode="mirror", truncate=5 / 1.5, axes=(1, 2))

    mean_r, mean_f = blur(real), blur(fake)
    var_r, var_f = blur(real**2) - mean_r**2, blur(fake**2) - mean_f**2
    covariance = blur(real * fake) - mean_r * mean_f
    c1, c2 = 0.01**2, 0.03**2
    above = (2 * mean_r * mean_f + c1) * (2 * covariance + c2)
    return (above / ((mean_r**2 + mean_f**2 + c1) * (var_r + var_f + c2))).mean()


@given(seed=st.integers(0, 2**31), batch_size=st.integers(1, 3))
def test_ssim_is_what_scipy_says_and_one_for_equal_images(seed, batch_size):
    rng = torch.Generator().manual_seed(seed)
    real, fake = torch.rand(3, 3, 12, 10, generator=rng), torch.rand(3, 3, 12, 10, generator=rng)
    pairs = zip(real.double().numpy(), fake.double().numpy(), strict=True)
    expected = np.mean([ssim_by_scipy(r, f) for r, f in pairs])
    result = paired_score(metrics.Ssim, real, fake, batch_size)
    assert result == {"ssim": pytest.approx(expected, abs=1e-6)}
    assert paired_score(metrics.Ssim, real, real, batch_size) == {"ssim": pytest.approx(1)}


def test_paired_metrics_refuse_images_without_partners_or_too_small():
    images = torch.rand(4, 3, 8, 8)
    for cls in (metrics.Psnr, metrics.Ssim):
        metric = cls(cls.Params())
        with pytest.raises(ValueError, match="image by image"):
            metric.update(evidence(images, images=images), None)
        with pytest.raises(ValueError, match="image by image"):
            metric.update(evidence(images, images=images), evidence(images[:2], images=images[:2]))
    with pytest.raises(sandbox.SandboxError, match="at least 6 px"):
        paired_score(metrics.Ssim, images[..., :5], images[..., :5], 4)


def test_class_accuracy_is_the_share_of_images_that_show_what_was_asked_for():
    metric = metrics.ClassAccuracy(metrics.ClassAccuracy.Params())
    logits, labels = torch.eye(4), torch.tensor([0, 1, 2, 0])
    metric.update(None, evidence(logits, labels=labels))
    metric.update(evidence(logits, labels=torch.full((4,), 3)), None)  # real images do not count
    metric.update(None, evidence(logits[:1], labels=labels[:1]))
    assert metric.compute() == {"class_accuracy": 4 / 5}
    metric.update(None, evidence(logits, labels=torch.full((4,), -1)))
    with pytest.raises(sandbox.SandboxError, match="4 of 9 images have no label"):
        metric.compute()


UNPAIRED = {
    metrics.Fid: {},
    metrics.Kid: {"num_subsets": 3, "subset_size": 7},
    metrics.Inception: {"splits": 3},
    metrics.PrecisionRecall: {},
}


@given(seed=st.integers(0, 2**31), batch_size=st.integers(1, 40))
def test_no_score_depends_on_how_the_images_are_cut_into_batches(seed, batch_size):
    real, fake = draw(seed, 33), draw(seed + 1, 21, shift=0.4)
    for cls, params in UNPAIRED.items():
        cut = score(cls, real, fake, batch_size, **params)
        assert cut == pytest.approx(score(cls, real, fake, **params), rel=1e-9)


@given(seed=st.integers(0, 2**31))
def test_no_score_over_whole_sets_depends_on_the_order_of_the_images(seed):
    real, fake = draw(seed, 20), draw(seed + 1, 20, shift=0.4)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))
    params = {metrics.Kid: {"num_subsets": 1, "subset_size": 20}, metrics.Inception: {"splits": 1}}
    for cls in UNPAIRED:
        moved = score(cls, real[order], fake[order.flip(0)], **params.get(cls, {}))
        straight = score(cls, real, fake, **params.get(cls, {}))
        assert moved == pytest.approx(straight, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("cls", [metrics.Kid, metrics.Inception])
def test_seeds_repeat_a_score_and_leave_the_global_random_state_alone(cls):
    real, fake = draw(0, 30), draw(1, 30, shift=0.4)
    state = torch.get_rng_state()
    first = score(cls, real, fake, seed=1, **UNPAIRED[cls])
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert score(cls, real, fake, seed=1, **UNPAIRED[cls]) == first
    assert score(cls, real, fake, seed=2, **UNPAIRED[cls]) != first


@pytest.mark.parametrize("cls", [*UNPAIRED, metrics.Psnr, metrics.Ssim, metrics.ClassAccuracy])
def test_every_metric_refuses_to_score_nothing(cls):
    with pytest.raises(sandbox.SandboxError, match="at least"):
        cls(cls.Params()).compute()


@pytest.mark.parametrize("cls", UNPAIRED)
def test_a_nan_feature_is_an_error_and_not_a_score(cls):
    rows = draw(0, 30)
    broken = rows.clone()
    broken[3, 2] = float("nan")
    with pytest.raises(sandbox.RunError, match="not all finite"):
        score(cls, rows, broken, **UNPAIRED[cls])


@pytest.mark.gpu
@pytest.mark.parametrize("cls", UNPAIRED)
def test_a_score_on_a_gpu_is_the_score_on_the_cpu(cls):
    real, fake = draw(0, 60), draw(1, 50, shift=0.4)
    expected = score(cls, real, fake, batch_size=16, **UNPAIRED[cls])
    found = score(cls, real.cuda(), fake.cuda(), batch_size=16, **UNPAIRED[cls])
    assert found == pytest.approx(expected, rel=1e-6)


def test_metrics_are_registered_and_meet_the_interface(registry):
    names = {entry.name for entry in registry if entry.plugin == "metrics"}
    assert names == {
        *("fid", "rfid", "kid", "inception-score"),
        *("precision-recall", "psnr", "ssim", "class-accuracy"),
    }
    for name in names:
        cls = registry.find(sandbox.Metric, name)
        assert isinstance(cls(cls.Params()), sandbox.Metric)
