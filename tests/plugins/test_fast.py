"""The fast way to draw: the same images as the plain one, on a GPU and on a CPU."""

import copy
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

import sandbox
from sandbox import NotRecorded, Recordings, rendering
from sandbox_plugins.autoregressive import Autoregressive
from sandbox_plugins.samplers import race
from sandbox_plugins.tasks.drawing import adjusted, drawing_with
from sandbox_plugins.var import blocks, fused, pieces

ROOT = Path(__file__).parents[2]
LAYOUTS = {
    "pyramid": {
        "name": "var-vq",
        "schedule": {"name": "sides", "sides": [1, 2, 3, 4]},
    },
    "raster": {"name": "raster-vq", "schedule": {"name": "raster", "height": 4, "width": 4}},
}
RECIPE = {
    "num_classes": 5,
    "generator": {
        "name": "autoregressive",
        "backbone": {"name": "var", "depth": 2, "width": 64, "num_heads": 2},
    },
    "tasks": [{"name": "sample"}],
}
PARTS = {
    "autoencoder": {"name": "patch", "patch": 4, "ch": 8, "code_dim": 4},
    "codebook": {"name": "vq", "vocab_size": 32},
}


@pytest.fixture
def load(tmp_path):
    """A run of untrained parts whose weights are large enough that predictions vary."""

    def loaded(layout="pyramid", device="cpu", autoencoder=None, tokenizer=None, **settings):
        own = {"autoencoder": autoencoder} if autoencoder else {}
        own |= tokenizer or {}
        recipe = {**RECIPE, "tokenizer": LAYOUTS[layout] | PARTS | own}
        (tmp_path / "fast.yaml").write_text(yaml.safe_dump(recipe))
        words = [f"generator.{key}={value}" for key, value in settings.items()]
        run = sandbox.load(tmp_path / "fast.yaml", *words, device=device)
        awaken(run.generator.network)
        return run

    return loaded


def awaken(network, seed=0):
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=rng))


@pytest.fixture
def quickly_compiled(monkeypatch):
    """What compiling means without the minutes it takes: traced, not built."""
    traced = pieces.Pieces(
        *(
            torch.compile(piece, dynamic=True, backend="aot_eager")
            for piece in (pieces.prepare, pieces.enter, pieces.between, pieces.leave)
        )
    )
    monkeypatch.setattr(pieces, "compiled", lambda *, dynamic: traced)
    images = torch.compile(rendering._images, dynamic=False, backend="aot_eager")
    monkeypatch.setattr(rendering, "fused_images", lambda: images)
    monkeypatch.setattr(race, "compiled", lambda: race.winners)


def labels_of(run, size=6):
    return torch.arange(size, device=run.device) % 5


def drawn(run, fast, salt="a", size=6):
    run.generator.fast = fast
    return run.generator.generate(labels_of(run, size), run.rng(salt))


def logits(run, fused, size=3, weight=None):
    """Every step's logits, of one run of codes; with a weight guided ones."""
    network, layout = run.generator.network.eval(), run.generator.layout
    network.fused = fused
    rng = torch.Generator(run.device).manual_seed(0)
    with torch.inference_mode(), sandbox.compiling():
        state, found = network.begin(labels_of(run, size)), []
        for step, n in enumerate(layout.lens):
            context = torch.randn(size, n, 4, generator=rng, device=run.device)
            guided = () if weight is None else (weight,)
            predict = network.guided_step if guided else network.step
            found.append(predict(state, context, step, *guided))
    network.fused = False
    return torch.cat(found, 1)


@pytest.mark.parametrize(("word", "fast"), [("off", "off"), ("on", "on"), ("auto", "auto")])
def test_on_and_off_are_read_as_words(load, word, fast):
    assert load(fast=word).generator.fast == fast


