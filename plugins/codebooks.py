"""The codebook `vq`: vectors to the nearest of `vocab_size` learned codes, in float32 throughout.

The one thing to hold: a scale of one cell must count as much as a scale of 256. Every statistic
here (how often a code is used, what it moves towards, what replaces a dead one) first averages
within a group, then over the groups, or else the coarse scales end up with a handful of codes. The
second trap is the start: codes far larger than the features are never chosen and never learn, so by
default they start as features of the first batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

import sandbox

MAX_DISTANCES = 2**24
"""How many distances are held at once: 64 MiB of them."""
NUM_LLOYD_STEPS = 5


class VQ(nn.Module):
    """Codes by squared Euclidean distance (VQ-VAE, arXiv 1711.00937).

    `update: ema` moves each code towards the mean of its vectors (1711.00937, appendix A.1);
    `update: gradient` leaves that to the optimiser, as VAR's tokenizer does. Either way, codes that
    are hardly chosen any more are put where the data is.
    """

    class Params(sandbox.Params):
        vocab_size: int = Field(4096, ge=2)
        """How many codes there are."""
        init: Literal["data", "uniform", "normal"] = "data"
        """Where codes start: on features of the first training batch, each scale its share of them;
        uniform within 1 / vocab_size; or N(0, 1), which is so much larger than the features that
        all but a few codes are never chosen: it is here to show that."""
        update: Literal["ema", "gradient"] = "ema"
        """How codes learn: as a moving average of their vectors, or by gradient descent."""
        decay: float = Field(0.99, ge=0, lt=1)
        """Of the moving averages (codes and their usage), per optimiser step."""
        restart: bool = True
        """Whether rarely chosen codes are moved onto vectors of the current batch."""
        restart_every: int = Field(20, ge=1)
        """Optimiser steps between restarts."""
        restart_threshold: float = Field(0.05, ge=0, lt=1)
        """A code is restarted below this share of the mean usage."""
        restart_until: float = Field(0.7, ge=0, le=1)
        """The share of the training after which codes are left to settle."""

    def __init__(self, params: Params, code_dim: int) -> None:
        super().__init__()
        self.params, self.vocab_size, self.code_dim = params, params.vocab_size, code_dim
        self.embedding = nn.Embedding(self.vocab_size, code_dim)
        if params.init != "normal":
            nn.init.uniform_(self.embedding.weight, -1 / self.vocab_size, 1 / self.vocab_size)
        self.embedding.weight.requires_grad_(params.update == "gradient")
        self.usage: Tensor
        self.num_steps: Tensor
        self.register_buffer("usage", torch.ones(self.vocab_size))  # its mean is 1
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))
        self._noted: list[tuple[Tensor, Tensor]] = []  # between observe() and after_step()
        self._vectors: Sequence[Tensor] = ()
        self.register_load_state_dict_post_hook(_forget)

    @torch.no_grad()
    def nearest(self, vectors: Float[Tensor, "n c"]) -> Int[Tensor, " n"]:
        with _exact_float32(vectors.device):
            return _nearest(vectors.float(), self.embedding.weight)

    def embed(self, ids: Int[Tensor, "*axes"]) -> Float[Tensor, "*axes c"]:
        return self.embedding(ids)

    @torch.no_grad()
    def seed(self, vectors: Float[Tensor, "n c"], group: int, num_groups: int) -> None:
        """Put the group's share of the codes on its vectors (k-means); `init: data` only.

        Groups come in order. The codes of the groups still to come repeat this one's meanwhile, so
        that `nearest` never finds a code that is about to move.
        """
        if self.params.init != "data":
            return
        start, stop = (self.vocab_size * g // num_groups for g in (group, group + 1))
        if start == stop:
            return
        with _exact_float32(vectors.device):
            centers = _cluster(vectors.float(), stop - start, group)
        num_rows = self.vocab_size - start
        repeated = centers.repeat(-(-num_rows // len(centers)), 1)[:num_rows]
        self.embedding.weight[start:] = repeated

    @torch.no_grad()
    def observe(self, vectors: Sequence[Tensor], ids: Sequence[Tensor]) -> None:
        """Take note of one training batch: per group, its vectors (`n c`) and their ids (`n`).

        Called more than once before `after_step` (a batch in pieces), the pieces count the same.
        """
        counts = torch.zeros_like(self.usage)
        sums = torch.zeros_like(self.embedding.weight)
        for group_vectors, group_ids in zip(vectors, ids, strict=True):
            share = self.vocab_size / (len(ids) * len(group_ids))
            hits, total = _gather(group_vectors.float(), group_ids, self.vocab_size)
            counts.add_(hits, alpha=share)
            sums.add_(total, alpha=share)
        self._noted.append((counts, sums))
        self._vectors = vectors

    @torch.no_grad()
    def after_step(
        self, optimizer: torch.optim.Optimizer, progress: float, rng: torch.Generator
    ) -> Mapping[str, float | Tensor]:
        """Move averages and restart dead codes; does not wait for the device.

        Returns `codes_alive`, the share of the codes whose usage is above the restart threshold,
        and `codes_restarted`, how many were moved in this step.
        """
        if not self._noted:
            return {}
        counts, sums = (torch.stack(p).mean(0) for p in zip(*self._noted, strict=True))
        self._noted = []
        p, weight = self.params, self.embedding.weight
        self.num_steps += 1
        self.usage.lerp_(counts, 1 - p.decay)
        if p.update == "ema":
            # With N' = decay N + (1 - decay) n and m' = decay m + (1 - decay) s, the code m' / N'
            # is the old one plus (1 - decay) (s - n code) / N'. Nothing but N has to be kept.
            pull = (sums - counts[:, None] * weight) / self.usage.clamp(min=1e-20)[:, None]
            weight.add_(pull, alpha=1 - p.decay)
        dead = self.usage < p.restart_threshold
        scalars: dict[str, float | Tensor] = {
            "codes_alive": 1 - dead.float().mean(),
            "codes_restarted": 0.0,
        }
        if p.restart and progress < p.restart_until:
            dead &= self.num_steps % p.restart_every == 0
            self._restart(dead, optimizer, rng)
            scalars["codes_restarted"] = dead.float().sum()
        self._vectors = ()
        return scalars

    def _restart(
        self, dead: Tensor, optimizer: torch.optim.Optimizer, rng: torch.Generator
    ) -> None:
        """Move the codes where `dead` onto vectors drawn from the batch: a group, then a vector."""
        num, device, weight = self.vocab_size, self.usage.device, self.embedding.weight
        drawn = torch.stack(
            [
                vectors[torch.randint(len(vectors), (num,), generator=rng, device=device)]
                for vectors in self._vectors
            ]
        ).float()
        groups = torch.randint(len(drawn), (num,), generator=rng, device=device)
        rows = drawn[groups, torch.arange(num, device=device)]
        rows += (
            0.01 * rows.std(correction=0) * torch.randn(rows.shape, generator=rng, device=device)
        )
        weight.copy_(torch.where(dead[:, None], rows, weight))
        self.usage.masked_fill_(dead, 1.0)
        for moment in optimizer.state.get(weight, {}).values():
            if isinstance(moment, Tensor) and moment.shape == weight.shape:
                moment.masked_fill_(dead[:, None], 0.0)


def _forget(codebook: VQ, _: object) -> None:
    codebook._noted, codebook._vectors = [], ()


def _nearest(vectors: Float[Tensor, "n c"], codes: Float[Tensor, "v c"]) -> Int[Tensor, " n"]:
    norms = codes.square().sum(1)
    ids = []
    for rows in vectors.split(max(1, MAX_DISTANCES // len(codes))):
        squares = rows.square().sum(1, keepdim=True) + norms
        ids.append(torch.addmm(squares, rows, codes.T, alpha=-2).argmin(1))
    return torch.cat(ids)


def _cluster(vectors: Float[Tensor, "n c"], num: int, salt: int) -> Float[Tensor, "num c"]:
    """`num` centers of the vectors: evenly drawn, then a few k-means (Lloyd) steps."""
    rng = torch.Generator().manual_seed(salt)  # the same on every device
    order = torch.randperm(len(vectors), generator=rng)
    picks = order.repeat(-(-num // len(order)))[:num].to(vectors.device)
    centers = vectors[picks]
    if num > len(vectors):  # duplicates part ways
        noise = torch.randn(centers.shape, generator=rng).to(vectors.device)
        return centers + 0.01 * vectors.std(correction=0) * noise
    for _ in range(NUM_LLOYD_STEPS):
        ids = _nearest(vectors, centers)
        counts, sums = _gather(vectors, ids, num)
        means = sums / counts.clamp(min=1)[:, None]
        centers = torch.where(counts[:, None] > 0, means, centers)
    return centers


def _gather(
    vectors: Float[Tensor, "n c"], ids: Int[Tensor, " n"], num: int
) -> tuple[Float[Tensor, " num"], Float[Tensor, "num c"]]:
    """How many vectors have each id, and their sum."""
    counts, sums = vectors.new_zeros(num), vectors.new_zeros(num, vectors.shape[1])
    counts.index_add_(0, ids, vectors.new_ones(len(ids)))
    return counts, sums.index_add_(0, ids, vectors)


@contextmanager
def _exact_float32(device: torch.device) -> Iterator[None]:
    """Neither autocast nor TF32: both pick other codes (TF32 1 in 50, bfloat16 1 in 6)."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        matmul.fp32_precision = before


@sandbox.hookimpl
def sandbox_register(register: Callable[..., None]) -> None:
    register(sandbox.Codebook, "vq", VQ)
