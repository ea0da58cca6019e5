import dataclasses
import importlib.util
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from sandbox import AttentionBackend, AttentionRequest, Mask
from sandbox.plugins import load_plugins
from sandbox.testing import attention_law
from sandbox_plugins.attention import (
    AutoAttention,
    CachedAttention,
    CudnnAttention,
    FlexAttention,
    MathAttention,
    PrefixAttention,
    SdpaAttention,
    StepsAttention,
    XformersAttention,
    kernels,
    prefix,
)

# Compilers and xformers warn of their own affairs (TF32, what they themselves call of Triton).
foreign_warnings = pytest.mark.filterwarnings("default")

OTHERS = [
    *(AutoAttention, SdpaAttention, CudnnAttention),
    *(PrefixAttention, FlexAttention, XformersAttention, CachedAttention, StepsAttention),
]


def build(cls):
    return cls(cls.Params())


def queries_keys_values(seed, b, heads, n, p, e, needs_grad=True, **options):
    rng = torch.Generator().manual_seed(seed)
    shapes = (b, heads, n, e), (b, heads, p, e), (b, heads, p, e)
    drawn = (torch.randn(shape, generator=rng).to(**options) for shape in shapes)
    return [x.requires_grad_(needs_grad) for x in drawn]


def request_of(q, k, mask):
    return AttentionRequest(
        str(q.device), q.dtype, q.shape[-1], q.shape[-2], k.shape[-2], mask, q.requires_grad
    )


def outcome(backend, q, k, v, mask, scale):
    """The output and, where asked for, the gradients of a fixed weighted sum of it."""
    out = backend.attend(q, k, v, mask, scale)
    if not q.requires_grad:
        return [out]
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad((out * weights).sum(), (q, k, v))]


@st.composite
def calls(draw):
    """Masks of every kind with queries and keys that fit them."""
    lens = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    seed, kind = draw(st.integers(0, 2**16)), draw(st.sampled_from(["steps", "none", "dense"]))
    n = p = sum(lens)
    mask = Mask(lens)
    if kind != "steps":
        p = n + draw(st.integers(0, 3))
        mask = Mask()
    if kind == "dense":
        dense = torch.rand(n, p, generator=torch.Generator().manual_seed(seed)) < 0.5
        dense[:, draw(st.integers(0, p - 1))] = True
        mask = Mask(dense=dense)
    b, heads, e = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.sampled_from([4, 8]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    needs_grad = draw(st.booleans())
    return mask, queries_keys_values(seed, b, heads, n, p, e, needs_grad, dtype=dtype)


@pytest.mark.parametrize("cls", OTHERS)
@given(call=calls())
def test_every_backend_equals_the_plain_formula_or_refuses_with_a_reason(cls, call):
    mask, (q, k, v) = call
    backend = build(cls)
    if reason := backend.refusal(request_of(q, k, mask)):
        assert len(reason) > 10
        with pytest.raises(ValueError, match="cannot honour this call"):
            backend.attend(q, k, v, mask, 0.3)
        return
    expected = outcome(build(MathAttention), q, k, v, mask, 0.3)
    for ours, plain in zip(outcome(backend, q, k, v, mask, 0.3), expected, strict=True):
        torch.testing.assert_close(ours, plain)


@given(call=calls())
def test_the_plain_formula_is_the_mean_of_the_values_that_a_query_may_see(call):
    mask, (q, k, v) = call
    allowed = mask.to_tensor()
    if allowed is None:
        allowed = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool)
    out = build(MathAttention).attend(torch.zeros_like(q), k, v, mask, 1.0)
    for row, seen in enumerate(allowed):
        torch.testing.assert_close(out[:, :, row], v[:, :, seen].mean(dim=2))


def test_half_precision_is_computed_in_float32_by_the_plain_formula():
    q, k, v = queries_keys_values(0, 1, 2, 14, 14, 8, needs_grad=False)
    mask, plain = Mask((1, 4, 9)), build(MathAttention)
    low = plain.attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask, 1.0)
    rounded = (x.bfloat16().float() for x in (q, k, v))
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, plain.attend(*rounded, mask, 1.0).bfloat16())