def test_fast_is_one_of_three_words(registry):
    with pytest.raises(ValueError, match="'auto', 'on' or 'off'"):
        Autoregressive.Params.model_validate(
            {"backbone": {"name": "var"}, "fast": "faster"}, context={"registry": registry}
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_greedy_tokens_of_compiled_kernels_are_the_plain_ones(load, layout):
    run = load(layout, sampler="greedy")
    plain = drawn(run, "off")
    torch.testing.assert_close(drawn(run, "on"), plain)
    assert len(plain.flatten(1).unique(dim=0)) > 1
    for size, weight in ((3, None), (4, 0.0), (4, 2.5)):
        found, wanted = (logits(run, fused, size, weight) for fused in (True, False))
        torch.testing.assert_close(found, wanted)


def test_on_a_cpu_auto_is_the_plain_way(load, monkeypatch):
    run = load()
    monkeypatch.setattr(pieces, "compiled", None)
    monkeypatch.setattr(rendering, "fused_images", None)
    monkeypatch.setattr(run.generator, "_recordings", None)
    assert torch.equal(drawn(run, "auto"), drawn(run, "off"))


@pytest.mark.usefixtures("quickly_compiled")
def test_what_is_watched_or_edited_is_drawn_alike(load):
    run = load()
    made, labels = run.generator, labels_of(run)
    images = drawn(run, "on")
    seen = []
    watched = made.generate(labels, run.rng("a"), lambda step, shown: seen.append(shown))
    assert torch.equal(watched, images) and torch.equal(seen[-1], images) and len(seen) == 4
    edited = made.edit(images, torch.ones(images.shape[2:]), labels, run.rng("a"))
    torch.testing.assert_close(edited, run.tokenizer.decode(run.tokenizer.encode(images)))
    assert not made.backbone.fused and not made.tokenizer.fused


@pytest.mark.usefixtures("quickly_compiled")
def test_in_half_precision_compiled_kernels_stay_close_and_read_weights_anew(load):
    run = load()
    for seed in (0, 1):
        awaken(run.generator.network, seed)
        with torch.autocast("cpu", torch.bfloat16):
            plain, fused = logits(run, False), logits(run, True)
        assert (fused - plain).norm() < 1e-2 * plain.norm()
    assert not any("_cast" in name for name in run.generator.network.state_dict())
    assert all(parameter.requires_grad for parameter in run.generator.network.parameters())
    (cast,) = run.generator.network._cast.values()
    backends = {id(block.attn.backend) for block in [*cast.blocks, *run.generator.network.blocks]}
    assert len(backends) == 1


@pytest.mark.gpu
def test_the_logits_of_a_trained_model_stay_within_a_hundredth_in_16_bits():
    """The model in the box, told what it drew itself. Its compiled pieces do so on a CPU."""
    run = sandbox.load(ROOT / "recipes/cifar10_sample.yaml", device="cuda")
    network, layout = run.generator.network.eval(), run.generator.layout
    labels = torch.arange(6, device=run.device)
    drawn = run.generator.generate(labels, run.rng("drawn"))
    contexts = run.tokenizer.contexts(run.generator.prepare(drawn))

    def told(fused):
        network.fused = fused
        with torch.inference_mode(), sandbox.compiling():
            state = network.begin(labels)
            steps = enumerate(layout.spans)
            return torch.cat([network.step(state, contexts[:, span], k) for k, span in steps], 1)

    exact, found = told(False), told(True)
    assert (found - exact).norm() < 1e-5 * exact.norm()
    with torch.autocast("cuda", torch.bfloat16):
        plain, found = told(False), told(True)
    assert 0 < (found - plain).norm() < 1e-2 * plain.norm()
    assert (found - exact).norm() < 1e-2 * exact.norm()


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pieces_are_built_once_for_all_blocks_of_a_kind(load, layout, half, monkeypatch):
    """And, on a GPU, once for each number of tokens; what the first tokens read is another code."""
    built = Counter()

    def counting(name):
        def backend(graph, inputs):
            built[name] += 1
            return graph.forward

        return torch.compile(getattr(pieces, name), dynamic=False, backend=backend)

    found = pieces.Pieces(*map(counting, pieces.Pieces._fields))
    monkeypatch.setattr(pieces, "compiled", lambda *, dynamic: found)
    run = load(layout, **{"backbone.depth": 5})
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        fused, plain = logits(run, True), logits(run, False)
        logits(run, True)
    assert (fused - plain).norm() < (1e-2 if half else 1e-5) * plain.norm()
    sizes = len(set(run.generator.layout.lens))
    first = 0 if layout == "pyramid" else 1
    assert built == {"prepare": 1, "enter": sizes + first, "between": sizes, "leave": sizes}


@pytest.mark.usefixtures("quickly_compiled")
def test_a_network_that_drew_with_compiled_kernels_can_be_trained(load):
    run = load()
    with torch.autocast("cpu", torch.bfloat16):
        images = drawn(run, "on")
        ids = run.generator.prepare(images)
        run.generator.network.train()
        run.generator.loss(ids, labels_of(run)).total.backward()
    assert all(p.grad is not None for p in run.generator.network.parameters())


@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler itself looks
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_training_and_drawing_are_compiled_side_by_side(load, device, monkeypatch):
    settings = {"sampler": "greedy", "self_correction": 0.3, "backbone.recompute": True}
    settings["backbone.attention"] = "sdpa"  # others may keep what is compiled here for good
    run = load(device=device, **settings)
    made, network = run.generator, run.generator.network
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    network.compile = partial(network.compile, backend="aot_eager")
    features = made.prepare(drawn(run, "off"))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)

    def learn():
        network.train()
        optimizer.zero_grad()
        torch.manual_seed(0)
        made.loss(features, labels_of(run)).total.backward()
        return [parameter.grad.clone() for parameter in network.parameters()]

    plain, images = learn(), [drawn(run, "off")]
    made.compile()
    for _ in range(2):
        gradients = learn()
        if len(images) == 1:
            torch.testing.assert_close(gradients, plain, rtol=1e-3, atol=1e-4)
        optimizer.step()
        images.append(drawn(run, "on"))
        torch.testing.assert_close(images[-1], drawn(run, "off"), rtol=0, atol=1e-3)
    assert network.training and not any(map(torch.equal, images, images[1:]))


