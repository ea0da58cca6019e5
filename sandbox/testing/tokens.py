"""Laws of layouts and of what turns images into ids: the whole agrees with the steps."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sandbox.interfaces import (
    Autoencoder,
    Codebook,
    RequantizingTokenizer,
    Tokenizer,
    TrainableTokenizer,
)
from sandbox.layout import Layout
from sandbox.testing.claims import (
    agree,
    an_optimizer,
    as_module,
    holds,
    ids_lie_within,
    images_lie_within,
    learns,
    random_images,
    randomly,
    scalars,
)

NUM_STEPS_TO_REVIVE = 1000


def layout_law(layout: Layout) -> None:
    """Spans tile the sequence, cells lie in their map, mask rows only grow, levels fit the maps."""
    tokens = [token for span in layout.spans for token in range(span.start, span.stop)]
    holds(tokens == list(range(layout.seq_len)), "spans tile the sequence, in order")
    for step in layout.steps:
        inside = all(0 <= cell < step.height * step.width for cell in step.cells)
        holds(inside and len(set(step.cells)) == len(step.cells), "a step fills cells of its map")
    mask = layout.mask().int()
    holds(bool((mask[1:] >= mask[:-1]).all()), "later tokens see all that earlier ones see")
    holds(bool(mask.diagonal().all()), "every token sees itself")
    levels = torch.tensor(layout.level_of_step)
    holds(
        torch.equal(levels[layout.step_of()], layout.level_of()), "tokens have their step's level"
    )
    maps = [(step.height, step.width) for step in layout.steps]
    moved = torch.tensor([before != after for before, after in pairwise(maps)])
    holds(torch.equal(levels.diff() == 1, moved.bool()), "a level is a run of maps of one size")


@torch.no_grad()
def tokenizer_law(tokenizer: Tokenizer, seed: int = 0) -> None:
    """Whole contexts are the stepwise ones, decoding is painting, encoding repeats itself."""
    if isinstance(tokenizer, nn.Module):
        tokenizer.eval()
    layout, v = tokenizer.layout, tokenizer.vocab_size
    layout_law(layout)
    ids = torch.randint(v, (2, layout.seq_len), generator=randomly(seed))
    codes = tokenizer.embed(ids)
    holds(codes.shape == (*ids.shape, tokenizer.code_dim), "embed gives a code vector an id")
    canvas, contexts = tokenizer.canvas(2), []
    for step, span in enumerate(layout.spans):
        contexts.append(tokenizer.context(canvas, step))
        before = canvas.clone()
        painted = tokenizer.paint(canvas, codes[:, span], step)
        agree(canvas, before, "paint leaves the canvas it is given as it was", 0)
        canvas = painted
    whole = tokenizer.contexts(ids)
    agree(torch.cat(contexts, 1), whole, "contexts are the stepwise contexts side by side")
    holds(whole.shape == codes.shape, "contexts are code vectors, one a token")
    holds(not whole[:, layout.spans[0]].any(), "the first step's context is zero")
    decoded = tokenizer.decode(ids)
    images_lie_within(decoded, (2, 3, *tokenizer.image_size), "decode")
    agree(decoded, tokenizer.render(canvas), "decode is painting every step, then rendering")
    alone = torch.cat([tokenizer.decode(ids[:1]), tokenizer.decode(ids[1:])])
    agree(decoded, alone, "decode: a batch of two is two batches of one")
    for images in (random_images(2, tokenizer.image_size, seed), decoded):
        encoded = tokenizer.encode(images)
        ids_lie_within(encoded, (2, layout.seq_len), v, "encode")
        holds(torch.equal(encoded, tokenizer.encode(images)), "encoding again gives the same ids")
        alone = torch.cat([tokenizer.encode(images[:1]), tokenizer.encode(images[1:])])
        holds(torch.equal(encoded, alone), "encode: a batch of two is two batches of one")


def requantizing_tokenizer_law(tokenizer: RequantizingTokenizer, seed: int = 0) -> None:
    """Without noise `quantize` is `encode`; with noise the first step's right ids are the same."""
    v, shape = tokenizer.vocab_size, (2, tokenizer.layout.seq_len)
    images = random_images(2, tokenizer.image_size, seed)
    encoded, features = tokenizer.encode(images), tokenizer.features(images)
    for ids in tokenizer.quantize(features, torch.zeros(2)):
        holds(torch.equal(ids, encoded), "quantize without noise gives the ids of encode")
    found, right = tokenizer.quantize(features, torch.tensor([0.0, 100.0]))
    for ids in (found, right):
        ids_lie_within(ids, shape, v, "quantize")
        holds(torch.equal(ids[0], encoded[0]), "quantize: noise is an image's own")
    first = tokenizer.layout.spans[0]
    holds(torch.equal(right[:, first], encoded[:, first]), "quantize: nothing precedes step 1")


