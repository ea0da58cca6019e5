"""What laws are made of: claims in plain words, and the random values they are tried on."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def holds(condition: bool, law: str) -> None:
    """Raise AssertionError with the law's text unless it holds."""
    if not condition:
        raise AssertionError(law)


def agree(found: Tensor, expected: Tensor, law: str, tolerance: float = 1e-4) -> None:
    """Raise AssertionError unless shapes are equal and values are, up to `tolerance`."""
    torch.testing.assert_close(
        found, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{law}: {text}"
    )


def randomly(seed: int) -> torch.Generator:
    """A generator on the CPU."""
    return torch.Generator().manual_seed(seed)


def random_images(count: int, size: tuple[int, int], seed: int) -> Tensor:
    """Noise in [-1, 1]."""
    return torch.rand(count, 3, *size, generator=randomly(seed)) * 2 - 1


def learns(module: nn.Module, loss: Tensor) -> None:
    """Law: the loss is finite and its gradient reaches every trainable parameter."""
    holds(loss.ndim == 0 and bool(loss.isfinite()), f"the loss is one finite number, got {loss}")
    module.zero_grad()
    torch.autograd.backward(loss)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            reached = parameter.grad is not None and bool(parameter.grad.isfinite().all())
            holds(reached, f"a finite gradient reaches {name!r}")


def roughen(module: nn.Module, seed: int) -> None:
    """Add noise to all weights: parts that start out silent would hide what they do wrong."""
    rng = randomly(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng), alpha=0.1)


def scalars(found: Mapping[str, Any], what: str) -> None:
    """Law: names and finite numbers, as the log and the curves expect."""
    for name, value in found.items():
        number = torch.as_tensor(value)
        single = number.ndim == 0 and not number.requires_grad
        holds(
            single and bool(number.isfinite()), f"{what} gives finite scalars, got {name}={value}"
        )


def ids_lie_within(ids: Tensor, shape: tuple[int, ...], vocab_size: int, what: str) -> None:
    """Law: integers of this shape in `[0, vocab_size)`."""
    holds(not ids.is_floating_point(), f"{what} gives integers, got {ids.dtype}")
    holds(tuple(ids.shape) == shape, f"{what} gives ids of shape {shape}, got {tuple(ids.shape)}")
    low, high = int(ids.min()), int(ids.max())
    holds(
        low >= 0 and high < vocab_size, f"{what} gives ids in [0, {vocab_size}), got {low}..{high}"
    )


def images_lie_within(images: Tensor, shape: tuple[int, ...], what: str) -> None:
    """Law: images of this shape in [-1, 1]."""
    holds(tuple(images.shape) == shape, f"{what} gives {shape}, got {tuple(images.shape)}")
    holds(bool((images.abs() <= 1 + 1e-5).all()), f"{what} gives images in [-1, 1]")


def as_module(part: Any) -> nn.Module:
    """The part as the `nn.Module` that its interface says it is."""
    holds(isinstance(part, nn.Module), f"{type(part).__name__} is an nn.Module")
    module: nn.Module = part
    return module


def an_optimizer(module: nn.Module) -> torch.optim.Optimizer:
    """AdamW over a module, which may have no parameters."""
    return torch.optim.AdamW([*module.parameters(), nn.Parameter(torch.zeros(1))], lr=1e-3)