def rendered(run, fused, seed=2):
    """What a canvas of random numbers stands for."""
    rng = torch.Generator(run.device).manual_seed(seed)
    canvas = run.tokenizer.canvas(3)
    canvas = canvas + torch.randn(canvas.shape, generator=rng, device=run.device)
    run.tokenizer.fused = fused
    with torch.no_grad():
        images = run.tokenizer.render(canvas)
    run.tokenizer.fused = False
    return images


def renders_alike(run):
    """Compiled as plainly, in both precisions, and of the weights as they are by then."""
    found = []
    for seed in (0, 1):
        awaken(run.tokenizer.autoencoder, seed)
        with sandbox.exact_float32(run.device):
            plain, fused = rendered(run, False), rendered(run, True)
        assert fused.dtype == torch.float32 and fused.is_contiguous()
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)
        with torch.autocast(run.device.type, torch.bfloat16):
            coarse, fast = rendered(run, False), rendered(run, True)
        assert 0 < (fast - plain).norm() < 2 * (coarse - plain).norm()
        found.append(fused)
    assert not torch.equal(*found)


CNN_SETTINGS = {"name": "cnn", "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "code_dim": 4}


@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.parametrize("autoencoder", [PARTS["autoencoder"], CNN_SETTINGS])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_compiled_decoder_gives_the_plain_images(load, layout, autoencoder):
    renders_alike(load(layout, autoencoder=autoencoder))


@pytest.mark.usefixtures("quickly_compiled")
def test_a_compiled_decoder_leaves_no_trace_in_the_tokenizer_and_follows_a_copy(load):
    run = load()
    tokenizer = run.tokenizer
    before = set(vars(tokenizer)), list(tokenizer.state_dict()), len(list(tokenizer.modules()))
    kept = rendered(run, True)
    now = set(vars(tokenizer)), list(tokenizer.state_dict()), len(list(tokenizer.modules()))
    assert now == before
    run.tokenizer = copy.deepcopy(tokenizer)
    awaken(run.tokenizer.autoencoder)
    changed = rendered(run, True)
    torch.testing.assert_close(changed, rendered(run, False))
    assert not torch.equal(changed, kept)
    run.tokenizer = tokenizer
    assert torch.equal(rendered(run, True), kept)


@pytest.mark.usefixtures("quickly_compiled")
def test_a_copy_of_a_decoder_follows_weights_that_are_exchanged_and_the_mode(load):
    run = load(autoencoder=CNN_SETTINGS | {"dropout": 0.5})
    autoencoder = run.tokenizer.autoencoder
    autoencoder.train()
    for seed in (0, 1):
        awaken(autoencoder, seed)
        with torch.autocast("cpu", torch.bfloat16):  # which remembers what it has cast
            fused, plain = rendered(run, True), rendered(run, False)
        assert autoencoder.training or (fused - plain).norm() < 2e-2 * plain.norm()
        autoencoder.eval()


def test_copies_are_refreshed_where_weights_were_exchanged_and_put_back(load, monkeypatch):
    run, refreshed = load(), []
    monkeypatch.setattr(sandbox, "refresh", refreshed.append)
    made, weight = run.generator, run.generator.backbone.head.weight
    first, other = weight.data, weight.data + 1

    def count():
        refreshed.clear()
        made._refresh_copies(made._followed)
        return len(refreshed)

    assert count() == len(made._followed.modules) and count() == 0
    for exchanged in (other, first):
        weight.data = exchanged
        assert count() == len(made._followed.modules) and count() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gelu_within_the_product_is_its_tanh_form(dtype):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 5, 64), torch.randn(128, 64) / 8, torch.randn(128)
    exact = fused.linear_gelu(x.double(), weight.double(), bias.double())
    found = fused.linear_gelu(*(each.to("cuda", dtype) for each in (x, weight, bias)))
    close = 2e-3 if dtype == torch.float16 else 2e-2
    torch.testing.assert_close(found.cpu().double(), exact, rtol=close, atol=close)


