"""What the recipe's extractor sees in images, for scores.

The one thing to hold in mind: features are taken in exact float32 whatever precision the images
were drawn in, so that two scores differ by their images alone.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

import sandbox


def extractor(run: sandbox.Run) -> str:
    """How scores name the extractor; one that is trained on a data set is named with it."""
    label = run.features.label
    return f"{label}:{run.settings('dataset')['name']}" if label == "classifier" else label


def require_extractor(run: sandbox.Run) -> None:
    """Raise SandboxError where the recipe's extractor needs weights and has none."""
    if not run.has_weights("features") and run.features.needs_weights:
        raise sandbox.SandboxError(
            f"{run.label}: the feature extractor has no weights: run train-classifier "
            "before, or set weights.features"
        )


@torch.no_grad()
def evidence(
    run: sandbox.Run,
    images: Float[Tensor, "b 3 h w"],
    labels: Int[Tensor, " b"],
    reads_features: bool = True,
) -> sandbox.Evidence:
    """What metrics read of a batch in [-1, 1], on the run's device; does not wait for it."""
    images, labels = images.to(run.device), labels.to(run.device)
    if reads_features:
        with sandbox.exact_float32(run.device):
            features, logits = run.features.features(images)
    else:
        features = logits = torch.zeros(len(images), 1, device=run.device)
    return sandbox.Evidence((images + 1) / 2, features.float(), logits.float(), labels)


def named_scores(run: sandbox.Run, metric: sandbox.Metric) -> Mapping[str, float]:
    """A metric's scores; each name says whose features it used."""
    suffix = f"[{extractor(run)}]" if metric.reads_features else ""
    return {f"{name}{suffix}": value for name, value in metric.compute().items()}
