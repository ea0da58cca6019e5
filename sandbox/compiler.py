"""The compiler at work: kept from telling what is harmless, and from giving up too soon.

The one thing to hold in mind: only notices that are known to be harmless are kept out, each by its
own words; whatever else the compiler says is still told.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType, ModuleType
from typing import Any

import torch

_BOUNDS = logging.getLogger("torch.utils._sympy.interp")


@contextmanager
def compiling(*, spare_memory: bool = False) -> Iterator[None]:
    """Within this context, keep out three notices, and let it go on where it would give up.

    "TensorFloat32 tensor cores ... available but not enabled": they are, by the loop, where that
    is wanted; what is compiled within `sandbox.exact_float32` goes without them on purpose.
    "The .grad attribute of a Tensor that is not a leaf": it is the compiler itself that looks.
    "failed while executing pow_by_natural": the bounds of a symbolic size grew too large to be
    computed. What matters in it is raised as well; the compiler goes on without the bounds.
    By itself it compiles one piece of code, the `forward` of a class, for no more than 8 modules.
    And by itself it keeps for the backward pass what that must have whole, even where it is cheap
    to compute again, unless `spare_memory`: activations and what is normalised, a quarter of what
    a step of VAR-d16 takes.
    """
    limits = {"recompile_limit": 256, "accumulated_recompile_limit": 4096}
    kept = {"ban_recompute_materialized_backward": not spare_memory}
    patches = torch._dynamo.config.patch(limits), torch._functorch.config.patch(kept)
    with patches[0], patches[1], warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores", UserWarning)
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor", UserWarning)
        _BOUNDS.addFilter(_is_news)
        try:
            yield
        finally:
            _BOUNDS.removeFilter(_is_news)


@contextmanager
def fastest_convolutions() -> Iterator[None]:
    """Within, cuDNN measures its kernels at the first convolution of a size, and keeps the best."""
    cudnn: Any = torch.backends.cudnn  # torch leaves its switches untyped
    before, cudnn.benchmark = cudnn.benchmark, True
    try:
        yield
    finally:
        cudnn.benchmark = before


def compiled_method(method: Any, *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """`torch.compile` of an object's method, which in a deep copy of the object is the copy's.

    Compiled as it is it would be a function bound for good: copies would compute with the weights
    of the original.
    """
    if not isinstance(method, MethodType):
        return torch.compile(method, *args, **kwargs)
    return partial(torch.compile(method.__func__, *args, **kwargs), method.__self__)


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("failed while executing pow_by_natural(")


def tried(trial: Callable[[], ModuleType], without: str) -> ModuleType | None:
    """The module of kernels that `trial` imports and runs once, or None where it cannot.

    It may not be there on this platform; or the compiler that it needs is not, or fails, of which a
    warning tells in the words of `without`.
    """
    try:
        return trial()
    except ImportError:
        return None
    except Exception as error:  # whatever compilers raise
        reason = " ".join(str(error).split())[:200]
        warnings.warn(f"{without}, so slower: {reason}", stacklevel=3)
        return None
