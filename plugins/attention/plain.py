"""The backends that PyTorch alone provides, and what all backends share.

`math` is the plain formula that all others are held to.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import sandbox
from sandbox import AttentionRequest, Mask

HEAD_DIMS = 16, 32, 64, 128
DTYPES = torch.float16, torch.bfloat16, torch.float32
"""What Triton kernels of our own are written for: channels of a head, and types."""


class Attention(ABC):
    """What all backends share: the request is described, checked, then computed."""

    class Params(sandbox.Params):
        """Nothing to set."""

    def __init__(self, params: sandbox.Params) -> None:
        self.params = params

    def refusal(self, request: AttentionRequest) -> str | None:
        return _ill_formed(request) or self.limit(request)

    def attend(
        self,
        q: Float[Tensor, "b heads n e"],
        k: Float[Tensor, "b heads p e"],
        v: Float[Tensor, "b heads p e"],
        mask: Mask,
        scale: float,
    ) -> Float[Tensor, "b heads n e"]:
        if reason := self.refusal(request_of(q, k, v, mask)):
            raise ValueError(f"{type(self).__name__} cannot honour this call: {reason}")
        return self.compute(q, k, v, mask, scale)

    @abstractmethod
    def limit(self, request: AttentionRequest) -> str | None:
        """Why this backend cannot honour a well-formed request."""

    @abstractmethod
    def compute(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
        """The attention itself, of a request that was not refused."""


class MathAttention(Attention):
    """The formula as it is written, in at least float32. Honours everything; the slowest."""

    def limit(self, request: AttentionRequest) -> str | None:
        return None

    def compute(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
        exact = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            scores = scale * torch.einsum("bhne,bhpe->bhnp", q.to(exact), k.to(exact))
            if (allowed := _allowed(mask, q.device)) is not None:
                scores = scores.masked_fill(~allowed, -torch.inf)
            out = torch.einsum("bhnp,bhpe->bhne", scores.softmax(dim=-1), v.to(exact))
        return out.to(v.dtype)


class SdpaAttention(Attention):
    """`torch.nn.functional.scaled_dot_product_attention`, which picks a fused kernel if it has one.

    Honours everything: where no fused kernel fits, PyTorch computes the plain formula.
    """

    def limit(self, request: AttentionRequest) -> str | None:
        return None

    def compute(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
        if mask.kind == "causal":
            return dot_product(q, k, v, is_causal=True, scale=scale)
        return dot_product(q, k, v, attn_mask=_allowed(mask, q.device), scale=scale)


def dot_product(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    """`scaled_dot_product_attention`, whose gradients are right wherever that of its output lies.

    What PyTorch plans with cuDNN it keeps by where queries, keys and values lie. The output's
    gradient has then to lie in every call as it did in the first, or all gradients are wrong.
    """
    out = F.scaled_dot_product_attention(q, k, v, **how)
    return _Laid.apply(out) if out.is_cuda and out.requires_grad else out


class _Laid(torch.autograd.Function):
    """Brings an output's gradient into the output's own order of memory."""

    @staticmethod
    def forward(ctx: Any, out: Tensor) -> Tensor:
        ctx.strides = out.stride()
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if gradient.stride() == ctx.strides:
            return gradient
        laid = gradient.new_empty_strided(gradient.shape, ctx.strides)
        return laid.copy_(gradient)


def request_of(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> AttentionRequest:
    """The description of a call."""
    return AttentionRequest(
        device=str(q.device),
        dtype=q.dtype,
        head_dim=q.shape[-1],
        num_queries=q.shape[-2],
        num_keys=k.shape[-2],
        mask=mask,
        needs_grad=torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)),
    )


def kernels_limit(request: AttentionRequest, purpose: str) -> str | None:
    """Why no Triton kernels of our own, `for steps` say, take such numbers at such a place."""
    if torch.device(request.device).type != "cuda":
        return f"the kernels {purpose} run on CUDA devices only, not on {request.device}"
    if request.dtype not in DTYPES:
        return f"there are no kernels {purpose} of {request.dtype}"
    if request.head_dim not in HEAD_DIMS:
        known = ", ".join(map(str, HEAD_DIMS))
        return f"the kernels {purpose} have heads of {known} channels, not {request.head_dim}"
    return None


def _ill_formed(request: AttentionRequest) -> str | None:
    """What is wrong with a request whoever computes it."""
    n, p, mask = request.num_queries, request.num_keys, request.mask
    if not request.dtype.is_floating_point:
        return f"attention needs floating-point numbers, got {request.dtype}"
    if mask.dense is None:
        if mask.step_lens is not None and not sum(mask.step_lens) == n == p:
            described = sum(mask.step_lens)
            return f"the mask's steps have {described} tokens, but there are {n} queries, {p} keys"
        return None
    if mask.dense.dtype != torch.bool or mask.dense.shape != (n, p):
        shape = tuple(mask.dense.shape)
        return f"a dense mask must be booleans {(n, p)}, got {mask.dense.dtype} {shape}"
    if not bool(mask.dense.any(dim=1).all()):
        return "a query of the dense mask may look at no key, so its output is undefined"
    return None


def _allowed(mask: Mask, device: torch.device) -> Bool[Tensor, "n p"] | None:
    if mask.dense is not None:
        return mask.dense.to(device)
    return None if mask.step_lens is None else step_pattern(mask.step_lens, device)


def watched() -> bool:
    """Whether in this thread something watches or fakes all operations, who knows sdpa alone."""
    return bool(_get_current_dispatch_mode_stack())


def kept(make: Callable[..., Any]) -> Callable[..., Any]:
    """Make what depends on a description only once: every layer of a model asks for the same.

    Outside inference mode, since autograd may not save a tensor that was made inside; and as a
    constant under torch.compile, which would otherwise trace how it is made, in every layer.
    """
    made = lru_cache(maxsize=64)(torch.inference_mode(False)(make))

    @torch.compiler.assume_constant_result
    @wraps(make)
    def remembered(*description: Any) -> Any:
        return made(*description)

    return remembered


@kept
def step_pattern(step_lens: tuple[int, ...], device: torch.device) -> Any:
    """Booleans `n n`, True where a query may look; None where nothing is hidden."""
    return Mask(step_lens).to_tensor(device)
