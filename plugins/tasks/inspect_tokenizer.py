"""Look into a trained tokenizer: its codes by scale, against k-means, and in several precisions."""

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

import sandbox

from .encoding import coding_precisions
from .health import Health
from .kmeans import MAX_VECTORS, kmeans_perplexity
from .pictures import tokenizer_pictures
from .precisions import compare_precisions


class InspectTokenizer:
    """Report how a trained tokenizer does on held-out images, scale by scale."""

    class Params(sandbox.Params):
        num_images: int | None = Field(10_000, gt=0)
        """The first so many validation images; all when null."""
        batch_size: int = Field(100, gt=0)
        """Images a pass."""
        kmeans: bool = True
        """Set the codes' perplexity beside that of k-means codes on the same vectors: as many for
        each scale by itself (`of_kmeans_alone` is the perplexity over theirs, the stricter
        measure), and as many for all scales together (`of_kmeans`), since a tokenizer's codes
        serve all of its scales too. Clusters at most 100,000 vectors a scale; where there are few
        vectors a code, k-means looks too good."""
        precisions: bool = False
        """Also encode in TF32 (on a GPU) and bfloat16: which ids change, and the PSNR."""
        picture_images: int = Field(12, gt=0)
        """Images in the pictures."""

    def __init__(self, params: Params) -> None:
        self.params = params

    def plan(self, run: sandbox.Run) -> Mapping[str, str]:
        tokenizer, size = run.tokenizer, self._size(run)
        if not run.has_weights("tokenizer") and _parameters(tokenizer):
            raise sandbox.SandboxError(
                f"{run.label}: the tokenizer has no trained weights: run train-tokenizer before, "
                "or set weights.tokenizer"
            )
        if self.params.kmeans and not hasattr(tokenizer, "residual_vectors"):
            raise sandbox.SandboxError(
                f"{run.label}: the tokenizer {run.settings('tokenizer').get('name')!r} does not "
                "say what its lookups see (it has no residual_vectors()): set kmeans: false"
            )
        plan = {"images": f"{size:,} of the validation split"}
        if self.params.kmeans:
            plan["k-means"] = f"{tokenizer.vocab_size} codes a scale, and for all scales together"
        if self.params.precisions:
            plan["encoders"] = ", ".join(coding_precisions(run.device))
        return plan

    def run(self, run: sandbox.Run) -> dict[str, Any]:
        params, tokenizer, size = self.params, run.tokenizer, self._size(run)
        health = Health(run, tokenizer, params.num_images, params.batch_size)
        scores = health.measure()
        run.report(size, size, **{f"validation/{name}": value for name, value in scores.items()})
        result: dict[str, Any] = {
            "psnr": round(scores["psnr"], 3),
            "dead_codes": int(scores["dead_codes"]),
            "feature_std": round(scores["feature_std"], 4),
        }
        if params.kmeans:
            self._add_kmeans(run, health.rows)
        result["codebook"] = health.rows
        if params.precisions:
            result["precisions"] = compare_precisions(
                run, tokenizer, params.num_images, params.batch_size
            )
            if "tf32" not in coding_precisions(run.device):
                run.say("TF32 is left out: this device has none, so that it would be float32")
        tokenizer_pictures(run, tokenizer, params.picture_images)
        return result

    def _size(self, run: sandbox.Run) -> int:
        size = run.dataset.size("validation")
        return min(size, self.params.num_images or size)

    def _add_kmeans(self, run: sandbox.Run, rows: list[dict[str, float]]) -> None:
        lookup = getattr(getattr(run.tokenizer, "codebook", None), "lookup", "euclidean")
        alone, shared = kmeans_perplexity(
            self._vectors(run), run.tokenizer.vocab_size, cosine=lookup == "cosine", seed=run.seed
        )
        for row, own, common in zip(rows, alone, shared, strict=True):
            row["kmeans_perplexity"] = round(own, 2)
            row["kmeans_shared_perplexity"] = round(common, 2)
            row["of_kmeans_alone"] = round(row["perplexity"] / own, 4)
            row["of_kmeans"] = round(row["perplexity"] / common, 4)

    @torch.no_grad()
    def _vectors(self, run: sandbox.Run) -> list[Tensor]:
        """What each scale's lookup sees: of every batch its share of `MAX_VECTORS`, by chance."""
        tokenizer: Any = run.tokenizer
        size, rng = self._size(run), torch.Generator().manual_seed(run.seed)
        kept: list[list[Tensor]] = []
        for batch in sandbox.sweep(
            run.dataset, "validation", self.params.batch_size, limit=self.params.num_images
        ):
            found = tokenizer.residual_vectors(batch.images.to(run.device))
            most = -(-MAX_VECTORS * len(batch.images) // size)
            kept = kept or [[] for _ in found]
            for scale, vectors in zip(kept, found, strict=True):
                chosen = torch.randperm(len(vectors), generator=rng)[:most]
                scale.append(vectors[chosen.to(vectors.device)])
        return [torch.cat(scale) for scale in kept]


def _parameters(tokenizer: Any) -> bool:
    return isinstance(tokenizer, torch.nn.Module) and any(True for _ in tokenizer.parameters())
