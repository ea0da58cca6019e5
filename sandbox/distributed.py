"""Several processes that train one network: each sees its share of every batch.

The one idea to hold: nothing is wrapped. A process that is alone runs the same code, in which these
functions do nothing. Which processes there are is torch's affair (`torchrun`, gloo or NCCL).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist


def rank() -> int:
    """This process's number; 0 is the one that writes, reports and samples."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are; 1 where there is no process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@torch.no_grad()
def all_reduce_mean_(tensors: Sequence[Tensor]) -> None:
    """Put the mean over all processes in place of each tensor, in one exchange a data type."""
    if world_size() == 1:
        return
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        dist.all_reduce(flat)
        flat /= world_size()
        for tensor, part in zip(same, torch.split(flat, [t.numel() for t in same]), strict=True):
            tensor.copy_(part.view_as(tensor))


@torch.no_grad()
def broadcast_(tensors: Sequence[Tensor]) -> None:
    """Put process 0's values in place of each tensor."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.barrier()