def test_every_form_of_gelu_is_what_the_mlp_computes():
    x, ffn = torch.randn(2, 3, 8), blocks.Mlp(8, 16, act_layer=partial(torch.nn.GELU, "tanh"))
    found = ffn.fc2(fused.linear_gelu(x, ffn.fc1.weight, ffn.fc1.bias))
    torch.testing.assert_close(found, ffn(x))
    torch.testing.assert_close(ffn.fc2(blocks.gelu(ffn.fc1(x))), ffn(x))


@pytest.mark.usefixtures("quickly_compiled")
def test_a_decoder_is_built_once_for_drawing_and_watching(load):
    run, seen = load(), []
    images = drawn(run, "on")
    with torch.compiler.set_stance("fail_on_recompile"):
        run.generator.generate(labels_of(run), run.rng("a"), lambda step, shown: seen.append(shown))
    assert torch.equal(seen[-1], images) and not images.is_inference()


@pytest.mark.gpu
@pytest.mark.parametrize("autoencoder", [PARTS["autoencoder"], CNN_SETTINGS])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_compiled_decoder_gives_the_plain_images_on_a_gpu(load, layout, autoencoder):
    renders_alike(load(layout, "cuda", autoencoder=autoencoder))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_recording_decodes_with_the_weights_as_they_are(load, precision):
    run = load("raster", "cuda", sampler="greedy", autoencoder=CNN_SETTINGS)
    for seed in (0, 1):
        awaken(run.tokenizer.autoencoder, seed)
        half = torch.autocast("cuda", precision, enabled=precision != torch.float32)
        with sandbox.exact_float32(run.device), half:
            images, plain = drawn(run, "on"), drawn(run, "off")
        assert _recordings(run) == 1
        close = 1e-3 if precision == torch.float32 else 4e-2  # of stale ones it would be 1
        assert (images - plain).norm() < close * plain.norm()


@pytest.mark.gpu
def test_a_recording_reads_what_a_fused_optimizer_has_written(load):
    run = load("raster", "cuda", sampler="greedy")
    optimizer = torch.optim.AdamW(run.generator.network.parameters(), lr=0.1, fused=True)
    seen = []
    for _ in range(3):
        with torch.autocast("cuda", torch.bfloat16):
            images, plain = drawn(run, "on"), drawn(run, "off")
        assert _recordings(run) == 1
        assert (images - plain).norm() < 2e-2 * plain.norm()
        seen.append(images)
        for parameter in run.generator.network.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    assert not any(map(torch.equal, seen, seen[1:]))


SETTINGS = {
    "guided": {},
    "unguided": {"sampler": "{name: top-k-top-p, guidance: 0, top_k: 5}"},
    "smoothed": {"sampler": "{name: top-k-top-p, smoothing: true, top_p: 0.8}"},
    "shared": {"backbone.shared_adaln": True},
}


