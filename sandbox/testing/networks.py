"""Laws of what predicts ids: stepwise agrees with whole, and nothing looks ahead."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sandbox.interfaces import AttentionBackend, Backbone, Generator, Sampler
from sandbox.judges import Objective
from sandbox.layout import Layout, Mask
from sandbox.sampling import guided
from sandbox.testing.claims import (
    agree,
    as_module,
    holds,
    ids_lie_within,
    images_lie_within,
    learns,
    random_images,
    randomly,
    roughen,
    scalars,
)
from sandbox.values import AttentionRequest, Tokens


def attention_law(
    backend: AttentionBackend,
    mask: Mask,
    num_queries: int,
    num_keys: int,
    *,
    heads: int = 2,
    head_dim: int = 16,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    needs_grad: bool = True,
    tolerance: float = 1e-4,
) -> str | None:
    """Equal to the formula in float64, forward and backward; or refused, which is returned.

    The tensors stand in memory as networks have them: heads beside channels, and keys and values at
    the beginning of a longer cache. None is changed, nor is any random state.
    """
    q, k, v, pull = _attended((num_queries, num_keys), heads, head_dim, seed, device, dtype)
    for x in (q, k, v):
        x.requires_grad_(needs_grad)
    request = AttentionRequest(
        str(q.device), dtype, head_dim, num_queries, num_keys, mask, needs_grad
    )
    reason = backend.refusal(request)
    if reason is not None:
        holds(bool(str(reason).strip()), "a refusal says why")
        try:
            backend.attend(q, k, v, mask, 0.3)
        except ValueError:
            return reason
        raise AssertionError(f"attend refuses with ValueError what refusal() refuses: {reason}")
    before, state = [x.detach().clone() for x in (q, k, v)], _random_state(q.device)
    if rehearse := getattr(backend, "rehearse", None):
        holds(rehearse(q, k, v, mask, 0.3) is None, "rehearse gives nothing")
    out = backend.attend(q, k, v, mask, 0.3)
    again = backend.attend(q, k, v, mask, 0.3)
    holds(out.dtype == dtype, f"the output's type is that of the values, got {out.dtype}")
    holds(torch.equal(out, again), "the same call gives the same numbers")
    holds(all(map(torch.equal, (q, k, v), before)), "attend leaves what it is given as it was")
    holds(all(map(torch.equal, _random_state(q.device), state)), "attend draws no random number")
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    scores = 0.3 * exact[0] @ exact[1].mT
    if (allowed := mask.to_tensor(device)) is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    expected = scores.softmax(-1) @ exact[2]
    agree(out.double(), expected, "the output is that of the formula", tolerance)
    if needs_grad:
        found = torch.autograd.grad(out, (q, k, v), pull)
        wanted = torch.autograd.grad(expected, exact, pull.double())
        for name, one, other in zip("qkv", found, wanted, strict=True):
            agree(one.double(), other, f"the gradient of {name} is that of the formula", tolerance)
    return None


def _attended(
    lens: tuple[int, int], heads: int, head_dim: int, seed: int, device: str, dtype: torch.dtype
) -> list[Tensor]:
    """Queries, keys, values, and a pull on the output."""
    rng, (num_queries, num_keys) = randomly(seed), lens
    longer = (2, heads, num_keys + 3, head_dim)
    q, pull = (torch.randn(2, num_queries, heads, head_dim, generator=rng) for _ in range(2))
    k, v = (torch.randn(longer, generator=rng) for _ in range(2))
    q, k, v, pull = (x.to(device, dtype) for x in (q, k, v, pull))
    return [q.transpose(1, 2), k[:, :, :num_keys], v[:, :, :num_keys], pull.transpose(1, 2)]


def _random_state(device: torch.device) -> list[Tensor]:
    """The CPU's, and that of this one GPU."""
    own = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *own]


def backbone_law(backbone: Backbone, tokens: Tokens, seed: int = 0) -> None:
    """Stepwise logits are the whole ones; no later step moves an earlier logit."""
    module, layout, rng = as_module(backbone), tokens.layout, randomly(seed)
    roughen(module, seed)
    contexts = torch.randn(2, layout.seq_len, tokens.code_dim, generator=rng)
    contexts[:, layout.spans[0]] = 0  # as every tokenizer has it
    labels = torch.tensor([0, tokens.num_classes])
    names = {name for name, _ in module.named_parameters()}
    unknown = sorted(backbone.no_weight_decay() - names)
    holds(not unknown, f"no_weight_decay names parameters that exist, got {unknown}")
    learns(module.train(), backbone.forward(contexts, labels).float().logsumexp(-1).mean())
    module.eval()
    with torch.no_grad():
        whole = backbone.forward(contexts, labels)
        holds(whole.shape == (2, layout.seq_len, tokens.vocab_size), "forward gives b l v")
        again = backbone.forward(contexts, labels)
        agree(whole, again, "in evaluation mode the logits are the same twice", 0)
        state = backbone.begin(labels)
        steps = [backbone.step(state, contexts[:, s], i) for i, s in enumerate(layout.spans)]
        agree(torch.cat(steps, 1), whole, "stepwise logits are the teacher-forced logits", 1e-3)
        rows = [backbone.forward(contexts[i : i + 1], labels[i : i + 1]) for i in range(2)]
        agree(torch.cat(rows), whole, "a batch of two is two batches of one", 1e-3)
        _halves_law(backbone, contexts, labels, whole)
        _guided_law(backbone, contexts, labels, steps)
        for span in layout.spans[1:]:
            later = contexts.clone()
            later[:, span] += 1
            moved = backbone.forward(later, labels)
            earlier = slice(0, span.start)
            agree(moved[:, earlier], whole[:, earlier], "no later step moves an earlier logit")


