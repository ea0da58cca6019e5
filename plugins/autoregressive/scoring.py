"""The mean loss of tokens whose logits are too many to be held at once.

The one idea to hold: below a mean, what comes back in the backward pass is one number for all
tokens. So the gradients of a few images are made right after their logits, which are then let go,
and the backward pass only multiplies them (as in the Liger kernels, arXiv 2410.10989).
"""

from collections.abc import Callable, Sequence
from itertools import starmap
from math import frexp
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable


class Scores(NamedTuple):
    """How wrong the tokens are in the mean and each, and whose id was thought the likeliest."""

    total: Float[Tensor, ""]
    losses: Float[Tensor, "b l"]
    right: Bool[Tensor, "b l"]


def scores(
    score: Callable[..., tuple[Tensor, Tensor]],
    size: int,
    ids: Int[Tensor, "b l"],
    features: Sequence[Tensor],
) -> Scores:
    """The losses and right ids that `score(ids, *features)` gives, of `size` images at a time.

    The first axis of every feature is b. Gradients reach the features and every other leaf that
    `score` reads; of several pieces they do so from `total` alone.
    """
    if size >= len(ids) or not torch.is_grad_enabled():
        pieces = zip(*(x.split(size) for x in (ids, *features)), strict=True)
        losses, right = map(torch.cat, zip(*starmap(score, pieces), strict=True))
        return Scores(losses.mean(), losses, right)
    # A token's share in the mean, its powers of two later: 16 bits might lose what is so small.
    share, power = frexp(1 / ids.numel())
    scored, of_rows, of_leaves = [], [], dict[Tensor, Any]()
    apart = [x.detach().requires_grad_(x.requires_grad) for x in features]
    for some, *rows in zip(*(x.split(size) for x in (ids, *apart)), strict=True):
        losses, right, by_rows, by_leaves = _learned(score, some, rows, share)
        scored.append((losses, right))
        of_rows.append(by_rows)
        for leaf, gradient in by_leaves.items():
            of_leaves[leaf] = of_leaves.get(leaf, 0) + gradient
    losses, right = map(torch.cat, zip(*scored, strict=True))
    inputs = [*(x for x in features if x.requires_grad), *of_leaves]
    gradients = [*map(torch.cat, zip(*of_rows, strict=True)), *of_leaves.values()]
    return Scores(_Known.apply(losses.mean(), 2.0**power, gradients, *inputs), losses, right)


def _learned(
    score: Callable[..., tuple[Tensor, Tensor]],
    ids: Int[Tensor, "n l"],
    rows: Sequence[Tensor],
    share: float,
) -> tuple[Float[Tensor, "n l"], Bool[Tensor, "n l"], list[Tensor], dict[Tensor, Tensor]]:
    """What `score` says, and the gradients of that by the rows that learn and by other leaves.

    Each loss counts `share`. Gradients are out of reach of autocast, as the backward pass is.
    """
    losses, right = score(ids, *rows)
    learning = [row for row in rows if row.requires_grad]
    if not losses.requires_grad:
        return losses, right, [torch.zeros_like(row) for row in learning], {}
    inputs = [*learning, *_leaves(losses, learning)]
    with torch.autocast(losses.device.type, enabled=False):
        shares = torch.full_like(losses, share)
        gradients = torch.autograd.grad(losses, inputs, shares, allow_unused=True)
    found = dict(zip(inputs, gradients, strict=True))
    by_rows = [torch.zeros_like(x) if (g := found.pop(x)) is None else g for x in learning]
    return losses.detach(), right, by_rows, {x: g for x, g in found.items() if g is not None}


def _leaves(made: Tensor, rows: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that learn of which this was made, but not by way of the rows.

    Looked for in what autograd noted: a network has many more, and walking them all takes longer.
    """
    waiting, seen, leaves = [made.grad_fn], {None, *(row.grad_fn for row in rows)}, []
    while waiting:
        if (node := waiting.pop()) in seen:
            continue
        seen.add(node)
        if isinstance(node, torch._C._functions.AccumulateGrad):
            leaves.append(node.variable)
        waiting += (following for following, _ in node.next_functions)
    return leaves


class _Known(torch.autograd.Function):
    """A number, and its gradients by the inputs but for a factor `share`; no second ones."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, share: float, gradients: Sequence[Tensor], *inputs: Tensor
    ) -> Tensor:
        ctx.share = share
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        factor = factor * ctx.share
        return None, None, None, *(_times(gradient, factor) for gradient in ctx.saved_tensors)


def _times(gradient: Tensor, factor: Float[Tensor, ""]) -> Tensor:
    """In the gradient's type; a factor without axes would first be rounded to that."""
    factor = factor.view([1] * gradient.ndim)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient))