@pytest.mark.gpu
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_recorded_generation_draws_the_plain_images(load, layout, precision, setting):
    run = load(layout, "cuda", **SETTINGS[setting])
    with torch.autocast("cuda", precision, enabled=precision != torch.float32):
        plain = [drawn(run, "off", salt) for salt in "abc"]
        recorded = [drawn(run, "auto", salt) for salt in "123abc"][3:]
        assert _recordings(run) == 1
        for one, other in zip(plain, recorded, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-3)
        assert not torch.equal(recorded[0], recorded[1])


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_greedy_tokens_of_a_compiled_recording_are_the_plain_ones(load, layout):
    run = load(layout, "cuda", sampler="greedy")
    torch.testing.assert_close(drawn(run, "on"), drawn(run, "off"), rtol=0, atol=1e-3)
    assert _recordings(run) == 1
    torch.testing.assert_close(logits(run, True), logits(run, False), rtol=1e-4, atol=1e-4)
    with torch.autocast("cuda", torch.bfloat16):
        plain, fused = logits(run, False), logits(run, True)
    assert (fused - plain).norm() < 1e-2 * plain.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [3, 30])
@pytest.mark.parametrize(
    "settings", [{"width": 128}, {"width": 96, "num_heads": 3, "shared_adaln": True}]
)
def test_a_gpu_draws_alike_and_compiles_nothing_of_a_network(
    load, monkeypatch, dtype, size, settings
):
    """With few tokens (96 in the largest step of 6 rows), with many, and of no width for those."""
    run = load(device="cuda", **{f"backbone.{name}": value for name, value in settings.items()})
    monkeypatch.setattr(pieces, "compiled", None)
    with torch.autocast("cuda", dtype, enabled=dtype is not None):
        plain, found = logits(run, False, size), logits(run, True, size)
    gap, whole = (found - plain).norm(), plain.norm()
    assert 0 < gap < (1e-5 if dtype is None else 1e-2) * whole


@pytest.mark.gpu
def test_one_generator_draws_on_from_replay_to_replay_and_the_seed_decides(load):
    run = load(device="cuda")
    run.generator.fast = "on"
    rng, labels = run.rng("a"), labels_of(run)
    first, second = (run.generator.generate(labels, rng) for _ in range(2))
    assert not torch.equal(first, second)
    rng = run.rng("a")
    again = [run.generator.generate(labels, rng) for _ in range(2)]
    assert torch.equal(first, again[0]) and torch.equal(second, again[1])


