"""A deep copy of what draws fast or trains compiled computes with its own weights."""

import copy
from functools import partial

import pytest
import torch
import yaml

import sandbox
from sandbox import replay
from sandbox_plugins.var import copies

PARTS = {
    "autoencoder": {"name": "patch", "patch": 4, "ch": 8, "num_res_blocks": 0, "code_dim": 4},
    "codebook": {"name": "vq", "vocab_size": 32},
}
TOKENIZERS = {
    "pyramid": {"name": "var-vq", "schedule": {"name": "sides", "sides": [1, 2, 3]}},
    "raster": {"name": "raster-vq", "schedule": {"name": "raster", "height": 2, "width": 2}},
}
BACKBONE = {"name": "var", "depth": 2, "width": 64, "num_heads": 2}
SURE = {"label_dropout": 0.0, "drop_path": 0.0}


@pytest.fixture
def load(tmp_path):
    def loaded(layout="pyramid", device="cpu"):
        recipe = {
            "num_classes": 5,
            "tokenizer": TOKENIZERS[layout] | PARTS,
            "generator": {
                "name": "autoregressive",
                "sampler": "greedy",
                "backbone": BACKBONE | SURE,
            },
            "tasks": [{"name": "sample"}],
        }
        (tmp_path / "copies.yaml").write_text(yaml.safe_dump(recipe))
        run = sandbox.load(tmp_path / "copies.yaml", device=device)
        awaken(run.generator, 0)
        return run.generator

    return loaded


def awaken(generator, seed):
    """Weights large enough that predictions vary."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in (generator.network, generator.tokenizer):
            for parameter in part.parameters():
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=rng))


def drawn(generator, fast):
    generator.fast = fast
    device = generator.network.head.weight.device
    labels = torch.arange(6, device=device) % 5
    return generator.generate(labels, torch.Generator(device).manual_seed(0))


def own(generator):
    return [m for part in (generator.network, generator.tokenizer) for m in part.modules()]


def test_what_notices_that_weights_move_watches_those_of_the_copy(load):
    generator = load()
    other = copy.deepcopy(generator)
    watched = other._followed._held
    assert [id(each) for each in watched] == [id(each) for each in replay.held(own(other))]
    assert not {id(each) for each in watched} & {id(each) for each in generator._followed._held}
    before = replay.versions(generator._followed._held), replay.versions(watched)
    with torch.no_grad():
        other.network.head.weight.mul_(2)
    after = replay.versions(generator._followed._held), replay.versions(watched)
    assert after[0] == before[0] and after[1] != before[1]


class Kept:
    """Stands for a graph: what it gave when it was recorded, whatever became of weights."""

    def __init__(self, compute, inputs, rng, pool=None, stream=None):
        self.graph, self.stream, self.found = self, stream, compute(inputs, rng)

    def __call__(self, inputs, rng):
        return self.found

    def pool(self):
        return (0, 1)

    def __deepcopy__(self, memo):
        raise TypeError("a graph cannot be copied")


def test_a_copy_shares_no_recording(load, monkeypatch):
    monkeypatch.setattr(replay, "Recording", Kept)
    generator, refreshed = load(), []
    monkeypatch.setattr(sandbox, "refresh", refreshed.append)

    def recorded(each):
        def draw(labels, rng):
            return each.network.head.weight.sum()

        where = each._refresh_copies(each._followed)
        return each._recordings.run(draw, torch.zeros(1), None, key=where, at_once=True)

    first = recorded(generator)
    assert recorded(generator) is first and len(refreshed) == len(own(generator))
    refreshed.clear()
    other = copy.deepcopy(generator)
    found = recorded(other)
    assert found is not first and found.equal(first)
    assert {id(m) for m in refreshed} == {id(m) for m in own(other)}
    assert recorded(generator) is first and recorded(other) is found


def test_copied_casts_are_brought_up_to_date_from_the_copy(load):
    network = load().network
    network.fused = True
    copies.current(network, torch.bfloat16)
    other = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    first, second = (copies.current(each, torch.bfloat16) for each in (network, other))
    for cast, whose in ((first, network), (second, other)):
        for mine, theirs in zip(
            cast.tensors(), copies.own(whose, torch.bfloat16).tensors(), strict=True
        ):
            assert torch.equal(mine, theirs.to(mine.dtype))
    assert not torch.equal(first.places, second.places)
    assert second.blocks[0].attn is not first.blocks[0].attn


@pytest.fixture
def traced(monkeypatch):
    """Compiled without the minutes it takes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


@pytest.mark.usefixtures("traced")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler itself looks
@pytest.mark.parametrize("layout", TOKENIZERS)
def test_a_copy_that_was_compiled_trains_its_own_weights(load, layout):
    generator = load(layout)
    tokenizer, network = generator.tokenizer.train(), generator.network.train()
    images = torch.rand(2, 3, *tokenizer.image_size) * 2 - 1
    plain, labels = copy.deepcopy(generator), torch.tensor([0, 1])
    tokenizer.compile()
    generator.compile()
    other = copy.deepcopy(generator)
    for each in (plain, other):
        awaken(each, 1)

    def lessons(whose):
        made = whose.tokenizer.reconstruct(images)
        made.loss.backward()
        losses = whose.loss(torch.zeros(2, whose.layout.seq_len, dtype=torch.long), labels)
        losses.total.backward()
        slopes = [part.grad for part in whose.network.parameters()]
        slopes += [part.grad for part in whose.tokenizer.parameters()]
        return [made.images, made.loss, losses.total, *slopes]

    torch.testing.assert_close(lessons(other), lessons(plain), rtol=1e-4, atol=1e-5)
    assert all(part.grad is None for part in network.parameters())
    assert all(part.grad is None for part in tokenizer.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("fast", ["auto", "on"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_copy_of_a_recorded_generator_draws_with_its_own_weights(load, fast, precision):
    generator = load("pyramid", "cuda")
    half = torch.autocast("cuda", precision, enabled=precision != torch.float32)
    with sandbox.exact_float32(torch.device("cuda")), half:
        first = [drawn(generator, fast) for _ in range(5)][-1]
        other = copy.deepcopy(generator)
        assert not other._recordings._calls
        fresh = load("pyramid", "cuda")
        for each in (other, fresh):
            awaken(each, 1)
        found, plain = ([drawn(each, fast) for _ in range(5)][-1] for each in (other, fresh))
        close = 1e-3 if precision == torch.float32 else 4e-2  # with others' weights it would be 1
        assert (found - plain).norm() < close * plain.norm()
        assert (found - first).norm() > 0.1 * plain.norm()
        assert torch.equal(drawn(generator, fast), first)
