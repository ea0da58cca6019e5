"""Train the feature extractor's network to tell the data set's classes apart."""

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

import sandbox

from .loop import Fit, train
from .plan import training_plan
from .settings import Training


class TrainClassifier:
    """Fit the recipe's `features` as a classifier; keeps `weights/features.safetensors`."""

    parallel = True

    class Params(Training):
        label_smoothing: float = Field(0.0, ge=0, lt=1)
        """Share of the target spread over all classes."""
        num_validation_images: int = Field(1024, gt=0)
        """Held-out images on which the accuracy is measured."""

    def __init__(self, params: Params) -> None:
        self.params = params

    def plan(self, run: sandbox.Run) -> Mapping[str, str]:
        size = run.dataset.image_size
        if not run.features.needs_weights:
            raise sandbox.SandboxError(
                f"{run.label}: the features {run.settings('features')['name']!r} are not "
                "trained; use features: classifier, or drop this task"
            )

        def loss(num_images: int) -> Tensor:
            images = torch.rand(num_images, 3, *size, device=run.device) * 2 - 1
            labels = torch.zeros(num_images, dtype=torch.long, device=run.device)
            return self._loss(run, sandbox.Batch(images, labels)).total

        return training_plan(run, self.params, run.features.network, loss)

    def run(self, run: sandbox.Run) -> dict[str, Any]:
        result = train(
            Fit(
                run,
                self.params,
                run.features.network,
                run.dataset,
                "classifier",
                lambda batch, progress: self._loss(run, batch),
                lambda: self._validate(run),
                "error",
                compile=lambda: _compile(run.features.network),
            )
        )
        run.save_weights(
            "features", run.features.network.state_dict(), images_seen=result["images_seen"]
        )
        return result | {"accuracy": 1 - result["validation"]["error"]}

    def _loss(self, run: sandbox.Run, batch: sandbox.Batch) -> sandbox.Losses:
        logits = run.features.features(batch.images)[1].float()
        smoothing = self.params.label_smoothing
        total = F.cross_entropy(logits, batch.labels, label_smoothing=smoothing)
        hits = (logits.detach().argmax(-1) == batch.labels).float().mean()
        return sandbox.Losses(total, {"accuracy": hits})

    def _validate(self, run: sandbox.Run) -> dict[str, float]:
        wrong, count, loss = 0, 0, 0.0
        limit = self.params.num_validation_images
        for batch in sandbox.sweep(run.dataset, "validation", self.params.batch_size, limit=limit):
            labels = batch.labels.to(run.device)
            logits = run.features.features(batch.images.to(run.device))[1].float()
            wrong += int((logits.argmax(-1) != labels).sum())
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            count += len(labels)
        return {"error": wrong / count, "loss": loss / count}


def _compile(network: nn.Module) -> None:
    """Stage by stage: features and logits are asked for by other names than `forward`."""
    for stage in network.children():
        stage.compile()