@pytest.mark.parametrize("cls", [MathAttention, *OTHERS])
@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (Mask((1, 4, 8)), "13 tokens, but there are 14 queries, 14 keys"),
        (Mask((13,)), "13 tokens"),
        (Mask(dense=torch.ones(14, 13, dtype=torch.bool)), "a dense mask must be booleans"),
        (Mask(dense=torch.zeros(14, 14)), "a dense mask must be booleans"),
        (Mask(dense=torch.zeros(14, 14, dtype=torch.bool)), "may look at no key"),
    ],
)
def test_no_backend_honours_a_mask_that_does_not_fit(cls, mask, reason):
    q, k, v = queries_keys_values(0, 1, 1, 14, 14, 8, needs_grad=False)
    assert reason in build(cls).refusal(request_of(q, k, mask))
    with pytest.raises(ValueError, match=reason):
        build(cls).attend(q, k, v, mask, 1.0)


@pytest.mark.parametrize("cls", [MathAttention, *OTHERS])
def test_whole_numbers_are_refused(cls):
    request = AttentionRequest("cpu", torch.int64, 8, 4, 4, Mask(), False)
    assert "floating-point" in build(cls).refusal(request)


REQUEST = AttentionRequest("cuda", torch.bfloat16, 64, 14, 14, Mask((1, 4, 9)), True)


@pytest.mark.parametrize(
    ("cls", "change", "reason"),
    [
        (CudnnAttention, {"device": "cpu"}, "CUDA devices only"),
        (CudnnAttention, {"dtype": torch.float32}, "16 bits only"),
        (XformersAttention, {"device": "cpu"}, "CUDA devices only"),
        (XformersAttention, {"dtype": torch.float64}, "no kernel for torch.float64"),
        (FlexAttention, {"device": "cpu"}, "no backward pass on a CPU"),
        (FlexAttention, {"device": "mps"}, "not offered on mps"),
        (FlexAttention, {"head_dim": 8}, "at least 16 channels, got 8"),
        (FlexAttention, {"dtype": torch.float64}, "no float64 kernel"),
    ],
)
def test_a_backend_says_what_it_cannot_honour(cls, change, reason):
    assert reason in build(cls).refusal(dataclasses.replace(REQUEST, **change))


def test_flex_on_cuda_and_forward_passes_of_flex_on_a_cpu_are_honoured():
    assert build(FlexAttention).refusal(REQUEST) is None
    forward = dataclasses.replace(REQUEST, device="cpu", needs_grad=False)
    assert build(FlexAttention).refusal(forward) is None


@pytest.mark.parametrize("num_keys", [8, 14, 29, 680])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_rows_of_a_bias_for_xformers_are_aligned(num_keys, dtype):
    allowed = torch.rand(5, num_keys, generator=torch.Generator().manual_seed(0)) < 0.5
    bias = kernels._bias(allowed, dtype).expand(2, 3, 5, num_keys)
    assert bias.stride(-2) % 8 == 0 and bias.stride(-1) == 1 and bias.data_ptr() % 16 == 0
    assert torch.equal(bias[1, 2] == 0, allowed) and torch.equal(bias[1, 2].isinf(), ~allowed)


def test_an_xformers_that_cannot_be_loaded_is_a_refusal(monkeypatch):
    def broken():
        raise OSError("libcudart.so.12: cannot\n open")

    monkeypatch.setattr(kernels, "_xformers_ops", broken)
    request = dataclasses.replace(REQUEST, head_dim=72)  # of no other test: refusals are kept
    reason = build(XformersAttention).refusal(request)
    assert reason == "xformers cannot be loaded: OSError: libcudart.so.12: cannot open"


def test_xformers_is_not_imported_before_it_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "xformers", None)  # importing it is now an ImportError
    q, k, _ = queries_keys_values(0, 1, 1, 4, 4, 8, needs_grad=False)
    place = importlib.util.spec_from_file_location(
        "sandbox_plugins.attention.anew", kernels.__file__
    )
    fresh = importlib.util.module_from_spec(place)
    place.loader.exec_module(fresh)
    assert "CUDA" in build(fresh.XformersAttention).refusal(request_of(q, k, Mask()))


def test_a_mask_first_met_in_inference_mode_can_be_trained_with_later():
    q, k, v = queries_keys_values(0, 1, 1, 12, 12, 8)
    mask = Mask((3, 2, 7))
    for cls in (MathAttention, SdpaAttention):
        with torch.inference_mode():
            build(cls).attend(q.detach(), k.detach(), v.detach(), mask, 1.0)
        assert all(x.isfinite().all() for x in outcome(build(cls), q, k, v, mask, 1.0))


