"""The codebook `simvq`: frozen random codes, seen through one linear layer that learns.

The one thing to hold: a gradient at one code moves the layer and thereby all codes, so none is left
behind, and there is nothing to restart.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

import sandbox

from .lookup import Lookup, nearest_codes


class SimVQ(nn.Module):
    """Codes W c_i with c_i from N(0, 1 / code_dim), frozen (SimVQ, arXiv 2411.02038)."""

    class Params(sandbox.Params):
        vocab_size: int = Field(4096, ge=2)
        """How many codes there are."""

    lookup: Lookup = "euclidean"

    def __init__(self, params: Params, code_dim: int) -> None:
        super().__init__()
        self.params, self.vocab_size, self.code_dim = params, params.vocab_size, code_dim
        self.frozen: Tensor
        self.register_buffer("frozen", torch.randn(self.vocab_size, code_dim) * code_dim**-0.5)
        self.projection = nn.Linear(code_dim, code_dim, bias=False)

    @torch.no_grad()
    def nearest(self, vectors: Float[Tensor, "n c"]) -> Int[Tensor, " n"]:
        codes = self.codes()
        with sandbox.exact_float32(vectors.device):
            return nearest_codes(vectors.float(), codes)

    def embed(self, ids: Int[Tensor, "*axes"]) -> Float[Tensor, "*axes c"]:
        return F.embedding(ids, self.codes())

    def codes(self) -> Float[Tensor, "v c"]:
        """All codes, with gradients to the layer."""
        with sandbox.exact_float32(self.frozen.device):
            return self.projection(self.frozen)

    @torch.no_grad()
    def published_codes(self) -> Float[Tensor, "v c"]:
        """The codes as a plain table, which needs neither layer nor frozen codes."""
        return self.codes()

    def seed(self, vectors: Float[Tensor, "n c"], group: int, num_groups: int) -> None:
        """Nothing: the layer finds where the data is."""

    def observe(self, vectors: Sequence[Tensor], ids: Sequence[Tensor]) -> None:
        """Nothing: all is learned by gradient."""

    def after_step(
        self, optimizer: torch.optim.Optimizer, progress: float, rng: torch.Generator
    ) -> Mapping[str, float | Tensor]:
        return {}
