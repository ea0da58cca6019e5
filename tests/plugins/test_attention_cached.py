"""`cached` gives what the formula gives, of slices of a cache, and reads nothing beyond them.

Where there is no GPU, Triton's interpreter checks the arithmetic on small shapes.
"""

import dataclasses
import sys
from itertools import accumulate

import pytest
import torch
from einops import rearrange
from processes import python
from torch.nn import functional as F

from sandbox import AttentionRequest, Mask
from sandbox.replay import Recording
from sandbox_plugins.attention import CachedAttention, MathAttention, SdpaAttention, cached, plain

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Of the largest: about one step between numbers of the type."""
PUBLISHED = tuple(side**2 for side in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
REQUEST = AttentionRequest("cuda", torch.bfloat16, 64, 14, 30, Mask(), False)


def build(cls=CachedAttention):
    return cls(cls.Params())


def drawn(b, heads, n, p, e, dtype, device="cpu", seed=0):
    """Queries heads beside channels, and a cache that is longer than its keys; NaN beyond them."""
    rng = torch.Generator(device).manual_seed(seed)
    q = torch.randn(b, n, heads, e, generator=rng, device=device).to(dtype)
    past = torch.randn(2, b, heads, p + 3, e, generator=rng, device=device).to(dtype)
    past[:, :, :, p:] = torch.nan
    return q.transpose(1, 2), *past[:, :, :, :p]


def formula(q, k, v, scale):
    return build(MathAttention).attend(*(x.float() for x in (q, k, v)), Mask(), scale)


def assert_close(out, q, k, v, scale):
    assert out.dtype == q.dtype and out.transpose(1, 2).is_contiguous()
    expected = formula(q, k, v, scale)
    off = (out.float() - expected).abs().max() / expected.abs().max()
    assert off <= CLOSE[q.dtype], (tuple(q.shape), tuple(k.shape), float(off))


def assert_appends(attend, dtype, heads, e, n, start, seq_len, cosine, b=2, device="cpu"):
    """Against what is written down step by step, in float32."""
    rng = torch.Generator().manual_seed(n + start)
    qkv = torch.randn(b, n, 3 * heads * e, generator=rng).to(device, dtype)
    before = torch.randn(2, b, heads, seq_len, e, generator=rng).to(device, dtype)
    log_scale = torch.linspace(0.0, 3.0, heads, device=device).view(1, heads, 1, 1)
    past = before.clone()
    out = attend(qkv, past, start, 0.5, (log_scale, 2.0) if cosine else None)
    q, k, v = rearrange(qkv, "b n (three heads e) -> three b heads n e", three=3, heads=heads)
    if cosine:
        q = (F.normalize(q.float(), dim=-1) * log_scale.clamp_max(2.0).exp()).to(dtype)
        k = F.normalize(k.float(), dim=-1).to(dtype)
    torch.testing.assert_close(past[0, :, :, start : start + n], k)
    assert torch.equal(past[1, :, :, start : start + n], v)
    for part in (slice(0, start), slice(start + n, None)):
        assert torch.equal(past[:, :, :, part], before[:, :, :, part])
    assert_close(out, q, *past[:, :, :, : start + n], 0.5)


INTERPRETED = """
import pytest
import torch
from sandbox_plugins.attention import cached_kernel
from test_attention_cached import assert_appends, assert_close, drawn

for dtype in (torch.float32, torch.float16):  # interpreted, bits of bfloat16 are multiplied
    for e, scale in ((32, 1.0), (64, -0.3)):
        for n, p in ((1, 1), (5, 30), (17, 130), (17, 300)):
            call = *drawn(2, 3, n, p, e, dtype), scale
            assert_close(cached_kernel.attend(*call), *call)
q, k, v = drawn(1, 2, 5, 40, 32, torch.float32)
for call in [(q.expand(3, -1, -1, -1), k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1), 1.0),
             (q[..., ::2], k[..., 1::2], v[..., 16:], 1.0),
             (q, k.transpose(1, 2).contiguous().transpose(1, 2), v, 1.0),
             (40 * q, 40 * k, v, 1.0)]:
    assert_close(cached_kernel.attend(*call), *call)
for dtype, cosine in ((torch.float32, True), (torch.float16, True), (torch.float16, False)):
    for n, start in ((1, 0), (5, 14), (17, 40), (3, 150)):
        assert_appends(cached_kernel.append, dtype, 3, 32, n, start, 160, cosine)
