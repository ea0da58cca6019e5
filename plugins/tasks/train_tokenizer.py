"""Train a tokenizer: reconstruct images through the codebook."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field, field_validator
from torch import Tensor, nn

import sandbox

from .contest import Contest
from .health import Health
from .loop import Fit, train
from .pictures import tokenizer_pictures
from .plan import training_plan
from .settings import Training


class TrainTokenizer:
    """Fit the recipe's tokenizer to its data set; keeps `weights/tokenizer.safetensors`."""

    parallel = True

    class Params(Training):
        losses: tuple[sandbox.Part[sandbox.ImageLoss], ...] = Field(
            ({"name": "l2"}, {"name": "l1", "weight": 0.2}), validate_default=True
        )
        """How a reconstruction is judged; their sum is added to the quantizer's own loss."""
        adversary: sandbox.Part[sandbox.Adversary] | None = None
        """A discriminator that learns to tell reconstructions from images; none when absent."""
        init_images: int | None = Field(None, gt=0)
        """Training images that place the codes at the start; as many as codes when absent."""
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

        @field_validator("losses")
        @classmethod
        def _some(cls, losses: tuple[Any, ...]) -> tuple[Any, ...]:
            if not losses:
                raise ValueError("name at least one image loss, such as l2")
            return losses

    def __init__(self, params: Params) -> None:
        self.params = params
        self.losses = [part.build() for part in params.losses]

    def plan(self, run: sandbox.Run) -> Mapping[str, str]:
        tokenizer, size = _trainable(run), run.dataset.image_size
        self._prepare(run)
        contest = self._contest(run)

        def loss(num_images: int) -> Tensor:
            images = torch.rand(num_images, 3, *size, device=run.device) * 2 - 1
            total = self._losses(tokenizer, contest, images, 1.0).total
            if contest is not None:
                contest.rehearse()
            return total

        return training_plan(run, self.params, tokenizer, loss)

    def run(self, run: sandbox.Run) -> dict[str, Any]:
        tokenizer, params, now = _trainable(run), self.params, 0.0
        self._prepare(run)
        contest = self._contest(run)
        health = Health(run, tokenizer, params.num_validation_images, params.batch_size)

        def begin() -> None:
            if not run.has_weights("tokenizer"):  # else its codes are where they should be
                tokenizer.initialise(_first_images(run, tokenizer, params))

        def after_step(optimizer: Any, progress: float, done: int) -> Mapping[str, Any]:
            nonlocal now
            now = progress
            scalars = dict(tokenizer.after_step(optimizer, progress, run.rng("codebook", done)))
            return scalars | (contest.step() if contest is not None else {})

        result = train(
            Fit(
                run,
                params,
                tokenizer,
                run.dataset,
                "tokenizer",
                lambda batch, progress: self._losses(tokenizer, contest, batch.images, progress),
                lambda: health.measure(now),
                "l2",
                after_step,
                begin,
                {"health": health} | ({"contest": contest} if contest is not None else {}),
                lambda: _compile(tokenizer, params, run.device),
            )
        )
        run.save_weights("tokenizer", tokenizer.state_dict(), images_seen=result["images_seen"])
        tokenizer_pictures(run, tokenizer, params.picture_images)
        psnr = round(result["validation"]["psnr"], 3)
        return result | {"psnr": psnr, "codebook": health.rows}

    def _prepare(self, run: sandbox.Run) -> None:
        """Ready the image losses for the run's images and device."""
        with torch.random.fork_rng(devices=[]):
            for loss in self.losses:
                if prepare := getattr(loss, "prepare", None):
                    prepare(run.dataset.image_size, run.num_classes)
                if isinstance(loss, nn.Module):
                    loss.to(run.device)
                    if run.device.type == "cuda":  # in which convolutions are fastest
                        loss.to(memory_format=torch.channels_last)

    def _contest(self, run: sandbox.Run) -> Contest | None:
        if self.params.adversary is None:
            return None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(sandbox.derive_seed(run.seed, run.label, "adversary"))
            adversary = self.params.adversary.build(run.dataset.image_size)
        return Contest(adversary, self.params, run.device)

    def _losses(
        self,
        tokenizer: sandbox.TrainableTokenizer,
        contest: Contest | None,
        images: Float[Tensor, "b 3 h w"],
        progress: float,
    ) -> sandbox.Losses:
        made = tokenizer.reconstruct(images)
        if contest is not None and contest.begins(progress):
            return contest.losses(made, images, lambda fake: self._judge(fake, images), progress)
        parts = {"quantizer": made.loss, **self._judge(made.images.float(), images)}
        detached = {f"loss/{name}": value.detach() for name, value in parts.items()}
        return sandbox.Losses(torch.stack(list(parts.values())).sum(), detached)

    def _judge(
        self, fake: Float[Tensor, "b 3 h w"], images: Float[Tensor, "b 3 h w"]
    ) -> dict[str, Tensor]:
        """The image losses by name."""
        parts: dict[str, Tensor] = {}
        for part, loss in zip(self.params.losses, self.losses, strict=True):
            value = loss.loss(fake, images)
            parts[part.name] = parts[part.name] + value if part.name in parts else value
        return parts


def _compile(tokenizer: nn.Module, params: Training, device: torch.device) -> None:
    """On a GPU as CUDA graphs, whose many short kernels are launched at once.

    A graph's outputs live until it runs again, so it cannot run twice for one optimiser step.
    """
    graphs = device.type == "cuda" and params.accumulate == 1
    tokenizer.compile(mode="reduce-overhead" if graphs else None)


def _trainable(run: sandbox.Run) -> Any:
    tokenizer: Any = run.tokenizer
    if not isinstance(tokenizer, sandbox.TrainableTokenizer) or not isinstance(
        tokenizer, nn.Module
    ):
        raise sandbox.SandboxError(
            f"{run.label}: the tokenizer {run.settings('tokenizer').get('name')!r} cannot be "
            "trained (it has no initialise(), reconstruct() and after_step())"
        )
    if tokenizer.image_size != run.dataset.image_size:
        raise sandbox.SandboxError(
            f"{run.label}: the data set gives images of {run.dataset.image_size} pixels (height, "
            f"width), the tokenizer's schedule makes {tokenizer.image_size}: change "
            "dataset.image_size or tokenizer.schedule"
        )
    return tokenizer


def _first_images(
    run: sandbox.Run, tokenizer: Any, params: TrainTokenizer.Params
) -> Iterator[Float[Tensor, "b 3 h w"]]:
    """Training images in an order drawn by the run's seed, each once, in batches."""
    wanted = params.init_images or max(params.batch_size, tokenizer.vocab_size)
    left = min(wanted, run.dataset.size("train"))
    seed = sandbox.derive_seed(run.seed, "initialise")
    for batch in sandbox.stream(run.dataset, "train", params.batch_size, seed=seed):
        yield batch.images[:left].to(run.device)
        left -= params.batch_size
        if left <= 0:
            return
