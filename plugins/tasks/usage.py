"""How much of a codebook is in use, level by level (a level is one token map: a scale of VAR).

An average over levels hides a coarse scale that has collapsed: that is why nothing here is summed
over them.
"""

import torch
from jaxtyping import Int
from torch import Tensor

from sandbox import Layout

_TOO_FEW = "codebook usage needs at least one image's ids"


class CodebookUsage:
    """Counts which codes are drawn at which level, on the device the ids are on."""

    def __init__(self, layout: Layout, vocab_size: int) -> None:
        if vocab_size < 1:
            raise ValueError(f"a codebook has at least one code, got vocab_size {vocab_size}")
        self.layout, self.vocab_size = layout, vocab_size
        self._counts: Tensor | None = None  # made where the ids are: moving it there would wait

    def update(self, ids: Int[Tensor, "b l"]) -> None:
        """Take in the ids of a batch, in [0, vocab_size). Does not wait for the device.

        The counts live on the first ids' device. Raises ValueError for another sequence length.
        """
        if ids.ndim != 2 or ids.shape[1] != self.layout.seq_len:
            raise ValueError(
                f"ids {tuple(ids.shape)} do not fit a layout of {self.layout.seq_len} tokens"
            )
        if self._counts is None:
            size = self.layout.seq_len, self.vocab_size
            self._counts = torch.zeros(size, dtype=torch.int64, device=ids.device)
        ids = ids.long().T  # bincount and index_put_ would wait for the device; a scatter does not
        self._counts.scatter_add_(1, ids, torch.ones_like(ids))

    def compute(self) -> dict[str, list[float]]:
        """One number a level, first level first, under each of these names.

        `draws`: tokens counted. `used_codes`: codes drawn at least once. `usage`: their share of
        the codes that could have been drawn, min(vocabulary, draws), in (0, 1]. `entropy_nats`: of
        the distribution of the draws. `perplexity`: exp of it, in [1, used_codes].
        Raises ValueError before the first update.
        """
        counts = torch.zeros(self.layout.num_levels, self.vocab_size, dtype=torch.float64)
        counts.index_add_(0, self.layout.level_of(), self._seen().double().cpu())
        draws = counts.sum(dim=1)
        if not draws.all():
            raise ValueError(_TOO_FEW)
        share = counts / draws[:, None]
        entropy = -torch.special.xlogy(share, share).sum(dim=1)
        used = (counts > 0).double().sum(dim=1)
        return {
            "draws": draws.tolist(),
            "used_codes": used.tolist(),
            "usage": (used / draws.clamp(max=self.vocab_size)).tolist(),
            "entropy_nats": entropy.tolist(),
            "perplexity": entropy.exp().tolist(),
        }

    def dead_codes(self) -> int:
        """How many codes were drawn at no level. Raises ValueError before the first update."""
        return int((self._seen().sum(dim=0) == 0).sum())

    def _seen(self) -> Tensor:
        if self._counts is None:
            raise ValueError(_TOO_FEW)
        return self._counts


def usage_rows(layout: Layout, usage: CodebookUsage) -> list[dict[str, float]]:
    """What `usage` counted as one row a level, for results and reports; scales count from 1."""
    found, rows = usage.compute(), []
    for level in range(layout.num_levels):
        step = layout.steps[layout.level_of_step.index(level)]
        rows.append(
            {
                "scale": level + 1,
                "tokens": step.height * step.width,
                "used": int(found["used_codes"][level]),
                "usage": round(found["usage"][level], 4),
                "perplexity": round(found["perplexity"][level], 2),
                "entropy": round(found["entropy_nats"][level], 3),
            }
        )
    return rows