cached_kernel.FILL = 1
assert_appends(cached_kernel.append, torch.float16, 1, 16, 60, 140, 215, True)
with pytest.raises(ValueError, match="have no place in a cache"):
    assert_appends(cached_kernel.append, torch.float32, 1, 16, 2, 3, 4, True)
for n in (20, 50, 150):
    call = *drawn(1, 2, n, 200, 16, torch.float16), 1.0
    assert_close(cached_kernel.attend(*call), *call)
print("agreed")
"""


def test_interpreted_it_gives_what_the_formula_gives():
    pytest.importorskip("triton", reason="triton is not there on this platform")
    assert python(INTERPRETED, TRITON_INTERPRET="1") == "agreed\n"


@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        ((2048, 1, 1, 64, torch.bfloat16), (16, 32)),
        ((2048, 25, 55, 64, torch.bfloat16), (32, 64)),
        ((2048, 36, 91, 64, torch.bfloat16), (64, 128)),
        ((2048, 169, 424, 64, torch.bfloat16), (64, 64)),  # 3 tiles, not 2 of which one is empty
        ((2048, 256, 680, 64, torch.bfloat16), (64, 64)),
        ((32, 256, 680, 64, torch.bfloat16), (64, 64)),  # 128 programs, not 64
        ((32, 100, 255, 64, torch.bfloat16), (32, 128)),
        ((32, 100, 255, 128, torch.bfloat16), (32, 64)),
        ((2048, 256, 680, 64, torch.float32), (32, 32)),
    ],
)
def test_tiles_are_as_large_as_fills_them_and_the_gpu(sizes, found):
    pytest.importorskip("triton", reason="triton is not there on this platform")
    from sandbox_plugins.attention import cached_kernel

    assert cached_kernel.tiles(*sizes) == found


def test_the_kernel_is_not_imported_before_it_is_needed():
    code = "import sys, sandbox_plugins.attention as a; print(hasattr(a, 'cached_kernel'))"
    assert python(code) == "False\n"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "cpu"}, "CUDA devices only, not on cpu"),
        ({"dtype": torch.float64}, "no kernels for a cache of torch.float64"),
        ({"head_dim": 48}, "not 48"),
        ({"head_dim": 256}, "not 256"),
        ({"num_keys": 14, "mask": Mask((1, 4, 9))}, "the mask is: steps"),
        ({"num_keys": 14, "mask": Mask((1,) * 14)}, "the mask is: causal"),
        ({"mask": Mask(dense=torch.ones(14, 30, dtype=torch.bool))}, "the mask is: dense"),
        ({"needs_grad": True}, "no backward pass"),
    ],
)
def test_it_says_what_it_cannot_honour(change, reason):
    assert reason in build().refusal(dataclasses.replace(REQUEST, **change))


KIND = "cpu", torch.float32, 32


def test_a_kernel_that_fails_its_trial_is_told_of_and_a_refusal():
    pytest.importorskip("triton", reason="triton is not there on this platform")
    with pytest.warns(UserWarning, match="without its Triton kernel, so slower"):
        assert "triton is not there, or cannot" in cached._untried.__wrapped__(*KIND)


def test_without_triton_it_refuses(monkeypatch):
    import sandbox_plugins.attention as package

    monkeypatch.delattr(package, "cached_kernel", raising=False)
    monkeypatch.setitem(sys.modules, "sandbox_plugins.attention.cached_kernel", None)
    assert "triton is not there" in cached._untried.__wrapped__(*KIND)


def test_what_watches_all_operations_sees_an_operator():
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v = drawn(1, 2, 5, 7, 16, torch.float32)
    with FlopCounterMode(display=False):
        out = build().compute(q, k, v, Mask(), 1.0)
    assert torch.equal(out, build(SdpaAttention).compute(q, k, v, Mask(), 1.0))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [2, 128])
def test_a_gpu_attends_to_every_step_of_the_published_schedule(dtype, rows):
    for n, p in zip(PUBLISHED, accumulate(PUBLISHED), strict=True):
        q, k, v = drawn(rows, 16, n, p, 64, dtype, "cuda", seed=n)
        assert_close(build().attend(q, k, v, Mask(), 0.3), q, k, v, 0.3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("e", plain.HEAD_DIMS)
@pytest.mark.parametrize("rows", [1, 40])
def test_a_gpu_attends_with_heads_and_tiles_of_all_sizes(dtype, e, rows):
    for n, p in [(1, 257), (5, 5), (17, 1000), (33, 64), (100, 129), (300, 128), (513, 700)]:
        q, k, v = drawn(rows, 5, n, p, e, dtype, "cuda", seed=n)
        assert_close(build().attend(q, k, v, Mask(), e**-0.5), q, k, v, e**-0.5)


@pytest.mark.gpu
def test_a_gpu_reads_tensors_however_they_lie_in_memory():
    q, k, v = drawn(4, 6, 33, 150, 64, torch.bfloat16, "cuda")
    away = torch.empty(k.numel() + 1, dtype=k.dtype, device="cuda")[1:].view(k.shape).copy_(k)
    for call in [
        (q.contiguous(), k, v),
        (q, away, v),
        (q, k.transpose(1, 2).contiguous().transpose(1, 2), v),
        (q[:1].expand_as(q), k[:, :1].expand_as(k), v),
        (q[..., ::2], k[..., 1::2], v[..., 32:]),
        (q[:1, :1, :1], k[:1, :1], v[:1, :1]),
    ]:
        assert_close(build().attend(*call, Mask(), 0.2), *call, 0.2)


@pytest.mark.gpu
def test_a_gpu_attends_beyond_the_reach_of_32_bits():
    past = torch.zeros(2, 130, 16, 16400, 64, dtype=torch.float16, device="cuda")
    past[:, :, :, 16000:16200].normal_()
    k, v = past[:, 127:, :, 16000:16200]
    q = torch.randn(3, 16, 20, 64, dtype=torch.float16, device="cuda")
    for call in [(q, k, v), (q, *past[:, 127:, :, 16000:16001])]:
        assert_close(build().attend(*call, Mask(), 0.2), *call, 0.2)


@pytest.mark.gpu
def test_one_build_is_for_all_numbers_of_keys_that_tile_alike():
    from sandbox_plugins.attention import cached_kernel

    def attended(sizes):
        for b, heads, n, p in sizes:
            build().attend(*drawn(b, heads, n, p, 64, torch.bfloat16, "cuda"), Mask(), 1.0)
        return sum(len(each[0]) for each in cached_kernel._attend.device_caches.values())

    before = attended([(2, 16, 1, 129)])
    assert attended([(2, 16, 1, 256), (1, 1, 1, 680), (2, 3, 5, 511), (16, 16, 16, 144)]) == before


@pytest.mark.gpu
def test_a_cuda_graph_follows_changed_queries_and_keys():
    q, k, v = drawn(2, 16, 25, 155, 64, torch.bfloat16, "cuda")

    def compute(q, rng):
        return build().attend(q, k, v, Mask(), 1.0)

    rng = torch.Generator("cuda")
    with torch.no_grad():
        recorded = Recording(compute, q, rng)
        for factor in (1.0, -0.5):
            q, k[:], v[:] = q * factor, k.flip(2), v * factor
            assert torch.equal(recorded(q, rng), compute(q, rng))
            assert_close(compute(q, rng), q, k, v, 1.0)


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # the compiler's own affairs
def test_compiled_code_attends_alike():
    q, k, v = drawn(2, 3, 25, 55, 64, torch.bfloat16, "cuda")
    backend = build()
    compiled = torch.compile(lambda q, k, v: 2 * backend.attend(q, k, v, Mask(), 0.2))
    with torch.no_grad():
        assert torch.equal(compiled(q, k, v), 2 * backend.attend(q, k, v, Mask(), 0.2))


def test_appending_is_for_drawing_on_a_gpu_alone():
    past = torch.zeros(2, 1, 2, 4, 16)
    with torch.no_grad():
        assert build().attend_appending(torch.zeros(1, 2, 96), past, 0, 1.0, None) is None
    assert not past.any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("b", [2, 16])
def test_a_gpu_appends_every_step_of_the_published_schedule(dtype, cosine, b):
    attend = torch.no_grad()(build().attend_appending)
    for n, end in zip(PUBLISHED, accumulate(PUBLISHED), strict=True):
        if n <= (32 if dtype == torch.float32 else 64):
            assert_appends(attend, dtype, 16, 64, n, end - n, 680, cosine, b, "cuda")
    assert_appends(attend, dtype, 3, 128, 30, 300, 340, cosine, b, "cuda")
    past = torch.zeros(2, b, 1, 80, 16, dtype=dtype, device="cuda")
    assert attend(torch.zeros(b, 65, 48).to(past), past, 0, 1.0, None) is None


@pytest.mark.gpu
def test_with_gradients_a_gpu_does_not_append():
    past = torch.zeros(2, 1, 2, 4, 16, device="cuda")
    assert build().attend_appending(torch.zeros(1, 2, 96).cuda(), past, 0, 1.0, None) is None
