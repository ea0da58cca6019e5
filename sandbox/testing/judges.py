"""Laws of what judges reconstructions: image losses and adversaries."""

import math
from collections.abc import Callable

import torch
from torch import nn

from sandbox.judges import Adversary, ImageLoss
from sandbox.testing.claims import as_module, holds, learns, random_images, scalars


def image_loss_law(image_loss: ImageLoss, size: tuple[int, int] = (32, 32), seed: int = 0) -> None:
    """Least for equal images, larger for others, with gradients to them and to nothing else."""
    prepare: Callable[..., None] = getattr(image_loss, "prepare", lambda *_: None)
    prepare(size, 3)
    images, others = random_images(2, size, seed), random_images(2, size, seed + 1).requires_grad_()
    none, some = image_loss.loss(images, images), image_loss.loss(others, images)
    holds(none.ndim == some.ndim == 0, "loss is one number")
    holds(0 <= float(none.detach()) < float(some.detach()) < math.inf, "equal images lose least")
    torch.autograd.backward(some)
    gradient = others.grad
    holds(gradient is not None and bool(gradient.isfinite().all()), "gradients are finite")
    holds(gradient is not None and bool(gradient.any()), "gradients reach the images")
    if isinstance(image_loss, nn.Module):
        untouched = all(parameter.grad is None for parameter in image_loss.parameters())
        holds(untouched, "gradients reach no weights: an image loss is not trained")
        again = image_loss.train().loss(others, images)
        holds(torch.equal(some, again), "training mode does not change the loss")


def adversary_law(adversary: Adversary, size: tuple[int, int] = (32, 32), seed: int = 0) -> None:
    """Each side's loss has gradients to that side alone, and none before the adversary begins."""
    network = as_module(adversary.network).train()
    fake, real = (random_images(2, size, seed + i).requires_grad_() for i in range(2))
    holds(adversary.begins(1.0), "the adversary takes part by the end of the training")
    holds(0 < adversary.learning_rate_factor < math.inf, "learning_rate_factor is positive")
    if not adversary.begins(0.0):
        for losses in (adversary.deceive, adversary.discriminate):
            early = losses(fake, real, 0.0).total
            holds(early.ndim == 0 and not early.requires_grad, "no pass before it begins")
            holds(not early.any(), "both losses are zero before it begins")
    deceived = adversary.deceive(fake, real, 1.0)
    holds(deceived.total.ndim == 0, "deceive gives one number")
    scalars(deceived.parts, "the parts of deceive")
    torch.autograd.backward(deceived.total)
    own = fake.grad
    holds(own is not None and bool(own.isfinite().all()), "deceive has finite gradients")
    holds(own is not None and bool(own.any()), "the gradient of deceive reaches what is fake")
    spared = [real.grad, *(parameter.grad for parameter in network.parameters())]
    holds(all(grad is None for grad in spared), "the gradient of deceive reaches nothing else")
    _weight_law(adversary, torch.ones_like(real), torch.ones_like(real) if own is None else own)
    fake.grad = None
    judged = adversary.discriminate(fake, real, 1.0)
    learns(network, judged.total)
    scalars(judged.parts, "the parts of discriminate")
    holds(fake.grad is None and real.grad is None, "discriminate trains its network alone")


def _weight_law(adversary: Adversary, loss_gradient: torch.Tensor, own: torch.Tensor) -> None:
    for one in (loss_gradient, 0 * loss_gradient):
        for other in (own, 1e-20 * own, 0 * own):
            weight = adversary.weight(one, other, 1.0)
            holds(weight.ndim == 0 and not weight.requires_grad, "weight is one number")
            holds(0 <= float(weight) < math.inf, f"weight is finite and not negative, got {weight}")