ODD = Mask(dense=torch.arange(37) <= torch.arange(29)[:, None] + 8)
PUBLISHED = tuple(side**2 for side in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
ON_CUDA = {
    "full": (Mask(), 29, 37),
    "causal": (Mask((1,) * 45), 45, 45),
    "unaligned steps": (Mask((1, 4, 9, 16)), 30, 30),
    "steps over several blocks": (Mask((1, 4, 16, 36, 64, 100)), 221, 221),
    "published steps": (Mask(PUBLISHED), 680, 680),
    "dense": (ODD, 29, 37),
}
TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 5e-2, torch.float32: 5e-3}
MAY_REFUSE = {"cudnn", "xformers", "cached", "steps"}
"""What depends on the GPU, and on what was built for it; or is for one kind of mask alone."""


@pytest.fixture
def own_picks(tmp_path, monkeypatch):
    """`auto` measures anew."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCH_HOME", raising=False)


def registered():
    return {e.name: e.cls for e in load_plugins() if e.interface is AttentionBackend}


def on_cuda(num_queries, num_keys, dtype, needs_grad):
    return queries_keys_values(
        0, 2, 3, num_queries, num_keys, 64, needs_grad, device="cuda", dtype=dtype
    )


def skip_refused(name, backend, q, k, mask):
    if reason := backend.refusal(request_of(q, k, mask)):
        assert name in MAY_REFUSE, reason
        pytest.skip(reason)


@pytest.mark.parametrize("lens", [(1, 2, 3, 4), (3, 1, 4), (1, 1, 2), (4, 5), (3, 1, 1, 5, 2)])
def test_prefixes_attend_as_the_whole_does(monkeypatch, lens):
    monkeypatch.setattr(prefix, "LARGE", 3)
    backend = build(PrefixAttention)
    q, k, v = queries_keys_values(0, 2, 2, sum(lens), sum(lens), 4)
    found = outcome(backend, q, k, v, Mask(lens), 0.3)
    for ours, plain in zip(
        found, outcome(build(MathAttention), q, k, v, Mask(lens), 0.3), strict=True
    ):
        torch.testing.assert_close(ours, plain)
    with torch.no_grad():
        torch.testing.assert_close(backend.attend(q, k, v, Mask(lens), 0.3), found[0])


def test_small_steps_share_a_call(monkeypatch):
    monkeypatch.setattr(prefix, "LARGE", 3)
    assert prefix.groups_of((1, 2, 3, 4, 1, 5, 1, 1)) == [
        (0, 3, True),
        (3, 6, False),
        (6, 10, False),
        (10, 11, False),
        (11, 16, False),
        (16, 18, True),
    ]


@pytest.mark.gpu
@foreign_warnings
@pytest.mark.usefixtures("own_picks")
@pytest.mark.parametrize("call", ON_CUDA.values(), ids=ON_CUDA)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", registered())
def test_every_backend_obeys_the_law_on_a_gpu(name, dtype, call):
    reason = attention_law(
        build(registered()[name]),
        *call,
        heads=3,
        head_dim=64,
        device="cuda",
        dtype=dtype,
        tolerance=TOLERANCE[dtype],
    )
    if reason:
        assert name in MAY_REFUSE, reason
        pytest.skip(reason)


@pytest.mark.gpu
@foreign_warnings
@pytest.mark.usefixtures("own_picks")
@pytest.mark.parametrize("name", registered())
def test_stepwise_calls_of_many_lengths_are_honoured_on_a_gpu(name):
    backend = build(registered()[name])
    for step in range(1, 14):
        call = Mask(), 2 * step + 1, step * (step + 2)
        attention_law(
            backend,
            *call,
            head_dim=64,
            seed=step,
            device="cuda",
            dtype=torch.half,
            needs_grad=False,
            tolerance=1e-2,
        )


@pytest.mark.gpu
@foreign_warnings
@pytest.mark.usefixtures("own_picks")
@pytest.mark.parametrize("name", registered())
def test_compiled_code_attends_alike(name):
    mask, n, p = ON_CUDA["steps over several blocks"]
    q, k, v = on_cuda(n, p, torch.bfloat16, True)
    backend = build(registered()[name])
    skip_refused(name, backend, q, k, mask)
    if rehearse := getattr(backend, "rehearse", None):
        rehearse(q, k, v, mask, 0.2)

    def doubled(q, k, v):
        return 2 * backend.attend(q, k, v, mask, 0.2)

    expected = outcome(build(MathAttention), q, k, v, mask, 0.2)
    out = torch.compile(doubled, dynamic=False)(q, k, v)
    weights = torch.linspace(-1, 1, out.numel(), device="cuda").view(out.shape).to(out.dtype)
    found = [out, *torch.autograd.grad((out * weights).sum(), (q, k, v))]
    for ours, plain in zip(found, expected, strict=True):
        assert (ours / 2 - plain).abs().max() <= 3e-2 * plain.abs().max()


@pytest.mark.gpu
@foreign_warnings
@pytest.mark.usefixtures("own_picks")
@pytest.mark.parametrize("call", [ON_CUDA["full"], ON_CUDA["steps over several blocks"]])
@pytest.mark.parametrize("name", registered())
def test_a_cuda_graph_replays_what_was_called_before(name, call):
    mask, n, p = call
    q, k, v = on_cuda(n, p, torch.bfloat16, False)
    backend = build(registered()[name])
    skip_refused(name, backend, q, k, mask)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        backend.attend(q, k, v, mask, 0.2)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = backend.attend(q, k, v, mask, 0.2)
    for x in (q, k, v):
        x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, backend.attend(q, k, v, mask, 0.2))


@pytest.mark.gpu
@foreign_warnings
@pytest.mark.parametrize(
    "kernel",
    [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION],
    ids=lambda kernel: kernel.name,
)
@pytest.mark.parametrize("masked", [True, False])
def test_each_fused_kernel_of_pytorch_honours_what_sdpa_gives_it(kernel, masked):
    if masked and kernel is SDPBackend.FLASH_ATTENTION:
        pytest.skip("flash attention takes no mask; PyTorch goes to another kernel then")
    mask, n, p = ON_CUDA["published steps" if masked else "full"]
    with sdpa_kernel(kernel):
        attention_law(
            build(SdpaAttention),
            mask,
            n,
            p,
            head_dim=64,
            device="cuda",
            dtype=torch.bfloat16,
            tolerance=5e-2,
        )


@pytest.mark.gpu
@foreign_warnings
def test_xformers_names_its_own_limit_of_the_head_size():
    q, k, v = queries_keys_values(0, 1, 1, 14, 14, 12, device="cuda", dtype=torch.bfloat16)
    fits = dataclasses.replace(request_of(q, k, Mask((1, 4, 9))), head_dim=64)
    if reason := build(XformersAttention).refusal(fits):
        pytest.skip(reason)
    reason = build(XformersAttention).refusal(request_of(q, k, Mask((1, 4, 9))))
    assert "% 8" in reason
    with pytest.raises(ValueError, match="% 8"):
        build(XformersAttention).attend(q, k, v, Mask((1, 4, 9)), 1.0)


@pytest.mark.gpu
@foreign_warnings
@pytest.mark.usefixtures("own_picks")
@pytest.mark.parametrize("lens", [(130,), (1, 4, 9, 16, 100)], ids=["full", "steps"])
@pytest.mark.parametrize("name", registered())
def test_on_a_gpu_no_gradient_depends_on_where_the_outputs_lies(name, lens):
    backend, mask = build(registered()[name]), Mask(lens) if len(lens) > 1 else Mask()
    q, k, v = queries_keys_values(0, 2, 3, 130, 130, 64, device="cuda", dtype=torch.bfloat16)
    if backend.refusal(request_of(q, k, mask)):
        pytest.skip("refused")
    pull = torch.randn(2, 3, 130, 64, device="cuda", dtype=torch.bfloat16)
    beside = pull.transpose(1, 2).contiguous().transpose(1, 2)
    inside = torch.cat([pull, pull], 2)[:, :, 130:]
    wanted, *others = (
        torch.autograd.grad(backend.attend(q, k, v, mask, 0.3), (q, k, v), laid)
        for laid in (pull, beside, inside, pull)
    )
    for found in others:
        for one, other in zip(wanted, found, strict=True):
            torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)
