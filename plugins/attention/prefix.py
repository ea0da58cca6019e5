"""The backend that asks for no mask where none is needed: steps one by one, each with its prefix.

The one idea to hold: a query of a step sees all keys up to the end of that step, so a large step is
a call without a mask, with the fastest kernels there are and no score computed to be hidden.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sandbox import Mask

from .kernels import CudnnAttention
from .plain import SdpaAttention, dot_product, request_of, step_pattern

LARGE = 64
"""Tokens from which on a step is worth a call of its own; smaller neighbours share one."""


class Group(NamedTuple):
    """Neighbouring steps that share a call: their queries, which see no key from `stop` on."""

    start: int
    stop: int
    masked: bool


class PrefixAttention(SdpaAttention):
    """Under a mask of steps, one call a large step, whose keys are those up to its end.

    Small steps, before, between or after, share masked calls. Other calls, and those of small steps
    alone, are `sdpa`'s. Within compiled code it runs as it is: the compiler thinks otherwise than
    cuDNN of where the gradients of parts of a tensor lie.
    """

    @torch.compiler.disable
    def compute(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> Tensor:
        if mask.kind != "steps" or mask.step_lens is None or max(mask.step_lens) < LARGE:
            return super().compute(q, k, v, mask, scale)
        groups = groups_of(mask.step_lens)
        queries = q.split([group.stop - group.start for group in groups], dim=2)
        stops = [group.stop for group in groups]
        seen = [
            self._piece(*tensors, group, mask.step_lens, scale)
            for group, *tensors in zip(
                groups, queries, _prefixes(k, stops), _prefixes(v, stops), strict=True
            )
        ]
        return torch.cat(seen, dim=2)

    def _piece(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        group: Group,
        step_lens: tuple[int, ...],
        scale: float,
    ) -> Tensor:
        if group.masked:
            pattern = step_pattern(step_lens, q.device)[group.start : group.stop, : group.stop]
            return dot_product(q, k, v, attn_mask=pattern, scale=scale)
        fastest = CudnnAttention(self.params)
        if fastest.limit(request_of(q, k, v, Mask())) is None:
            return fastest.compute(q, k, v, Mask(), scale)
        return super().compute(q, k, v, Mask(), scale)


def groups_of(step_lens: Sequence[int]) -> list[Group]:
    """The calls, in order: a large step each, and small neighbours together."""
    groups: list[Group] = []
    stop, small_before = 0, False
    for length in step_lens:
        small, start = length < LARGE, stop
        stop += length
        if small and small_before:
            groups[-1] = Group(groups[-1].start, stop, masked=True)
        else:
            groups.append(Group(start, stop, masked=False))
        small_before = small
    return groups


def _prefixes(x: Tensor, stops: Sequence[int]) -> Sequence[Tensor]:
    """The first so many tokens of `b heads n e`, for each stop; the last stop is `n`."""
    if not x.requires_grad:
        return [x[:, :, :stop] for stop in stops]
    return _Prefixes.apply(x, tuple(stops))


class _Prefixes(torch.autograd.Function):
    """By itself autograd would fill a tensor with zeros for every prefix, and add them all up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stops: tuple[int, ...]) -> tuple[Tensor, ...]:
        ctx.stops = stops
        return tuple(x[:, :, :stop] for stop in stops)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[-1].clone()
        for stop, gradient in zip(ctx.stops[:-1], gradients[:-1], strict=True):
            total[:, :, :stop] += gradient
        return total, None
