"""Train a tokenizer: reconstruct images through the codebook."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

import sandbox

from .loop import Fit, train
from .plan import training_plan
from .settings import Training
from .usage import CodebookUsage, usage_rows


class TrainTokenizer:
    """Fit the recipe's tokenizer to its data set; keeps `weights/tokenizer.safetensors`."""

    class Params(Training):
        losses: tuple[sandbox.Part[sandbox.ImageLoss], ...] = Field(
            ({"name": "l2"}, {"name": "l1", "weight": 0.2}), validate_default=True
        )
        """How a reconstruction is judged; their sum is added to the quantizer's own loss."""
        betas: tuple[float, float] = (0.5, 0.9)
        """AdamW's running-average factors."""
        weight_decay: float = Field(0.005, ge=0)
        """AdamW's decoupled decay; not on biases, norms, and the codebook."""
        clip: float = Field(1.0, gt=0)
        """Largest gradient norm."""
        num_validation_images: int = Field(1024, gt=0)
        """Held-out images on which PSNR and codebook usage are measured."""
        picture_images: int = Field(12, gt=0)
        """Held-out images in the pictures at the end."""

    def __init__(self, params: Params) -> None:
        self.params = params
        self.losses = [part.build() for part in params.losses]

    def plan(self, run: sandbox.Run) -> Mapping[str, str]:
        tokenizer, size = _trainable(run), run.dataset.image_size

        def loss(num_images: int) -> Tensor:
            images = torch.rand(num_images, 3, *size, device=run.device) * 2 - 1
            return self._losses(tokenizer, images).total

        return training_plan(run, self.params, tokenizer, loss)

    def run(self, run: sandbox.Run) -> dict[str, Any]:
        tokenizer, params = _trainable(run), self.params
        codebook: list[dict[str, float]] = []

        def after_step(optimizer: Any, progress: float, done: int) -> Mapping[str, Any]:
            return tokenizer.after_step(optimizer, progress, run.rng("codebook", done))

        def validate() -> dict[str, float]:
            scores, codebook[:] = _validate(run, tokenizer, params)
            return scores

        result = train(
            Fit(
                run,
                params,
                tokenizer,
                run.dataset,
                "tokenizer",
                lambda batch, progress: self._losses(tokenizer, batch.images),
                validate,
                "l2",
                after_step,
            )
        )
        run.save_weights("tokenizer", tokenizer.state_dict(), images_seen=result["images_seen"])
        if not codebook:  # resumed after the last validation
            codebook = _validate(run, tokenizer, params)[1]
        _pictures(run, tokenizer, params.picture_images)
        return result | {"psnr": round(result["validation"]["psnr"], 3), "codebook": codebook}

    def _losses(
        self, tokenizer: sandbox.TrainableTokenizer, images: Float[Tensor, "b 3 h w"]
    ) -> sandbox.Losses:
        made = tokenizer.reconstruct(images)
        parts = {"quantizer": made.loss}
        for part, loss in zip(self.params.losses, self.losses, strict=True):
            value = loss.loss(made.images.float(), images)
            parts[part.name] = parts[part.name] + value if part.name in parts else value
        detached = {f"loss/{name}": value.detach() for name, value in parts.items()}
        return sandbox.Losses(torch.stack(list(parts.values())).sum(), detached)


def _trainable(run: sandbox.Run) -> Any:
    tokenizer: Any = run.tokenizer
    if not isinstance(tokenizer, sandbox.TrainableTokenizer) or not isinstance(
        tokenizer, nn.Module
    ):
        raise sandbox.SandboxError(
            f"{run.label}: the tokenizer {run.settings('tokenizer').get('name')!r} cannot be "
            "trained (it has no reconstruct() and after_step())"
        )
    if tokenizer.image_size != run.dataset.image_size:
        raise sandbox.SandboxError(
            f"{run.label}: the data set gives images of {run.dataset.image_size} pixels (height, "
            f"width), the tokenizer's schedule makes {tokenizer.image_size}: change "
            "dataset.image_size or tokenizer.schedule"
        )
    return tokenizer


@torch.no_grad()
def _validate(
    run: sandbox.Run, tokenizer: Any, params: TrainTokenizer.Params
) -> tuple[dict[str, float], list[dict[str, float]]]:
    usage = CodebookUsage(tokenizer.layout, tokenizer.vocab_size)
    squared, decibel, num_images = 0.0, 0.0, 0
    for batch in sandbox.sweep(
        run.dataset, "validation", params.batch_size, limit=params.num_validation_images
    ):
        images = batch.images.to(run.device)
        ids = tokenizer.encode(images)
        usage.update(ids)
        error = (tokenizer.decode(ids) - images).square().flatten(1).mean(1).double()
        squared += float(error.sum())
        decibel += float((-10 * torch.log10(error.clamp_min(1e-12) / 4)).sum())  # range -1..1
        num_images += len(images)
    scores = {"l2": squared / num_images, "psnr": decibel / num_images}
    codebook = usage_rows(tokenizer.layout, usage)
    for row in codebook:
        scores[f"perplexity/scale{row['scale']}"] = row["perplexity"]
        scores[f"used/scale{row['scale']}"] = row["used"]
    return scores, codebook


def _pictures(run: sandbox.Run, tokenizer: Any, num_images: int) -> None:
    """Originals over reconstructions, and what the first k steps alone decode to."""
    batch = next(sandbox.sweep(run.dataset, "validation", num_images))
    images = batch.images.to(run.device)
    with torch.no_grad():
        ids = tokenizer.encode(images)
        run.picture(
            "reconstructions", torch.cat([images, tokenizer.decode(ids)]), columns=len(images)
        )
        num_steps = len(tokenizer.layout.steps)
        if num_steps > 32:
            return
        canvas, rows = tokenizer.canvas(len(ids)), []
        for index, span in enumerate(tokenizer.layout.spans):
            canvas = tokenizer.paint(canvas, tokenizer.embed(ids[:, span]), index)
            rows.append(tokenizer.render(canvas))
    run.picture("scales", torch.cat(rows), columns=len(images))
