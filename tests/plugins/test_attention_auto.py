"""`auto`: one pick for each kind of call, kept and told; nothing else of a run is disturbed."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import sandbox
from sandbox import Mask
from sandbox.provenance import choices_told_to
from sandbox_plugins.attention import AutoAttention, MathAttention, SdpaAttention, auto, measuring
from sandbox_plugins.attention.picks import Pick, place, settled
from sandbox_plugins.attention.plain import request_of

# Compilers and xformers warn of their own affairs (TF32, what they themselves call of Triton).
foreign_warnings = pytest.mark.filterwarnings("default")
STEPS = Mask((1, 4, 9))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Picks of nobody else's, in memory or on disk."""
    monkeypatch.delenv("TORCH_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(auto, "_picks", {})
    return tmp_path / "cache/torch/var-sandbox/attention.json"


@pytest.fixture
def measured(monkeypatch):
    """The kinds of calls that were measured; on this CPU, and `math` is always the fastest."""
    kinds = []

    def fastest(backends, request, tensors, scale):
        kinds.append((tuple(tensors[0].shape), request.mask.kind, request.needs_grad))
        return Pick("math", "math 1 ms, sdpa 2 ms")

    monkeypatch.setattr(auto, "MEASURED_ON", "cpu")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(auto, "CANDIDATES", {"sdpa": SdpaAttention, "math": MathAttention})
    monkeypatch.setattr(auto, "fastest", fastest)
    return kinds


def build(cls=AutoAttention):
    return cls(cls.Params())


def tensors(n=14, needs_grad=False, **options):
    rng = torch.Generator().manual_seed(0)
    drawn = (torch.randn(2, 3, n, 16, generator=rng).to(**options) for _ in range(3))
    return [x.requires_grad_(needs_grad) for x in drawn]


def attend(backend, needs_grad=False, mask=STEPS):
    return backend.attend(*tensors(needs_grad=needs_grad), mask, 0.3)


def test_on_a_cpu_nothing_is_measured(monkeypatch, cache):
    monkeypatch.setattr(auto, "fastest", None)
    assert torch.equal(attend(build()), attend(build(SdpaAttention)))
    assert not cache.exists()


def test_stepwise_drawing_is_measured_for_a_few_numbers_of_keys(measured, monkeypatch):
    backend = build()
    for num_keys in range(1, 65):
        q, k, v = (x[:, :, :n] for x, n in zip(tensors(64), (1, num_keys, num_keys), strict=True))
        seen = backend.attend(q, k, v, Mask(), 0.3)
        assert torch.equal(seen, build(MathAttention).attend(q, k, v, Mask(), 0.3))
    assert len(measured) == 7  # 1, 2, 4, 8, 16, 32, 64


def test_what_the_pick_refuses_goes_to_sdpa(measured, monkeypatch):
    backend = build()
    odd = lambda self, request: "odd" if request.num_keys % 2 else None  # noqa: E731
    monkeypatch.setattr(MathAttention, "limit", odd)
    q, k, v = tensors(8)
    for num_keys, taken in ((8, MathAttention), (7, SdpaAttention)):
        few = k[:, :, :num_keys], v[:, :, :num_keys]
        expected = build(taken).compute(q, *few, Mask(), 0.3)
        assert torch.equal(backend.attend(q, *few, Mask(), 0.3), expected)
    assert len(measured) == 1


def test_each_kind_of_call_is_measured_once_and_told(measured, cache):
    told = []
    with choices_told_to(lambda *words: told.append(words)):
        backend = build()
        for _ in range(2):
            assert torch.equal(attend(backend), attend(build(MathAttention)))
        attend(backend, needs_grad=True)
    shape = (2, 3, 14, 16)
    assert measured == [(shape, "steps", False), (shape, "steps", True)]
    case = "2 x 3 heads of 16, 14 queries, 14 keys, mask: steps of 1 4 9, float32, forward"
    assert told == [
        ("attention", case, "math", "math 1 ms, sdpa 2 ms"),
        ("attention", f"{case} and backward", "math", "math 1 ms, sdpa 2 ms"),
    ]
    ((machine, found),) = json.loads(cache.read_text()).items()
    assert machine.startswith("CPU, torch ") and machine.endswith(
        "among sdpa math, timed in graphs"
    )
    assert found[case] == {"name": "math", "why": "math 1 ms, sdpa 2 ms"}


def test_later_runs_take_over_what_was_picked_and_tell_it_too(measured, monkeypatch):
    attend(build())
    monkeypatch.setattr(auto, "_picks", {})  # as in a new process
    told = []
    with choices_told_to(lambda *words: told.append(words)):
        attend(build())
        attend(build())
    assert len(measured) == 1
    assert [words[2] for words in told] == ["math", "math"]


def test_compiled_code_measures_nothing_and_takes_what_was_rehearsed(measured):
    seen = []

    def look(graph, _):
        seen.append(any("scaled_dot_product" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    for rehearsed in (False, True):
        torch._dynamo.reset()
        backend = build()
        if rehearsed:
            backend.rehearse(*tensors(), STEPS, 0.3)
        compiled = torch.compile(
            lambda q, k, v, backend=backend: backend.attend(q, k, v, STEPS, 0.3),
            backend=look,
            fullgraph=True,
        )
        torch.testing.assert_close(compiled(*tensors()), attend(build(MathAttention)))
        assert len(measured) == rehearsed
        assert seen.pop() is not rehearsed and not seen


def test_within_a_capture_nothing_is_measured(measured, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert torch.equal(attend(build()), attend(build(SdpaAttention)))
    assert not measured


def test_fake_tensors_measure_nothing(measured):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q = torch.empty(2, 3, 14, 16)
        assert build().attend(q, q, q, Mask(), 0.3).shape == q.shape
    assert not measured


def test_a_file_of_picks_that_cannot_be_read_or_written_stops_nothing(cache):
    def pick():
        return settled(torch.device("cpu"), ["a"], "case", lambda: Pick("a", "because"))

    cache.parent.mkdir(parents=True)
    for nonsense in ("", "[]", '{"machine": 1}', "{"):
        cache.write_text(nonsense)
        assert pick() == Pick("a", "because")
        assert "because" in cache.read_text()
    cache.unlink()
    cache.mkdir()
    assert pick().name == "a" and "cannot be written" in pick().why


def test_picks_lie_where_the_environment_puts_caches(cache, monkeypatch, tmp_path):
    assert place() == cache
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    assert place() == tmp_path / "torch/var-sandbox/attention.json"


def test_what_could_not_be_measured_is_not_kept(cache):
    nothing = measuring.picked("sdpa", {}, {"sdpa": "OutOfMemoryError: no"})
    assert (nothing.name, nothing.certain) == ("sdpa", False)
    assert nothing.why == "nothing could be measured, sdpa failed: OutOfMemoryError: no"
    settled(torch.device("cpu"), ["sdpa"], "case", lambda: nothing)
    assert not cache.exists()


@pytest.mark.parametrize(
    ("times", "name"),
    [
        ({"sdpa": 1.0, "flex": 2.0}, "sdpa"),
        ({"sdpa": 1.04, "flex": 1.0}, "sdpa"),
        ({"sdpa": 1.2, "cudnn": 1.02, "flex": 1.0}, "cudnn"),
        ({"sdpa": 1.2, "cudnn": 1.1, "flex": 1.0}, "flex"),
    ],
)
def test_an_earlier_candidate_is_taken_unless_a_later_one_is_clearly_faster(times, name):
    assert measuring.picked("sdpa", times, {}).name == name


class Wrong(SdpaAttention):
    def compute(self, q, k, v, mask, scale):
        return 1.2 * super().compute(q, k, v, mask, scale)


class Failing(SdpaAttention):
    def compute(self, q, k, v, mask, scale):
        raise RuntimeError("no valid\n  plan")


class Refusing(SdpaAttention):
    def limit(self, request):
        return "never"


@pytest.fixture
def clock(monkeypatch):
    """Calls are made, and all take as long, without a GPU."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(measuring, "_milliseconds", lambda call, repeats: call() and 1.0)


@pytest.mark.parametrize("needs_grad", [False, True])
def test_what_fails_or_gives_other_numbers_is_out(clock, needs_grad):
    q, k, v = tensors(needs_grad=needs_grad)
    backends = {
        cls.__name__: build(cls) for cls in (SdpaAttention, Wrong, Failing, Refusing, MathAttention)
    }
    pick = measuring.fastest(backends, request_of(q, k, v, STEPS), (q, k, v), 0.3)
    assert pick == Pick(
        "SdpaAttention",
        "SdpaAttention 1 ms, MathAttention 1 ms, "
        "Wrong failed: ArithmeticError: its numbers are not those of the others, "
        "Failing failed: RuntimeError: no valid plan",
    )
    assert all(x.grad is None for x in (q, k, v))


def test_measuring_disturbs_no_mode_of_the_callers(clock):
    q, k, v = tensors()
    state = torch.get_rng_state()
    backends = {"sdpa": build(SdpaAttention), "math": build(MathAttention)}
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        views = [x[:, :, :9] for x in (q, k, v)]
        pick = measuring.fastest(backends, request_of(*views, Mask()), tuple(views), 0.3)
    assert pick.certain and "failed" not in pick.why
    assert counter.get_total_flops() == 0
    assert torch.equal(torch.get_rng_state(), state)


def test_numbers_that_overflow_rule_nobody_out():
    overflown = torch.tensor([1.0, torch.inf])
    assert measuring.agree(overflown, torch.tensor([torch.nan, 1.0]))
    assert not measuring.agree(torch.tensor([torch.nan]), torch.tensor([1.0]))


@pytest.mark.gpu
@foreign_warnings
@pytest.mark.parametrize("needs_grad", [False, True])
def test_picks_on_a_gpu_are_measured_once_kept_and_without_trace(cache, monkeypatch, needs_grad):
    q, k, v = tensors(n=91, needs_grad=needs_grad, device="cuda", dtype=torch.bfloat16)
    mask = Mask((1, 4, 9, 16, 25, 36))
    state, told, flops = torch.cuda.get_rng_state(), [], []
    with choices_told_to(lambda *words: told.append(words)):
        for _ in range(2):
            with FlopCounterMode(display=False) as counter:
                out = build().attend(q, k, v, mask, 0.3)
            flops.append(counter.get_total_flops())
            monkeypatch.setattr(auto, "fastest", None)
    expected = build(MathAttention).attend(q, k, v, mask, 0.3)
    assert (out - expected).abs().max() <= 3e-2 * expected.abs().max()
    assert flops[0] == flops[1]
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert told[0] == told[1] and " ms" in told[0][3]
    assert sandbox.device_name(q.device) in cache.read_text()
    print(told[0])


@pytest.mark.gpu
@foreign_warnings
def test_what_is_captured_replays_the_pick_of_the_call_before(monkeypatch):
    q, k, v = tensors(n=91, device="cuda", dtype=torch.bfloat16)
    backend, masks = build(), (Mask(), Mask((1, 4, 9, 16, 25, 36)))
    eager = [backend.attend(q, k, v, mask, 0.3) for mask in masks]
    graph = torch.cuda.CUDAGraph()
    monkeypatch.setattr(auto, "fastest", None)
    with torch.cuda.graph(graph):
        captured = [backend.attend(q, k, v, mask, 0.3) for mask in masks]
        unmet = backend.attend(q[:, :, :7], k, v, Mask(), 0.3)
    graph.replay()
    assert all(map(torch.equal, captured, eager))
    assert torch.equal(unmet, build(SdpaAttention).attend(q[:, :, :7], k, v, Mask(), 0.3))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cached", "sdpa"])
def test_what_is_appended_goes_to_the_cached_kernel_where_that_was_picked_before(monkeypatch, name):
    picks = Pick(name, "so it is")
    monkeypatch.setattr(auto, "fastest", lambda *_: picks)
    backend = build()
    qkv, past = torch.randn(2, 3, 96, device="cuda"), torch.randn(2, 2, 2, 8, 16, device="cuda")
    with torch.no_grad():
        assert backend.attend_appending(qkv, past, 2, 1.0, None) is None
        q = qkv[..., :32].view(2, 3, 2, 16).transpose(1, 2)
        backend.attend(q, *past[:, :, :, :5], Mask(), 1.0)
        found = backend.attend_appending(qkv, past, 2, 1.0, None)
        assert (found is None) == (name == "sdpa")
        if found is not None:
            torch.testing.assert_close(found, backend.attend(q, *past[:, :, :, :5], Mask(), 1.0))
