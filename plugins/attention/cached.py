"""The backend with a kernel of our own, for drawing: a few queries, and a cache of keys and values.

The one idea to hold: it has one kernel, for all keys and no gradients, and refuses all else.
"""

from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

import sandbox
from sandbox import AttentionRequest, Mask

from .plain import SdpaAttention, kept, kernels_limit, watched


class CachedAttention(SdpaAttention):
    """A Triton kernel for drawing step by step: CUDA, no mask, no gradients, heads of 16 to 128.

    Queries, keys and values are read where they lie, slices of a longer cache included; what comes
    out lies heads beside channels. Softmax and sums are in float32, whatever the type.
    """

    def limit(self, request: AttentionRequest) -> str | None:
        if reason := kernels_limit(request, "for a cache"):
            return reason
        if request.mask.kind != "full":
            return f"the kernel for a cache hides nothing, but the mask is: {request.mask.kind}"
        if request.needs_grad:
            return "the kernel for a cache has no backward pass"
        return _untried(request.device, request.dtype, request.head_dim)

    @torch.compiler.disable
    def compute(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
        if watched():
            return super().compute(q, k, v, mask, scale)
        from . import cached_kernel

        return cached_kernel.attend(q, k, v, scale)

    def attend_appending(
        self,
        qkv: Float[Tensor, "b n three_d"],
        past: Float[Tensor, "2 b heads l e"],
        start: int,
        scale: float,
        cosine: tuple[Float[Tensor, "1 heads 1 1"], float] | None,
    ) -> Float[Tensor, "b heads n e"] | None:
        """Attend with tokens to all before `start` in the cache `past`, and to each other.

        `qkv` are their queries, keys and values side by side, heads beside channels; keys and
        values go to the cache, from token `start` on. With `cosine`, a logarithm for each head and
        what that is capped at, queries and keys are normalised, and queries then multiplied by its
        exponential. None, with nothing written, where there is no kernel for this.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or watched():
            return None
        mask, (_, n, _), e = Mask(), qkv.shape, past.shape[-1]
        request = AttentionRequest(str(qkv.device), qkv.dtype, e, n, start + n, mask, False)
        if self.limit(request) or qkv.dtype != past.dtype or not past.is_contiguous():
            return None
        from . import cached_kernel

        if n > cached_kernel.APPENDED[qkv.dtype]:
            return None
        return cached_kernel.append(qkv, past, start, scale, cosine)


@kept
def _untried(device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """What a trial says: triton may be missing, or the compiler that it needs."""

    def trial() -> ModuleType:
        from . import cached_kernel

        x = torch.zeros(1, 1, 1, head_dim, dtype=dtype, device=device)
        cached_kernel.attend(x, x, x, 1.0)
        new = cached_kernel.APPENDED[dtype]
        past = torch.zeros(2, 1, 1, new + 1, head_dim, dtype=dtype, device=device)
        cached_kernel.append(past.new_zeros(1, new, 3 * head_dim), past, 1, 1.0, None)
        return cached_kernel

    if sandbox.tried(trial, "attention over a cache without its Triton kernel") is None:
        return "triton is not there, or cannot build the kernel for a cache"
    return None