def _guided_law(
    backbone: Backbone, contexts: Tensor, labels: Tensor, steps: Sequence[Tensor]
) -> None:
    guided_step: Callable[..., Tensor] | None = getattr(backbone, "guided_step", None)
    if guided_step is None:
        return
    for weight in (0.0, 1.7):
        state, start = backbone.begin(labels), 0
        for index, logits in enumerate(steps):
            context = contexts[:, start : start + logits.shape[1]]
            start += logits.shape[1]
            found = guided_step(state, context, index, weight)
            agree(found, guided(logits, weight), "guided_step gives guided logits", 1e-3)


def _halves_law(backbone: Backbone, contexts: Tensor, labels: Tensor, whole: Tensor) -> None:
    features: Callable[..., tuple[Tensor, ...]] | None = getattr(backbone, "features", None)
    logits: Callable[..., Tensor] | None = getattr(backbone, "logits", None)
    if features is None or logits is None:
        return
    halves = features(contexts, labels)
    holds(all(len(half) == len(labels) for half in halves), "features have a row an image")
    rows = [logits(*(half[i : i + 1] for half in halves)) for i in range(len(labels))]
    agree(torch.cat(rows), whole, "logits of rows of the features are those of forward", 1e-3)


def sampler_law(sampler: Sampler, params: Any, seed: int = 0) -> None:
    """Ids come from the generator alone, and from the kept set where `top_k` or `top_p` says so."""
    v, impossible = 12, 3
    logits = 3 * torch.randn(2, 40, v, generator=randomly(seed))
    logits[..., impossible] = -torch.inf
    for progress in (0.0, 0.5, 1.0):
        holds(math.isfinite(sampler.guidance(progress)), "guidance is a finite number")
        before = logits.clone()
        ids = sampler.draw(logits, progress, randomly(seed))
        holds(torch.equal(logits, before), "draw leaves the logits as they were")
        ids_lie_within(ids, (2, 40), v, "draw")
        again = sampler.draw(logits, progress, randomly(seed))
        holds(torch.equal(ids, again), "the same random state gives the same ids")
        holds(bool((ids != impossible).all()), "an id whose logit is -inf is never drawn")
        likelier = logits > logits.gather(-1, ids[..., None])
        top_k = getattr(params, "top_k", 0) or v
        holds(bool((likelier.sum(-1) < top_k).all()), f"ids are of the {top_k} likeliest")
        kept = logits / getattr(params, "temperature", 1.0)
        least = kept.topk(min(top_k, v)).values[..., -1:]
        mass = kept.masked_fill(kept < least, -torch.inf).softmax(-1)
        top_p = getattr(params, "top_p", 1.0)
        within = (mass * likelier).sum(-1) < top_p + 1e-4
        holds(bool(within.all()), f"ids are of the likeliest that reach {top_p}")
        soften: Callable[..., Tensor | None] = getattr(sampler, "soften", lambda *_: None)
        weights = soften(logits, progress, randomly(seed))
        if weights is not None:
            agree(weights.sum(-1), torch.ones(2, 40), "soften gives weights that sum to one")
            holds(bool((weights >= 0).all()), "soften gives no negative weights")
            holds(not weights[..., impossible].any(), "soften gives an id of logit -inf no weight")


def objective_law(objective: Objective, layout: Layout, seed: int = 0) -> None:
    """One finite loss a token, lower for the right answer, with gradients."""
    rng, v = randomly(seed), 7
    ids = torch.randint(v, (2, layout.seq_len), generator=rng)
    logits = torch.randn(2, layout.seq_len, v, generator=rng).requires_grad_()
    losses = objective.losses(logits, ids, layout)
    holds(losses.shape == ids.shape, "losses has one loss a token, b l")
    holds(bool(losses.isfinite().all()), "losses are finite")
    rows = [objective.losses(logits[i : i + 1], ids[i : i + 1], layout) for i in range(2)]
    agree(torch.cat(rows), losses, "an image's losses do not depend on the others in its batch")
    (gradient,) = torch.autograd.grad(losses.mean(), logits)
    holds(bool(gradient.isfinite().all() and gradient.any()), "gradients reach the logits")
    right = 4 * nn.functional.one_hot(ids, v).float()
    wrong = 4 * nn.functional.one_hot((ids + 1) % v, v).float()
    better = (
        objective.losses(right, ids, layout).mean() < objective.losses(wrong, ids, layout).mean()
    )
    holds(bool(better), "the right answer has the lower loss")


def generator_law(
    generator: Generator, image_size: tuple[int, int], num_classes: int, seed: int = 0
) -> None:
    """Learns, gives images in range, the same from the same random state, and tells its steps."""
    network = generator.network
    images, labels = random_images(2, image_size, seed), torch.tensor([0, num_classes - 1])
    prepared = generator.prepare(images)
    holds(len(prepared) == 2 and not prepared.requires_grad, "prepare gives a row an image")
    network.train()
    losses = generator.loss(prepared, labels)
    learns(network, losses.total)
    scalars(losses.parts, "the parts of loss")
    seen: list[int] = []

    def watch(step: int, pictures: Tensor) -> None:
        seen.append(step)
        images_lie_within(pictures, tuple(images.shape), "watch")

    made = generator.generate(labels, randomly(seed), watch)
    images_lie_within(made, tuple(images.shape), "generate")
    holds(seen == list(range(len(seen))) and seen != [], "watch is called once a step, in order")
    holds(network.training, "generate leaves the network in the mode that it found")
    again = generator.generate(labels, randomly(seed))
    agree(made, again, "the same random state gives the same images, watched or not", 0)
