"""Attention backends: several ways to compute `softmax(scale q k^T) v` under a mask.

The one idea to hold: a backend is handed a *description* of the mask and either honours it or
refuses the call with the reason. `math` is the plain formula that all others are held to.
"""

import ctypes
import warnings
from collections.abc import Callable
from functools import cache, lru_cache, wraps
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

import sandbox
from sandbox import AttentionRequest, Mask


@sandbox.hookimpl
def sandbox_register(register: Any) -> None:
    for name, cls in {
        "auto": AutoAttention,
        "math": MathAttention,
        "sdpa": SdpaAttention,
        "xformers": XformersAttention,
        "flex": FlexAttention,
    }.items():
        register(sandbox.AttentionBackend, name, cls)


class _Attention:
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
        if reason := self.refusal(_request(q, k, v, mask)):
            raise ValueError(f"{type(self).__name__} cannot honour this call: {reason}")
        return self.compute(q, k, v, mask, scale)

    def limit(self, request: AttentionRequest) -> str | None:
        """Why this backend cannot honour a well-formed request."""
        raise NotImplementedError

    def compute(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
        """The attention itself, of a request that was not refused."""
        raise NotImplementedError


class MathAttention(_Attention):
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


class SdpaAttention(_Attention):
    """`torch.nn.functional.scaled_dot_product_attention`, which picks a fused kernel if it has one.

    Honours everything: where no fused kernel fits, PyTorch computes the plain formula.
    """

    def limit(self, request: AttentionRequest) -> str | None:
        return None

    def compute(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
        if mask.kind == "causal":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        allowed = _allowed(mask, q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale)


class XformersAttention(_Attention):
    """`xformers.ops.memory_efficient_attention`: CUDA only; xformers is imported on first use.

    Which dtypes, head sizes and GPUs it has kernels for is asked of xformers itself. A mask becomes
    a dense bias whose rows are padded to 8 elements in memory, as its kernels need.
    """

    def limit(self, request: AttentionRequest) -> str | None:
        if torch.device(request.device).type != "cuda":
            return f"xformers computes on CUDA devices only, not on {request.device}"
        if request.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return f"xformers has no kernel for {request.dtype}"
        biased = request.mask.kind in ("steps", "dense")
        return _xformers_limit(
            request.device, request.dtype, request.head_dim, biased, request.needs_grad
        )

    @torch.compiler.disable
    def compute(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
        ops = _xformers_ops()
        b, heads, n, _ = q.shape
        bias = None
        if mask.kind == "causal":
            bias = ops.LowerTriangularMask()
        elif mask.kind == "steps":
            bias = _step_bias(mask.step_lens, q.device, q.dtype).expand(b, heads, n, -1)
        elif mask.kind == "dense":
            bias = _bias(mask.to_tensor(q.device), q.dtype).expand(b, heads, n, -1)
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        out = ops.memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale)
        return out.transpose(1, 2)


class FlexAttention(_Attention):
    """FlexAttention: kernels that skip the blocks of 128 x 128 scores in which all is hidden.

    On CUDA it is compiled at the first call of each mask (seconds). On a CPU it is the unfused form
    without a backward pass: good for checking, not for speed. Where nothing is hidden, as in
    stepwise sampling, there is no block to skip: such calls go to `scaled_dot_product_attention`.
    """

    def limit(self, request: AttentionRequest) -> str | None:
        if request.mask.kind == "full":
            return None
        kind = torch.device(request.device).type
        if kind not in ("cpu", "cuda"):
            return f"FlexAttention is not offered on {request.device}"
        if kind == "cpu" and request.needs_grad:
            return "FlexAttention has no backward pass on a CPU"
        if kind == "cuda" and request.head_dim < 16:
            return f"FlexAttention needs heads of at least 16 channels, got {request.head_dim}"
        if kind == "cuda" and request.dtype == torch.float64:
            return "FlexAttention has no float64 kernel"
        return None

    @torch.compiler.disable  # it compiles itself
    def compute(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
        if mask.kind == "full":
            return F.scaled_dot_product_attention(q, k, v, scale=scale)
        if mask.kind == "dense":
            blocks = _dense_blocks(mask.to_tensor(q.device))
        else:
            blocks = _step_blocks(mask.step_lens, q.device)
        with warnings.catch_warnings():  # on a CPU it asks to be compiled, which would not help
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
            return _flex(q.device.type)(q, k, v, block_mask=blocks, scale=scale)


class AutoAttention(_Attention):
    """The first of `sdpa`, `math` that does not refuse: fixed, not measured, so runs repeat.

    `sdpa` refuses nothing, so it is what `auto` means today. It was also the fastest on an H200 in
    bfloat16, forward and backward, under the published masks of 680 and of 2240 tokens.
    """

    def __init__(self, params: sandbox.Params) -> None:
        super().__init__(params)
        self.backends = [cls(cls.Params()) for cls in (SdpaAttention, MathAttention)]

    def limit(self, request: AttentionRequest) -> str | None:
        return None if self._chosen(request) else "neither sdpa nor math can"

    def compute(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
        backend = self._chosen(_request(q, k, v, mask))
        assert backend is not None, "compute() follows a refusal of None"
        return backend.compute(q, k, v, mask, scale)

    def _chosen(self, request: AttentionRequest) -> _Attention | None:
        willing = (backend for backend in self.backends if backend.limit(request) is None)
        return next(willing, None)


def _request(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> AttentionRequest:
    return AttentionRequest(
        device=str(q.device),
        dtype=q.dtype,
        head_dim=q.shape[-1],
        num_queries=q.shape[-2],
        num_keys=k.shape[-2],
        mask=mask,
        needs_grad=torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)),
    )


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
    return None if mask.step_lens is None else _step_pattern(mask.step_lens, device)


def _kept(make: Callable[..., Any]) -> Callable[..., Any]:
    """Make what depends on a description only once: every layer of a model asks for the same.

    Outside inference mode, since autograd may not save a tensor that was made inside; and as a
    constant under torch.compile, which would otherwise trace how it is made, in every layer.
    """
    made = lru_cache(maxsize=16)(torch.inference_mode(False)(make))

    @torch.compiler.assume_constant_result
    @wraps(make)
    def kept(*description: Any) -> Any:
        return made(*description)

    return kept


@_kept
def _step_pattern(step_lens: tuple[int, ...], device: torch.device) -> Bool[Tensor, "n p"] | None:
    return Mask(step_lens).to_tensor(device)


@_kept
def _step_bias(
    step_lens: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> Float[Tensor, "n p"]:
    return _bias(Mask(step_lens).to_tensor(device), dtype)


def _bias(allowed: Bool[Tensor, "n p"], dtype: torch.dtype) -> Float[Tensor, "n p"]:
    """0 where a query may look, -inf elsewhere; rows start at multiples of 8 elements in memory."""
    n, p = allowed.shape
    padded = torch.zeros(n, (p + 7) // 8 * 8, dtype=dtype, device=allowed.device)
    return padded[:, :p].masked_fill_(~allowed, -torch.inf)


@_kept
def _step_blocks(step_lens: tuple[int, ...], device: torch.device) -> Any:
    lens = torch.tensor(step_lens, device=device)
    step = torch.repeat_interleave(torch.arange(len(step_lens), device=device), lens)
    return _blocks(lambda b, h, n, p: step[n] >= step[p], len(step), len(step), device)


def _dense_blocks(allowed: Bool[Tensor, "n p"]) -> Any:
    return _blocks(lambda b, h, n, p: allowed[n, p], *allowed.shape, allowed.device)


def _blocks(visible: Callable[..., Tensor], n: int, p: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(visible, None, None, n, p, device=device)


@cache
def _flex(device_type: str) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if device_type == "cuda" else flex_attention


@cache
def _xformers_ops() -> ModuleType:
    """`xformers.ops`. Its extension wants CUDA 12's runtime, which newer torch does not load."""
    if find_spec("nvidia") and (runtime := find_spec("nvidia.cuda_runtime")):
        for folder in runtime.submodule_search_locations or ():
            for library in Path(folder, "lib").glob("libcudart.so.12"):
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    import xformers.ops

    return xformers.ops


@_kept
def _xformers_limit(
    device: str, dtype: torch.dtype, head_dim: int, biased: bool, needs_grad: bool
) -> str | None:
    """What xformers itself says of such a call, asked with one of 8 tokens."""
    if find_spec("xformers") is None:
        return "xformers is not installed"
    fmha = _xformers_ops().fmha
    q = torch.empty(1, 8, 1, head_dim, device=device, dtype=dtype)
    bias = torch.empty(1, 1, 8, 8, device=device, dtype=dtype) if biased else None
    inputs = fmha.Inputs(q, q, q, attn_bias=bias, scale=1.0)
    reasons: list[str] = []
    for kernels in (fmha.flash, fmha.cutlass):
        reasons = kernels.FwOp.not_supported_reasons(inputs)
        if needs_grad:
            reasons = reasons + kernels.BwOp.not_supported_reasons(inputs)
        if not reasons:
            return None
    return f"xformers ({kernels.FwOp.NAME}): " + "; ".join(dict.fromkeys(reasons))
