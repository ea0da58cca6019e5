"""The backends with kernels of their own: cuDNN, xformers and FlexAttention.

Each turns the description of a mask into what its kernels read, once for all layers of a model.
"""

import ctypes
import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from sandbox import AttentionRequest, Mask

from .plain import Attention, SdpaAttention, dot_product, kept, watched


class CudnnAttention(SdpaAttention):
    """`scaled_dot_product_attention` with cuDNN's kernels and no others: CUDA, 16 bits.

    By itself PyTorch takes them for some calls on some GPUs only. Which calls they are for is asked
    of PyTorch.
    """

    def limit(self, request: AttentionRequest) -> str | None:
        if torch.device(request.device).type != "cuda":
            return f"cuDNN attends on CUDA devices only, not on {request.device}"
        if request.dtype not in (torch.float16, torch.bfloat16):
            return f"cuDNN has attention in 16 bits only, not in {request.dtype}"
        return _cudnn_limit(
            request.device,
            request.dtype,
            (request.num_queries, request.num_keys, request.head_dim),
            request.mask.kind,
            request.needs_grad,
        )

    def compute(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return super().compute(q, k, v, mask, scale)


class XformersAttention(Attention):
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
        q, k, v = (_channels_together(x.transpose(1, 2)) for x in (q, k, v))
        out = ops.memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale)
        return out.transpose(1, 2)


class FlexAttention(Attention):
    """FlexAttention: kernels that skip the blocks of 128 x 128 scores in which all is hidden.

    On CUDA it is compiled at the first call of each shape (seconds). On a CPU it is the unfused
    form without a backward pass: good for checking, not for speed. Where nothing is hidden, as in
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
            return dot_product(q, k, v, scale=scale)
        if mask.kind == "dense":
            blocks = _dense_blocks(mask.to_tensor(q.device))
        else:
            blocks = _step_blocks(mask.step_lens, q.device)
        from torch.nn.attention.flex_attention import flex_attention

        if q.device.type == "cuda" and watched():
            # Nothing is compiled while a mode watches every operation; unfused it has no gradients.
            return SdpaAttention.compute(self, q, k, v, mask, scale)
        if q.device.type == "cuda":
            with torch._dynamo.config.patch(recompile_limit=256):  # beyond it would be unfused
                return _compiled_flex()(q, k, v, block_mask=blocks, scale=scale)
        with warnings.catch_warnings():  # it asks to be compiled, which would not help here
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
            return flex_attention(q, k, v, block_mask=blocks, scale=scale)


@kept
def _step_bias(
    step_lens: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> Float[Tensor, "n p"]:
    return _bias(Mask(step_lens).to_tensor(device), dtype)


def _bias(allowed: Bool[Tensor, "n p"], dtype: torch.dtype) -> Float[Tensor, "n p"]:
    """0 where a query may look, -inf elsewhere; rows start at multiples of 8 elements in memory."""
    n, p = allowed.shape
    padded = torch.zeros(n, (p + 7) // 8 * 8, dtype=dtype, device=allowed.device)
    return padded[:, :p].masked_fill_(~allowed, -torch.inf)


def _channels_together(x: Float[Tensor, "b n heads e"]) -> Float[Tensor, "b n heads e"]:
    """All that xformers asks of where the numbers stand; a view of a larger tensor will do."""
    return x if x.stride(-1) == 1 else x.contiguous()


@kept
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
def _compiled_flex() -> Callable[..., Tensor]:
    """For one shape at a time: what a kernel is, and its speed, then depends on no call before."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@cache
def _xformers_ops() -> ModuleType:
    """`xformers.ops`. Its extension wants CUDA 12's runtime, which newer torch does not load."""
    if find_spec("nvidia") and (runtime := find_spec("nvidia.cuda_runtime")):
        for folder in runtime.submodule_search_locations or ():
            for library in Path(folder, "lib").glob("libcudart.so.12"):
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    import xformers.ops

    return xformers.ops


@kept
def _xformers_limit(
    device: str, dtype: torch.dtype, head_dim: int, biased: bool, needs_grad: bool
) -> str | None:
    """What xformers itself says of such a call, asked with one of 8 tokens."""
    if find_spec("xformers") is None:
        return "xformers is not installed"
    try:
        fmha = _xformers_ops().fmha
    except Exception as error:  # what its compiled code was made for is not what is here
        return f"xformers cannot be loaded: {' '.join(f'{type(error).__name__}: {error}'.split())}"
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


@kept
def _cudnn_limit(
    device: str, dtype: torch.dtype, sizes: tuple[int, int, int], kind: str, needs_grad: bool
) -> str | None:
    """What PyTorch says of cuDNN for such a call, asked with one head."""
    n, p, e = sizes
    q = torch.empty(1, 1, n, e, device=device, dtype=dtype, requires_grad=needs_grad)
    k = torch.empty(1, 1, p, e, device=device, dtype=dtype, requires_grad=needs_grad)
    masked = kind in ("steps", "dense")
    mask = torch.ones(n, p, device=device, dtype=torch.bool) if masked else None
    asked = SDPAParams(q, k, k, mask, 0.0, kind == "causal", False)
    if can_use_cudnn_attention(asked):
        return None
    return f"PyTorch has no cuDNN attention for {n} queries, {p} keys, {e} channels, mask: {kind}"
