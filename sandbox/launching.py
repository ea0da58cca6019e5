"""How Triton kernels that follow one another do so without a gap, on GPUs that can.

The one idea to hold: a kernel's programs may start while the kernel before still runs, as long as
each of them waits for its end before it reads or writes anything. As every program waits, the end
of one kernel is the end of all before it, too; so no order changes but that of starting.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

_allowed = True


def overlapping(device: torch.device) -> dict[str, bool]:
    """The arguments that let a Triton kernel start while the one before it on `device` still runs.

    For a kernel with a constexpr OVERLAPS. Where that is true, all of its programs have to call
    `tl.extra.cuda.gdc_wait()` before they read or write memory, and then
    `gdc_launch_dependents()`, by which the next kernel may start: called before, all that follow
    would start at once, and take one another's room. It is false before compute capability 9,
    without a Triton that knows of it, and within `one_by_one`.
    """
    return (
        {"OVERLAPS": True, "launch_pdl": True}
        if _allowed and _able(device)
        else {"OVERLAPS": False}
    )


@contextmanager
def one_by_one() -> Iterator[None]:
    """Within, what is launched or recorded starts when the kernel before is done, in all threads.

    To measure what overlapping is worth; what was recorded before overlaps on.
    """
    global _allowed
    before, _allowed = _allowed, False
    try:
        yield
    finally:
        _allowed = before


@cache
def _able(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    if torch.cuda.get_device_capability(device) < (9, 0):
        return False
    try:
        from triton import knobs
        from triton.backends.nvidia.compiler import CUDAOptions
        from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait  # noqa: F401
    except ImportError:
        return False
    return hasattr(CUDAOptions, "launch_pdl") and not knobs.runtime.interpret