@pytest.mark.gpu
def test_another_batch_sampler_or_precision_is_another_recording(load):
    run = load(device="cuda")
    own = run.generator.params.sampler
    sizes = {size: drawn(run, "auto", size=size) for size in (2, 6, 6, 2, 2, 6, 6, 2)}
    assert _recordings(run) == 2
    for size, images in sizes.items():
        torch.testing.assert_close(images, drawn(run, "off", size=size), rtol=0, atol=1e-3)
    with drawing_with(run, adjusted(own, {"top_k": 1})):
        narrow = [drawn(run, "on") for _ in range(2)]
        torch.testing.assert_close(narrow[1], drawn(run, "off"), rtol=0, atol=1e-3)
    assert not torch.equal(narrow[0], sizes[6])
    assert _recordings(run) == 3
    with torch.autocast("cuda", torch.bfloat16):
        drawn(run, "on")
    assert _recordings(run) == 4


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fast", ["auto", "on"])
def test_weights_that_change_or_move_are_never_stale(load, fast, precision):
    run = load(device="cuda", sampler="greedy")
    with torch.autocast("cuda", precision, enabled=precision != torch.float32):
        before = [drawn(run, fast) for _ in range(4)][3]
    awaken(run.generator.network, seed=1)
    with torch.autocast("cuda", precision, enabled=precision != torch.float32):
        changed, plain = drawn(run, fast), drawn(run, "off")
    assert _recordings(run) == 1
    assert not torch.equal(changed, before)
    if precision == torch.float32:
        torch.testing.assert_close(changed, plain, rtol=0, atol=1e-3)
    run.tokenizer.to("cpu").to("cuda")
    run.generator.network.to("cpu").to("cuda")
    awaken(run.generator.network, seed=0)
    with torch.autocast("cuda", precision, enabled=precision != torch.float32):
        again = [drawn(run, fast) for _ in range(4)][3]
    torch.testing.assert_close(again, before, rtol=0, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("fast", ["auto", "on"])
def test_tokens_are_drawn_as_often_as_the_plain_way_draws_them(load, fast):
    """Pearson's chi-square of two samples: the last scale's ids, both of 200 batches of 64."""
    run = load(device="cuda", sampler="{name: top-k-top-p, top_k: 12, top_p: 0.9}")
    made, labels = run.generator, torch.zeros(64, dtype=torch.long, device="cuda")
    made.network.eval()

    def ids(labels, rng):
        with made._fused():
            found = sandbox.sample(
                made.tokenizer, made.network, made.sampler, labels, rng, no_label=5
            )
        return found.ids[:, -16:]

    counts = []
    for mode, salt in ((fast, "fast"), ("off", "plain")):
        made.fast, recordings, rng = mode, Recordings(), run.rng(salt)
        batches = [
            recordings.run(ids, labels, rng, key=0, at_once=True)
            if mode != "off"
            else ids(labels, rng)
            for _ in range(200)
        ]
        counts.append(torch.cat(batches).flatten().bincount(minlength=32).double())
    one, other = counts
    assert one.sum() == other.sum()
    known = (one + other) > 0
    chi = ((one - other).square() / (one + other))[known].sum()
    freedom = known.sum() - 1
    # Tokens of one image depend on one another, which widens the tail; hence a wide margin.
    assert chi < 3 * (freedom + 5 * (2 * freedom).sqrt())


class Waiting:
    """A sampler that waits for the device."""

    class Params(sandbox.Params):
        """Nothing to set."""

    def guidance(self, progress):
        return 0.0

    def draw(self, logits, progress, rng):
        picked = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=rng)
        assert picked.max().item() < logits.shape[-1]
        return picked.view(logits.shape[:2])


@pytest.mark.gpu
def test_a_sampler_that_waits_draws_plainly_and_a_warning_tells(load):
    run = load(device="cuda")
    run.generator.sampler = Waiting()
    plain = [drawn(run, "off"), *(drawn(run, "auto") for _ in range(3))][0]
    with pytest.warns(NotRecorded, match="so slower"):
        assert torch.equal(drawn(run, "auto"), plain)
    assert torch.equal(drawn(run, "auto"), plain)


@pytest.mark.gpu
def test_a_recorded_generation_does_not_wait_for_the_device(load):
    run = load(device="cuda")
    drawn(run, "on")
    labels, rng = labels_of(run), run.rng("a")
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.generator.generate(labels, rng)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _recordings(run):
    calls = run.generator._recordings._calls.values()
    return sum(not isinstance(call, int) for call in calls)


@pytest.mark.usefixtures("quickly_compiled")
def test_a_sampler_draws_the_fast_way_with_the_others(load, monkeypatch):
    run, seen = load(sampler="{name: top-k-top-p, top_p: 0.8}"), []
    monkeypatch.setattr(race, "draw", lambda *args, draw=race.draw: seen.append(1) or draw(*args))
    plain = drawn(run, "off")
    assert not seen
    torch.testing.assert_close(drawn(run, "on"), plain)
    assert len(seen) == 4 and not run.generator.sampler.fused


def test_compiled_to_draw_on_a_cpu_onednn_multiplies():
    """In float32; not in 16 bits, nor with gradients, nor where nothing is compiled."""
    built = []

    def backend(graph, inputs):
        built.append(str(graph.code))
        return graph.forward

    linear = torch.compile(blocks.linear, backend=backend)
    layer, x = torch.nn.Linear(8, 16), torch.randn(2, 3, 8)
    for dtype, draws in ((torch.float32, True), (torch.float32, False), (torch.bfloat16, True)):
        layer, x = layer.to(dtype), x.to(dtype)
        with torch.set_grad_enabled(not draws):
            torch.testing.assert_close(linear(x, layer.weight, layer.bias), layer(x))
    assert ["onednn_linear" in code for code in built] == [True, False, False]
