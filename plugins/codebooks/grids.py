"""The codebooks `fsq` and `lfq`: each channel is rounded to a few levels, and nothing is learned.

The one thing to hold: the levels never move, so the encoder has to meet them. Channels are clamped
to [-scale, scale] (not squeezed by a tanh), which makes the rounded vector the nearest code. In a
pyramid all scales share the levels although their residuals shrink: choose `scale` by the spread
of the features, and odd level counts, whose middle level lets a fine scale add nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod

import torch
from jaxtyping import Float, Int
from pydantic import Field, field_validator
from torch import Tensor, nn

import sandbox

from .entropy import entropy_gap
from .lookup import Lookup
from .stored import store

MAX_CODES = 2**18
"""The largest grid of the papers; above it float32 no longer counts ids exactly."""
MAX_JOINT_BITS = 8
"""How many channels `lfq` judges together: the entropy of all 2^c codes is out of reach."""


class Grid(nn.Module):
    """`levels` evenly spaced levels a channel, from -scale to scale, by vector-quantize-pytorch."""

    lookup: Lookup = "euclidean"

    def __init__(self, levels: Sequence[int], scale: float) -> None:
        super().__init__()
        import vector_quantize_pytorch as library  # takes seconds, for those who want it

        self.code_dim, self.vocab_size, self.scale = len(levels), prod(levels), scale
        self.grid = library.FSQ([*levels], preserve_symmetry=True, bound_hard_clamp=True)
        store(self, "stored_scale", scale, "scale", "{:.6g}".format)

    @torch.no_grad()
    def nearest(self, vectors: Float[Tensor, "n c"]) -> Int[Tensor, " n"]:
        ids = self.grid.codes_to_indices(self.grid.quantize(vectors.float() / self.scale))
        return ids.long().clamp(0, self.vocab_size - 1)  # NaN has an id too

    def embed(self, ids: Int[Tensor, "*axes"]) -> Float[Tensor, "*axes c"]:
        codes = self.grid.indices_to_codes(ids.flatten())
        return self.scale * codes.view(*ids.shape, self.code_dim)

    def published_codes(self) -> Float[Tensor, "v c"]:
        """Raises ValueError."""
        raise ValueError(
            f"codebook `{type(self).__name__.lower()}` has levels instead of a table of codes, and "
            "the published layout is for learned codes (train with `vq` or `simvq` to export)"
        )

    def seed(self, vectors: Float[Tensor, "n c"], group: int, num_groups: int) -> None:
        """Nothing: the codes stand where they are."""

    def observe(self, vectors: Sequence[Tensor], ids: Sequence[Tensor]) -> None:
        """Nothing: the codes stand where they are."""

    def after_step(
        self, optimizer: torch.optim.Optimizer, progress: float, rng: torch.Generator
    ) -> Mapping[str, float | Tensor]:
        return {}


class FSQ(Grid):
    """Finite scalar quantization (arXiv 2309.15505), with a clamp for its tanh."""

    class Params(sandbox.Params):
        levels: tuple[int, ...] = Field((8, 5, 5, 5), min_length=1)
        """How many levels each channel has, at least 2: as many numbers as the autoencoder's
        `code_dim`. Their product is the vocabulary."""
        scale: float = Field(1.0, gt=0)
        """The outermost level; about twice the standard deviation of the features."""

        @field_validator("levels")
        @classmethod
        def _must_make_a_vocabulary(cls, levels: tuple[int, ...]) -> tuple[int, ...]:
            if min(levels) < 2 or prod(levels) > MAX_CODES:
                raise ValueError(
                    f"needs at least 2 levels a channel and at most {MAX_CODES} codes, "
                    f"got {min(levels)} levels and {prod(levels)} codes"
                )
            return levels

    def __init__(self, params: Params, code_dim: int) -> None:
        if len(params.levels) != code_dim:
            raise sandbox.SandboxError(
                f"codebook `fsq` has {len(params.levels)} levels for {code_dim} channels: set the "
                f"autoencoder's code_dim to {len(params.levels)}, or give {code_dim} levels"
            )
        super().__init__(params.levels, params.scale)
        self.params = params
        store(self, "stored_levels", [*params.levels], "levels")


class LFQ(Grid):
    """Lookup-free quantization: the signs of the channels (MAGVIT-v2, arXiv 2310.05737)."""

    class Params(sandbox.Params):
        scale: float = Field(1.0, gt=0)
        """Codes have channels of -scale or scale; about the standard deviation of the features."""
        entropy_weight: float = Field(0.1, ge=0)
        """Weight of the entropy penalty: sure assignments, and all codes in use; 0 for none."""
        entropy_temperature: float = Field(0.01, gt=0)
        """Of the soft assignments, in units of the mean squared distance."""

    def __init__(self, params: Params, code_dim: int) -> None:
        if 2**code_dim > MAX_CODES:
            raise sandbox.SandboxError(
                f"codebook `lfq` has 2^code_dim codes, and {code_dim} channels are too many: set "
                f"the autoencoder's code_dim to at most {MAX_CODES.bit_length() - 1}"
            )
        super().__init__([2] * code_dim, params.scale)
        self.params = params

    @property
    def penalty(self) -> Callable[[Sequence[Tensor]], Tensor] | None:
        """The entropy penalty of a batch's vectors (one `n c` a group); None where it weighs 0."""
        return self._penalty if self.params.entropy_weight else None

    def _penalty(self, vectors: Sequence[Float[Tensor, "n c"]]) -> Float[Tensor, ""]:
        """Channels are judged in bundles: the sum of the bundles' gaps bounds that of the whole."""
        p, gaps = self.params, []
        for group in vectors:
            for channels in group.float().split(MAX_JOINT_BITS, dim=1):
                width = channels.shape[1]
                codes = self.scale * self.grid.implicit_codebook[: 2**width, :width]
                with sandbox.exact_float32(group.device):
                    gaps.append(entropy_gap(channels, codes, p.entropy_temperature))
        return p.entropy_weight * torch.stack(gaps).sum() / len(vectors)
