"""The codebook `vq`: vectors to the nearest of `vocab_size` learned codes, in float32 throughout.

The one thing to hold: a scale of one cell must count as much as a scale of 256. Every statistic
here (how often a code is used, what it moves towards, what replaces a dead one) first averages
within a group, then over the groups, or else the coarse scales end up with a handful of codes. The
second trap is the start: codes far larger than the features are never chosen and never learn, so by
default they start as features of training images. Several processes hold equal codes: they average
their statistics, and process 0 draws what replaces dead codes.
"""

from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

import sandbox

from .entropy import entropy_penalty
from .lookup import Lookup, cluster, nearest_codes
from .stored import store


class VQ(nn.Module):
    """Codes by squared Euclidean distance (VQ-VAE, arXiv 1711.00937) or by angle.

    `update: ema` moves each code towards the mean of its vectors (1711.00937, appendix A.1);
    `update: gradient` leaves that to the optimiser, as VAR's tokenizer does. Either way, codes that
    are hardly chosen any more are put where the data is.
    """

    class Params(sandbox.Params):
        vocab_size: int = Field(4096, ge=2)
        """How many codes there are."""
        init: Literal["data", "uniform", "normal"] = "data"
        """Where codes start: on features of training images, each scale its share of them; uniform
        within 1 / vocab_size; or N(0, 1), which is so much larger than the features that all but a
        few codes are never chosen: it is here to show that."""
        lookup: Lookup = "euclidean"
        """Nearest by distance, or by the angle alone (VAR's `using_znorm`). Codes keep their length
        either way: a code's vectors are replaced by their mean. Angles cannot tell a fine scale's
        short residuals from long ones, and the published layout does not know them."""
        update: Literal["ema", "gradient"] = "ema"
        """How codes learn: as a moving average of their vectors, or by gradient descent."""
        decay: float = Field(0.99, ge=0, lt=1)
        """Of the moving averages (codes and their usage), per optimiser step."""
        balance: Literal["scales", "tokens"] = "scales"
        """What counts equally in usage, averages and restarts: every scale, or every token, which
        starves the coarse scales: it is here to show that."""
        restart: bool = True
        """Whether rarely chosen codes are moved onto vectors of the current batch."""
        restart_every: int = Field(20, ge=1)
        """Optimiser steps between restarts."""
        restart_threshold: float = Field(0.05, ge=0, lt=1)
        """A code is restarted below this share of the mean usage."""
        restart_until: float = Field(0.7, ge=0, le=1)
        """The share of the training after which codes are left to settle."""
        entropy_weight: float = Field(0.0, ge=0)
        """Weight of the entropy penalty: sure assignments, and all codes in use; 0 for none. It
        costs memory and time for all distances; 0.02 is much."""
        entropy_temperature: float = Field(0.01, gt=0)
        """Of the soft assignments, in units of the mean squared distance."""

    def __init__(self, params: Params, code_dim: int) -> None:
        super().__init__()
        self.params, self.vocab_size, self.code_dim = params, params.vocab_size, code_dim
        self.lookup = params.lookup
        self.embedding = nn.Embedding(self.vocab_size, code_dim)
        if params.init != "normal":
            nn.init.uniform_(self.embedding.weight, -1 / self.vocab_size, 1 / self.vocab_size)
        self.embedding.weight.requires_grad_(params.update == "gradient")
        self.usage: Tensor
        self.num_steps: Tensor
        self.register_buffer("usage", torch.ones(self.vocab_size))  # its mean is 1
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))
        store(self, "cosine", params.lookup == "cosine", "lookup", _lookup_of)
        self._weights: tuple[tuple[object, ...], Tensor, float] | None = None
        _forget(self)
        self.register_load_state_dict_post_hook(_forget)

    @torch.no_grad()
    def nearest(self, vectors: Float[Tensor, "n c"]) -> Int[Tensor, " n"]:
        with sandbox.exact_float32(vectors.device):
            return nearest_codes(vectors.float(), self.embedding.weight, self.lookup)

    def embed(self, ids: Int[Tensor, "*axes"]) -> Float[Tensor, "*axes c"]:
        return self.embedding(ids)

    @property
    def penalty(self) -> Callable[[Sequence[Tensor]], Tensor] | None:
        """The entropy penalty of a batch's vectors (one `n c` a group); None where it weighs 0."""
        return self._penalty if self.params.entropy_weight else None

    def _penalty(self, vectors: Sequence[Float[Tensor, "n c"]]) -> Float[Tensor, ""]:
        p, codes = self.params, self.embedding.weight
        return p.entropy_weight * entropy_penalty(vectors, codes, p.lookup, p.entropy_temperature)

    def published_codes(self) -> Float[Tensor, "v c"]:
        """The codes themselves; raises ValueError where they are looked up otherwise."""
        if self.lookup != "euclidean":
            raise ValueError(
                "codebook `vq` was trained with `lookup: cosine`, and who reads the published "
                "layout looks codes up by distance (train with `lookup: euclidean` to export)"
            )
        return self.embedding.weight.detach()

    @torch.no_grad()
    def seed(self, vectors: Float[Tensor, "n c"], group: int, num_groups: int) -> None:
        """Put the group's share of the codes on its vectors (k-means); `init: data` only.

        Groups come in order. The codes of the groups still to come repeat this one's meanwhile, so
        that `nearest` never finds a code that is about to move. Raises ValueError for vectors that
        are fewer than the group's codes, or not finite.
        """
        start, stop = (self.vocab_size * g // num_groups for g in (group, group + 1))
        if self.params.init != "data" or start == stop:
            return
        num = stop - start
        if len(vectors) < num:
            raise ValueError(
                f"scale {group + 1} has {len(vectors)} vectors for {num} codes: initialise from "
                f"at least {ceil(num / len(vectors))} times as many training images, lower "
                "vocab_size, or set codebook.init: uniform"
            )
        if not vectors.isfinite().all():
            raise ValueError(
                f"scale {group + 1} has vectors that are not finite: the autoencoder gives NaN or "
                "infinite features for training images (are its weights, and the images, finite?)"
            )
        with sandbox.exact_float32(vectors.device):
            centers = cluster(vectors.float(), num, self.lookup, group)
        num_rows = self.vocab_size - start
        self.embedding.weight[start:] = centers.repeat(ceil(num_rows / num), 1)[:num_rows]

    @torch.no_grad()
    def observe(self, vectors: Sequence[Tensor], ids: Sequence[Tensor]) -> None:
        """Take note of one training batch: per group, its vectors (`n c`) and their ids (`n`).

        Called more than once before `after_step` (a batch in pieces), the pieces count the same.
        """
        weights, share = self._row_weights([len(rows) for rows in ids])
        rows, found = torch.cat([*ids]), torch.zeros_like(self.usage)
        noted = [found.index_add_(0, rows, weights).mul_(share)]
        if self.params.update == "ema":
            every = torch.cat([*vectors]).float() * weights[:, None]
            sums = torch.zeros_like(self.embedding.weight).index_add_(0, rows, every)
            noted.append(sums.mul_(share))
        for before, more in zip(self._noted, noted, strict=False):
            more.add_(before)
        self._noted, self._num_noted = noted, self._num_noted + 1
        self._vectors = [group.detach() for group in vectors]

    @torch.no_grad()
    def after_step(
        self, optimizer: torch.optim.Optimizer, progress: float, rng: torch.Generator
    ) -> Mapping[str, float | Tensor]:
        """Move averages and restart dead codes; does not wait for the device.

        Returns `codes_alive`, the share of the codes whose usage, less what was assumed at the
        start, is above the threshold, and `codes_restarted`, how many were moved in this step.
        """
        if not self._noted:
            return {}
        noted = [each / self._num_noted for each in self._noted]
        sandbox.all_reduce_mean_(noted)
        if self._step is None:  # waits for the device once after loading
            self._step = int(self.num_steps)
        p, step = self.params, self._step + 1
        self.num_steps += 1
        self.usage.lerp_(noted[0], 1 - p.decay)
        if p.update == "ema":
            self._average(*noted)
        # Usage began at 1, which was only assumed. Less what is left of that, a code that is never
        # chosen shows at once; no code has less left (a decay may have changed on the way).
        assumed = self.usage.min().clamp(max=p.decay**step)
        dead = self.usage - assumed < p.restart_threshold * (1 - assumed)
        scalars: dict[str, float | Tensor] = {
            "codes_alive": 1 - dead.float().mean(),
            "codes_restarted": 0.0,
        }
        if p.restart and progress < p.restart_until and step % p.restart_every == 0:
            self._restart(dead, optimizer, rng)
            scalars["codes_restarted"] = dead.float().sum()
        self._noted, self._num_noted, self._vectors, self._step = [], 0, [], step
        return scalars

    def _row_weights(self, lens: Sequence[int]) -> tuple[Tensor, float]:
        """What each row counts, over what a row of the largest group does; and what that counts.

        Kept from call to call. The largest group adds up whole numbers, which is exact.
        """
        key = (*lens, self.usage.device)
        if self._weights is None or self._weights[0] != key:
            even = self.params.balance == "tokens"
            rows = [self.usage.new_full((n,), 1.0 if even else max(lens) / n) for n in lens]
            total = sum(lens) if even else len(lens) * max(lens)
            self._weights = key, torch.cat(rows), self.vocab_size / total
        return self._weights[1], self._weights[2]

    def _average(self, counts: Float[Tensor, " v"], sums: Float[Tensor, "v c"]) -> None:
        """Move codes towards the means of their vectors.

        With N' = decay N + (1 - decay) n and m' = decay m + (1 - decay) s, the code m' / N' is the
        old one plus (1 - decay) (s - n code) / N'. Nothing but N has to be kept.
        """
        weight = self.embedding.weight
        pull = (sums - counts[:, None] * weight) / self.usage.clamp(min=1e-20)[:, None]
        weight.add_(pull, alpha=1 - self.params.decay)

    def _restart(
        self, dead: Tensor, optimizer: torch.optim.Optimizer, rng: torch.Generator
    ) -> None:
        """Move the codes where `dead` onto vectors drawn from the batch: a group, then a vector."""
        num, device, weight = self.vocab_size, self.usage.device, self.embedding.weight
        groups = self._vectors
        if self.params.balance == "tokens":
            groups = [torch.cat(groups)]
        drawn = torch.stack(
            [
                vectors[torch.randint(len(vectors), (num,), generator=rng, device=device)]
                for vectors in groups
            ]
        ).float()
        picks = torch.randint(len(drawn), (num,), generator=rng, device=device)
        rows = drawn[picks, torch.arange(num, device=device)]
        noise = torch.randn(rows.shape, generator=rng, device=device)
        rows += 0.01 * rows.std(correction=0) * noise
        sandbox.broadcast_([rows])
        weight.copy_(torch.where(dead[:, None], rows, weight))
        self.usage.masked_fill_(dead, 1.0)
        for moment in optimizer.state.get(weight, {}).values():
            if isinstance(moment, Tensor) and moment.shape == weight.shape:
                moment.masked_fill_(dead[:, None], 0.0)


def _lookup_of(cosine: bool) -> Lookup:
    return "cosine" if cosine else "euclidean"


def _forget(codebook: VQ, _: object = None) -> None:
    """Drop what stands between observe() and after_step(), and the step last seen."""
    codebook._noted: list[Tensor] = []  # counts, and sums where codes are averages
    codebook._num_noted = 0
    codebook._vectors: list[Tensor] = []
    codebook._step: int | None = None
