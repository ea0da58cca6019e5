"""Laws of data, of what is measured on images, and of what surrounds a run."""

import math
from collections.abc import Callable, Mapping

import pluggy
import torch
from torch import Tensor

from sandbox.errors import SandboxError
from sandbox.hooks import ObserverHooks
from sandbox.interfaces import Dataset, FeatureExtractor, Metric, Observer
from sandbox.task import Run, Task
from sandbox.testing.claims import (
    agree,
    as_module,
    holds,
    ids_lie_within,
    images_lie_within,
    random_images,
    randomly,
)
from sandbox.values import Evidence, Split


def dataset_law(dataset: Dataset, seed: int = 0) -> None:
    """Images and labels in range, the same at the same index and random state."""
    holds(len(dataset.class_names) == dataset.num_classes > 0, "every class has a name")
    splits: tuple[Split, ...] = ("train", "validation")
    for split in splits:
        size = dataset.size(split)
        holds(size > 0, f"the {split} split has images")
        indices = torch.tensor([0, size - 1, size // 2])
        batch = dataset.batch(split, indices, randomly(seed))
        images_lie_within(batch.images, (3, 3, *dataset.image_size), "batch")
        ids_lie_within(batch.labels, (3,), dataset.num_classes, "batch (as labels)")
        again = dataset.batch(split, indices, randomly(seed))
        agree(batch.images, again.images, "the same random state gives the same images", 0)
        holds(torch.equal(batch.labels, again.labels), "the same index has the same label")


@torch.no_grad()
def feature_extractor_law(
    extractor: FeatureExtractor, image_size: tuple[int, int], seed: int = 0
) -> None:
    """A row of features and one of logits an image, each by itself."""
    holds(bool(extractor.label), "a label says in every score whose features it used")
    holds(isinstance(extractor.needs_weights, bool), "needs_weights is true or false")
    as_module(extractor.network).eval()
    images = random_images(2, image_size, seed)
    found, alone = extractor.features(images), extractor.features(images[:1])
    for rows, first, what in zip(found, alone, ("features", "logits"), strict=True):
        holds(rows.ndim == 2 and len(rows) == 2, f"{what} has a row an image")
        holds(bool(rows.isfinite().all()), f"{what} are finite")
        agree(rows[:1], first, f"{what}: an image's row depends on no other image", 1e-3)


def metric_law(make: Callable[[], Metric], seed: int = 0, count: int = 24) -> None:
    """Finite scores that do not depend on how the images were cut into batches."""
    real, fake = random_evidence(count, seed), random_evidence(count, seed + 1)
    metric = make()
    holds(isinstance(metric.paired, bool), "paired is true or false")
    holds(isinstance(metric.reads_features, bool), "reads_features is true or false")
    metric.update(real, fake)
    scores = dict(metric.compute())
    holds(bool(scores), "compute gives at least one score")
    holds(all(math.isfinite(score) for score in scores.values()), f"scores are finite: {scores}")
    cut = make()
    for rows in (slice(0, 5), slice(5, 6), slice(6, None)):
        cut.update(rows_of(real, rows), rows_of(fake, rows))
    _equal_scores(cut, scores, "scores do not depend on the size of batches")
    if not metric.paired:
        apart = make()
        apart.update(real, None)
        apart.update(None, fake)
        _equal_scores(apart, scores, "an unpaired metric takes either side alone")


def metric_order_law(make: Callable[[], Metric], seed: int = 0, count: int = 24) -> None:
    """The order of images does not matter: for metrics set to draw no random subsets of them."""
    real, fake = random_evidence(count, seed), random_evidence(count, seed + 1)
    metric, other = make(), make()
    metric.update(real, fake)
    order = torch.randperm(count, generator=randomly(seed))
    other.update(rows_of(real, order), rows_of(fake, order))
    _equal_scores(other, metric.compute(), "scores do not depend on the order of images")


def random_evidence(count: int, seed: int) -> Evidence:
    """Images of 16 px with six features and four logits, all noise."""
    rng = randomly(seed)
    return Evidence(
        torch.rand(count, 3, 16, 16, generator=rng),
        torch.randn(count, 6, generator=rng),
        torch.randn(count, 4, generator=rng),
        torch.randint(4, (count,), generator=rng),
    )


def rows_of(evidence: Evidence, rows: slice | Tensor) -> Evidence:
    """Some of the images."""
    return Evidence(
        evidence.images[rows], evidence.features[rows], evidence.logits[rows], evidence.labels[rows]
    )


def _equal_scores(metric: Metric, expected: Mapping[str, float], law: str) -> None:
    found = metric.compute()
    holds(found.keys() == expected.keys(), law)
    for name, score in expected.items():
        equal = math.isclose(found[name], score, rel_tol=1e-4, abs_tol=1e-6)
        holds(equal, f"{law}: {name} is {found[name]} and {score}")


def observer_law(observer: Observer) -> None:
    """Implements at least one hook, and none that does not exist."""
    manager = pluggy.PluginManager("sandbox")
    manager.add_hookspecs(ObserverHooks)
    name = manager.register(observer)
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise AssertionError(f"an observer implements only hooks that exist: {error}") from None
    holds(bool(manager.get_hookcallers(observer)), f"the observer {name} implements a hook")


def task_law(task: Task, run: Run) -> None:
    """Says what it will do, label to text, before it does it, or plainly that it cannot."""
    try:
        plan = task.plan(run)
    except SandboxError as refusal:
        holds(bool(str(refusal).strip()), "a task that cannot be done says why")
        return
    texts = [*plan.keys(), *plan.values()]
    holds(all(isinstance(text, str) for text in texts), f"a plan is text throughout: {dict(plan)}")
