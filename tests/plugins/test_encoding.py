"""Precisions of encoders: what is computed in them, what they leave, and that caches tell them."""

from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sandbox
from sandbox import Batch
from sandbox_plugins.autoencoders import CNN
from sandbox_plugins.tasks import cache, encoding, train_generator
from sandbox_plugins.tasks.cache import cached
from sandbox_plugins.tasks.encoding import coding, coding_precision, coding_precisions, in_bulk

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


class Tokenizer(nn.Module):
    """The signs of an autoencoder's features; `precision` is what it was last called in."""

    vocab_size, image_size = 2, (8, 8)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        params = CNN.Params(ch=32, ch_mult=(1, 2), num_res_blocks=1, code_dim=1)
        self.autoencoder, self.called = CNN(params), []

    @torch.no_grad()
    def features(self, images):
        features = self.autoencoder.encode(images)
        self.called.append((len(images), features.dtype))
        return features.float()

    def encode(self, images):
        return (self.features(images) > 0).long().flatten(1)


class Noise:
    num_classes, class_names, image_size = 2, (), (8, 8)

    def __init__(self, size):
        self.images = torch.rand(size, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def size(self, split):
        return len(self.images)

    def batch(self, split, indices, rng):
        return Batch(self.images[indices], indices % 2)


@pytest.fixture
def run(tmp_path):
    tokenizer = Tokenizer().eval()
    return SimpleNamespace(
        folder=tmp_path,
        device=CPU,
        dataset=Noise(10),
        tokenizer=tokenizer,
        generator=SimpleNamespace(prepare=tokenizer.encode),
        settings=lambda slot, deciding=False: {"name": slot},
        say=lambda text: None,
    )


@pytest.mark.parametrize("outside", [False, True])
def test_a_precision_holds_whatever_it_is_outside(run, outside):
    with torch.autocast("cpu", torch.bfloat16, enabled=outside):
        for precision in coding_precisions(CPU):
            with coding(CPU, precision):
                run.tokenizer.encode(run.dataset.images)
        assert torch.is_autocast_enabled("cpu") == outside
    assert [dtype for _, dtype in run.tokenizer.called] == [torch.float32, torch.bfloat16]


def test_tf32_means_float32_where_there_is_none():
    asked = ("float32", "tf32", "bfloat16")
    assert [coding_precision(CPU, p) for p in asked] == ["float32", "float32", "bfloat16"]


def test_a_cache_is_named_after_the_precision_that_made_it(run):
    for asked in ("float32", "tf32", "bfloat16"):
        prepared = cached(run, "train", 4, 1, None, asked)
        with coding(CPU, coding_precision(CPU, asked)):
            assert torch.equal(prepared.examples.long(), run.tokenizer.encode(run.dataset.images))
    names = {path.name.rpartition("-")[0] for path in (run.folder / "cache").iterdir()}
    assert names == {"train-float32", "train-bfloat16"}
    *_, (_, dtype) = run.tokenizer.called
    assert dtype == torch.bfloat16


def test_a_cache_is_written_in_batches_of_a_size_that_fits(run, monkeypatch):
    monkeypatch.setattr(cache, "_BATCH_SIZE", 4)
    cached(run, "train", 100, 1, None)
    named_by, *written = [size for size, _ in run.tokenizer.called]
    assert (named_by, written) == (1, [4, 4, 2])


def test_processes_load_what_is_cached_unless_it_is_in_memory(run, monkeypatch):
    asked, sweep = [], sandbox.sweep

    def asking(*words, num_workers, **named):
        asked.append(num_workers)
        return sweep(*words, num_workers=num_workers, **named)

    monkeypatch.setattr(sandbox, "sweep", asking)
    found = cached(run, "train", 4, 1, None, num_workers=2)
    assert torch.equal(found.examples.long(), run.tokenizer.encode(run.dataset.images))
    run.dataset.to = lambda device: run.dataset  # not in memory: it stays as it is
    cached(run, "validation", 4, 1, None, num_workers=2)
    run.dataset.to = lambda device: Noise(10)
    cached(run, "validation", 4, 1, 5, num_workers=2)
    assert asked == [2, 2, 0]


def test_what_is_laid_out_for_speed_does_not_undo_the_precision(run, monkeypatch):
    switch, seen = torch.backends.cuda.matmul, []

    @contextmanager
    def laid_out(network, device):  # what it does on a GPU
        before, switch.fp32_precision = switch.fp32_precision, "tf32"
        yield
        switch.fp32_precision = before

    def prepare(images):
        seen.append(switch.fp32_precision)
        return run.tokenizer.encode(images)

    monkeypatch.setattr(encoding, "laid_out_for_speed", laid_out)
    run.generator.prepare = prepare
    cached(run, "train", 5, 1, None, "float32")
    assert seen[1:] == ["ieee", "ieee"]


def test_features_are_cached_in_the_same_ways_as_they_are(run, monkeypatch):
    run.generator.prepare = run.tokenizer.features
    monkeypatch.setattr(cache, "_BATCH_SIZE", 4)
    found = {asked: cached(run, "train", 4, 1, None, asked) for asked in ("float32", "bfloat16")}
    for asked, prepared in found.items():
        with coding(CPU, asked):
            pieces = [run.tokenizer.features(x) for x in run.dataset.images.split(4)]
        assert torch.equal(prepared.examples, torch.cat(pieces))
    assert not torch.equal(*(prepared.examples for prepared in found.values()))


def test_in_bulk_ids_are_the_same_and_the_tokenizer_is_left_as_it_was(run, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    plain, before = run.tokenizer.encode(run.dataset.images), set(vars(run.tokenizer.autoencoder))
    for compiled in (False, True):
        with in_bulk(run.tokenizer, CPU, compiled=compiled):
            assert ("encode" in vars(run.tokenizer.autoencoder)) == compiled
            assert torch.equal(run.tokenizer.encode(run.dataset.images), plain)
        assert set(vars(run.tokenizer.autoencoder)) == before
    with in_bulk(object(), CPU, compiled=True):
        pass


@pytest.fixture
def trained(run, monkeypatch):
    """Train a generator with some settings, where `within(fit)` stands for the training."""
    run.generator.network, run.save_weights = nn.Linear(1, 1), lambda *words, **named: None

    def train(within, **settings):
        def stand_in(fit):
            within(fit)
            return {"images_seen": 0}

        monkeypatch.setattr(train_generator, "train", stand_in)
        task, given = train_generator.TrainGenerator, {"num_images": 8, "batch_size": 8}
        task(task.Params(**given, strips=False, **settings)).run(run)

    return train


def test_where_there_is_no_cache_a_training_encodes_its_batches_in_bulk(run, trained):
    autoencoder, within = run.tokenizer.autoencoder, []
    for kept, compile in ((True, "on"), (False, "on"), (False, "off")):
        trained(
            lambda fit: within.append("encode" in vars(autoencoder)), cache=kept, compile=compile
        )
    assert within == [False, True, False] and "encode" not in vars(autoencoder)


@pytest.mark.parametrize(("kept", "sizes"), [(False, [4, 4, 2]), (True, [])])
def test_as_many_are_encoded_at_once_in_validation_as_in_a_step(run, trained, kept, sizes):
    def loss(prepared, labels):
        return sandbox.Losses(prepared.float().mean(), {})

    def validate(fit):
        run.tokenizer.called.clear()
        fit.validate()

    run.generator.loss = loss
    trained(validate, cache=kept, accumulate=2)
    assert [size for size, _ in run.tokenizer.called] == sizes


@pytest.fixture
def there(run):
    """The same on a GPU."""
    run.device = torch.device("cuda")
    run.tokenizer.to(run.device)
    return run


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # of torch's compiler about itself
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_on_a_gpu_decoding_in_bulk_is_decoding(there, compiled, precision):
    decode = there.tokenizer.autoencoder.decode
    features = torch.randn(4, 1, 8, 8, device=there.device)
    switch = torch.backends.cuda.matmul.fp32_precision
    with torch.no_grad():
        with sandbox.exact_float32(there.device):
            exact = decode(features)
        bulk = in_bulk(there.tokenizer, there.device, compiled=compiled)
        with bulk, coding(there.device, precision):
            made = there.tokenizer.autoencoder.decode(features).float()
    share = {"float32": 1e-4, "tf32": 5e-3, "bfloat16": 5e-2}[precision]
    assert (made - exact).norm() < share * exact.norm()
    assert torch.backends.cuda.matmul.fp32_precision == switch
    assert all(p.is_contiguous() for p in there.tokenizer.parameters())


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # of torch's compiler about itself
def test_on_a_gpu_what_is_compiled_caches_the_ids_of_what_is_not(there, monkeypatch):
    plain = cached(there, "train", 4, 1, None, "float32").examples.clone()
    monkeypatch.setattr(cache, "_NUM_COMPILED", 1)
    there.folder = there.folder / "compiled"
    for precision in ("float32", "tf32", "bfloat16"):
        found = cached(there, "train", 4, 1, None, precision).examples
        assert found.dtype == torch.int16 and found.shape == plain.shape
        assert (found != plain).float().mean() < (0.1 if precision == "bfloat16" else 0.02)


@pytest.mark.gpu
def test_on_a_gpu_nothing_is_compiled_where_that_is_not_wanted(there, monkeypatch):
    monkeypatch.setattr(cache, "_NUM_COMPILED", 1)
    monkeypatch.setattr(torch, "compile", None)
    assert len(cached(there, "train", 4, 1, None, compile=False).examples) == 10


class Quick(CNN):
    """Says by what it adds to features that it codes by kernels of its own."""

    quick = 0.0

    def quicken(self):
        self.quick = self.quick + 1.0
        return True

    def encode(self, images):
        return super().encode(images) + self.quick


def test_in_bulk_a_copy_codes_by_its_own_kernels_with_the_weights_of_the_first_batch(run):
    autoencoder = Quick(CNN.Params(ch=32, ch_mult=(1, 2), num_res_blocks=1, code_dim=1))
    run.tokenizer.autoencoder = autoencoder.eval()
    images = run.dataset.images
    with torch.no_grad(), coding(CPU, "bfloat16"):
        plain = run.tokenizer.features(images)
        for _ in range(2):  # each time by another copy, with the weights of then
            with in_bulk(run.tokenizer, CPU, compiled=True):
                for _ in range(2):
                    found = run.tokenizer.features(images)
                    torch.testing.assert_close(found, plain + 1, rtol=0.02, atol=0.02)
        canvas = torch.zeros(1, 1, 4, 4)
        sandbox.render(autoencoder, canvas, fused=True)  # by the copy, which must not lead back
    assert autoencoder.quick == 0
