"""Several processes that train one network: each sees its share of every batch.

The one idea to hold: nothing is wrapped. A process that is alone runs the same code, in which these
functions do nothing. Which processes there are is torch's affair (`torchrun`, gloo or NCCL).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from time import sleep
from typing import Any, TypeVar

import torch
import torch.distributed.nn  # before there is a group: its defaults would hold one beyond its end
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""How long processes wait for process 0, which may be scoring samples for hours."""


def rank() -> int:
    """This process's number; 0 is the one that writes, reports and samples."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are; 1 where there is no process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def process_group(size: int) -> Iterator[None]:
    """Meet the other processes that `torchrun` has started; alone (`size` 1), do nothing.

    Values on a CPU go through gloo, those on a GPU through NCCL. Where several processes fail, the
    first one's error is raised and the others end without a word (SystemExit).
    """
    if size == 1:
        yield
        return
    gpus = torch.cuda.is_available() and dist.is_nccl_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=PATIENCE)
    try:
        yield
        barrier()
    except BaseException:
        # The others wait for this one, and are ended by whoever started them.
        first = first_to_fail()
        if not gpus:  # NCCL might wait for them
            dist.destroy_process_group()
        if not first:
            raise SystemExit(1) from None
        raise
    dist.destroy_process_group()


@cache
def first_to_fail() -> bool:
    """Whether no other process has failed before; those that fail with process 0 come after it."""
    if world_size() == 1:
        return True
    if rank() > 0:
        sleep(1)
    try:
        return int(dist.distributed_c10d._get_default_store().add("failures", 1)) == 1
    except RuntimeError:  # the store is gone, and with it who kept it
        return False


@torch.no_grad()
def all_reduce_mean_(tensors: Sequence[Tensor]) -> None:
    """Put the mean over all processes in place of each tensor, in one exchange a data type.

    The tensors are floating, of any shape, and the same ones in the same order everywhere.
    """
    if world_size() == 1:
        return
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        dist.all_reduce(flat)
        flat /= world_size()
        parts = torch.split(flat, [tensor.numel() for tensor in same])
        shaped = [part.view(t.shape) for part, t in zip(parts, same, strict=True)]
        torch._foreach_copy_(same, shaped)


@torch.no_grad()
def broadcast_(tensors: Sequence[Tensor]) -> None:
    """Put process 0's values in place of each tensor."""
    if world_size() > 1:
        for tensor in tensors:
            sent = tensor.contiguous()
            dist.broadcast(sent, src=0)
            tensor.copy_(sent)


def agree(value: T) -> T:
    """Process 0's value (numbers, strings, and mappings and lists of them), on every process."""
    if world_size() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    agreed: T = box[0]
    return agreed


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.all_reduce(torch.zeros(1))  # through gloo: a GPU would be kept busy with waiting