def trainable_tokenizer_law(tokenizer: TrainableTokenizer, seed: int = 0) -> None:
    """Reconstructing has gradients everywhere; `after_step` gives scalars, in training mode."""
    module = as_module(tokenizer).train()
    optimizer = an_optimizer(module)
    for progress in (0.0, 1.0):
        images = random_images(2, tokenizer.image_size, seed)
        made = tokenizer.reconstruct(images)
        holds(made.images.shape == images.shape, "reconstruct gives images of the same shape")
        shape = (2, tokenizer.layout.seq_len)
        ids_lie_within(made.ids, shape, tokenizer.vocab_size, "reconstruct")
        learns(module, (made.images - images).square().mean() + made.loss)
        optimizer.step()
        scalars(tokenizer.after_step(optimizer, progress, randomly(seed)), "after_step")


def codebook_law(codebook: Codebook, seed: int = 0) -> None:
    """The nearest code is nearest, an embedded id is its own nearest; also after it has learned.

    Codes that learn by gradient get one, so do the vectors from a `penalty`; where the settings
    have `restart`, codes that nothing is near to are put where the data is.
    """
    module, rng, v = as_module(codebook), randomly(seed), codebook.vocab_size
    holds(codebook.lookup in ("euclidean", "cosine"), "lookup is `euclidean` or `cosine`")
    vectors = torch.randn(max(32, v), codebook.code_dim, generator=rng)
    optimizer = an_optimizer(module)
    for progress in (0.0, 1.0):
        _looks_up(codebook, vectors[:32])
        if any(parameter.requires_grad for parameter in module.parameters()):
            learns(module, codebook.embed(torch.arange(v)).square().sum())
        _penalizes(codebook, vectors[:32])
        codebook.seed(vectors, 0, 1)
        codebook.observe([vectors], [codebook.nearest(vectors)])
        scalars(codebook.after_step(optimizer, progress, rng), "after_step")
    if getattr(getattr(codebook, "params", None), "restart", False):
        _revives(codebook, optimizer, rng)


def _looks_up(codebook: Codebook, vectors: Tensor) -> None:
    ids, v = codebook.nearest(vectors), codebook.vocab_size
    ids_lie_within(ids, (len(vectors),), v, "nearest")
    codes = codebook.embed(torch.arange(v)).detach()
    holds(codes.shape == (v, codebook.code_dim), "embed gives a code vector an id")
    agree(
        codebook.embed(ids.view(4, -1)).detach(),
        codes[ids].view(4, -1, codebook.code_dim),
        "any axes",
        0,
    )
    seen, known = vectors.double(), codes.double()
    if codebook.lookup == "cosine":
        seen, known = F.normalize(seen, dim=1), F.normalize(known, dim=1)
    distances = torch.cdist(seen, known)
    agree(distances[torch.arange(len(ids)), ids], distances.amin(1), "no other code is nearer")
    agree(known[codebook.nearest(codes)], known, "a code is the nearest to itself")


def _penalizes(codebook: Codebook, vectors: Tensor) -> None:
    penalty = getattr(codebook, "penalty", None)
    if penalty is not None:
        groups = [vectors[:8].clone().requires_grad_(), vectors[8:].clone().requires_grad_()]
        loss = penalty(groups)
        learns(as_module(codebook), loss)
        for group in groups:
            reached = group.grad is not None and bool(group.grad.isfinite().all())
            holds(reached, "a finite gradient of the penalty reaches the vectors of every group")


def _revives(codebook: Codebook, optimizer: torch.optim.Optimizer, rng: torch.Generator) -> None:
    """Feed one cluster until every code that it never chooses has moved."""
    place = torch.randn(1, codebook.code_dim, generator=rng)
    cluster = place + 0.01 * torch.randn(8, codebook.code_dim, generator=rng)
    every, moved = torch.arange(codebook.vocab_size), 0.0
    before = codebook.embed(every).detach().clone()
    idle = torch.ones_like(every, dtype=torch.bool)
    idle[codebook.nearest(cluster)] = False
    for _ in range(NUM_STEPS_TO_REVIVE):
        codebook.observe([cluster], [codebook.nearest(cluster)])
        found = codebook.after_step(optimizer, 0.0, rng)
        moved += float(found.get("codes_restarted", idle.sum()))
        after = codebook.embed(every).detach()
        if bool((after != before).any(1)[idle].all()):
            break
    holds(bool((after != before).any(1)[idle].all()), "codes that nothing is near to are restarted")
    near = (after[idle] - place).norm(dim=1) < (before[idle] - place).norm(dim=1)
    holds(bool(near.any()) or not len(near), "restarted codes are put where the data is")
    holds(moved >= int(idle.sum()), "codes_restarted counts the codes that were restarted")


def autoencoder_law(autoencoder: Autoencoder, seed: int = 0) -> None:
    """Sizes follow `downsample`, non-square too; both halves learn; images do not mix."""
    module = as_module(autoencoder).eval()
    height, width = 2 * autoencoder.downsample, 3 * autoencoder.downsample
    images = random_images(2, (height, width), seed)
    features = autoencoder.encode(images)
    holds(features.shape == (2, autoencoder.code_dim, 2, 3), "encode gives b c h w in cells")
    decoded = autoencoder.decode(features)
    holds(decoded.shape == images.shape, "decode gives images of the size that was encoded")
    alone = torch.cat([autoencoder.encode(images[:1]), autoencoder.encode(images[1:])])
    agree(features, alone, "encode: a batch of two is two batches of one")
    learns(module, (decoded - images).square().mean())
