"""The Triton kernel keeps what the search in torch keeps, and draws what it would draw.

Where there is no GPU, Triton's interpreter checks the arithmetic on a few rows, with the masses
that torch finds: `exp` differs between a CPU and a GPU.
"""

import sys

import pytest
import torch
from processes import python
from scipy.stats import chisquare

from sandbox.replay import Recording
from sandbox_plugins.samplers import TopKTopP, likeliest
from sandbox_plugins.samplers.likeliest import _masses, search

ODD = torch.tensor([-torch.inf, -1e30, -2.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, 1.0000001, 3.0])
TOPS = [(0, 0.96), (900, 0.96), (1, 0.5), (900, 1.0), (17, 1 - 1e-9), (0, 1e-9), (5000, 0.7)]


def kinds_of_rows(rows, v, rng):
    """Smooth, tied, peaked, flat, all equal, and what is odd: each with a finite logit a row."""
    device = rng.device
    smooth = torch.randn(rows, v, device=device, generator=rng)
    odd = ODD.to(device)[torch.randint(len(ODD), (rows, v), device=device, generator=rng)]
    odd[:, v // 2] = -0.0
    return [3 * smooth, (smooth * 8).round() / 8, 100 * smooth, smooth / 999, 0 * smooth - 7, odd]


def rows_that_end_early_or_late(rows, v, rng):
    """What is clear after one sum, or only after the last bit; and masses that are equal."""
    device = rng.device
    smooth = torch.randn(rows, v, device=device, generator=rng)
    one, few = torch.ones_like(smooth), (smooth * 2).round()
    near = torch.where(smooth > 0, one, torch.nextafter(one, 2 * one))
    alone = torch.arange(v, device=device) == v // 3
    pairs = torch.arange(v, device=device) // 2 - v / 5
    shuffled = torch.rand(rows, v, device=device, generator=rng).argsort(dim=-1)
    hidden = torch.where(smooth > 0.5, smooth, -torch.inf)
    hidden[:, v // 2] = -40.0
    return [
        *(near, -near, near - 1, few * 2e-45),  # neighbours, and what is less than normal
        *(torch.where(alone, value, one) for value in (9.0, 0.0, -torch.inf)),
        *(pairs[shuffled], -(2.0 ** pairs[shuffled].abs()), smooth.bfloat16().float(), hidden),
    ]


INTERPRETED = """
import torch
from sandbox_plugins.samplers import kernel
from test_samplers_kernel import (
    _masses, kinds_of_rows, raced, rows_that_end_early_or_late, search
)

rng = torch.Generator().manual_seed(0)
for v, tops in {5: [(2, 0.6), (0, 0.9)], 97: [(30, 1 - 1e-9), (97, 0.5), (1, 1.0)]}.items():
    for logits in kinds_of_rows(1, v, rng):
        masses = _masses(logits)
        noise = torch.empty_like(logits).exponential_(generator=rng)
        for top in tops:
            assert torch.equal(kernel.narrow(logits, *top, masses), search(logits, *top)), top
        assert torch.equal(kernel.draw(logits, noise, *top, masses), raced(logits, noise, *top))
for v, tops in {6: [(1, 0.5), (5, 0.9), (0, 0.5)], 24: [(7, 0.96), (23, 1e-9), (0, 0.8)]}.items():
    for logits in rows_that_end_early_or_late(1, v, rng):
        masses = _masses(logits)
        for top in tops:
            assert torch.equal(kernel.narrow(logits, *top, masses), search(logits, *top)), top
print("agreed")
"""


def raced(logits, noise, top_k, top_p):
    """The ids as they are drawn without the kernel."""
    return (search(logits, top_k, top_p).softmax(-1) / noise).argmax(-1)


def test_interpreted_it_keeps_and_draws_what_the_search_does():
    pytest.importorskip("triton", reason="triton is not there on this platform")
    assert python(INTERPRETED, TRITON_INTERPRET="1") == "agreed\n"


def test_samplers_alone_bring_no_triton_in():
    code = "import sys, sandbox_plugins.samplers; print('triton' in sys.modules)"
    assert python(code) == "False\n"


def test_a_kernel_that_fails_its_trial_is_told_of_and_done_without():
    pytest.importorskip("triton", reason="triton is not there on this platform")
    with pytest.warns(UserWarning, match="without their Triton kernel, so slower"):
        assert likeliest._kernel.__wrapped__(torch.device("cpu")) is None


def test_without_triton_the_search_does_it(monkeypatch):
    import sandbox_plugins.samplers as package

    monkeypatch.delattr(package, "kernel", raising=False)
    monkeypatch.setitem(sys.modules, "sandbox_plugins.samplers.kernel", None)
    assert likeliest._kernel.__wrapped__(torch.device("cpu")) is None


def the_kernel():
    kernel = likeliest._kernel(torch.zeros(1, device="cuda").device)
    assert kernel is not None
    return kernel


def rng(seed=0):
    return torch.Generator("cuda").manual_seed(seed)


def assert_same_rows(logits, top, masses=None):
    ours, theirs = the_kernel().narrow(logits, *top, masses), search(logits, *top)
    differ = (ours != theirs).any(-1)
    assert not differ.any(), f"{int(differ.sum())} of {differ.numel()} rows differ, top {top}"


@pytest.mark.gpu
@pytest.mark.parametrize("v", [1, 2, 3, 33, 500, 512, 1024, 4095, 4096, 5000, 16384])
@pytest.mark.parametrize("loaded", [False, True])
def test_a_gpu_keeps_what_the_search_keeps_odd_rows_included(v, loaded):
    for logits in kinds_of_rows(13, v, rng()) + rows_that_end_early_or_late(13, v, rng()):
        for top in [*TOPS, (v - 1, 0.9), (v, 0.9), (2, 0.5), (v // 2, 0.5)]:
            assert_same_rows(logits, top, _masses(logits) if loaded else None)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "v"), [(2**14, 4096), (2**15, 1024)])
def test_a_gpu_keeps_what_the_search_keeps_in_a_million_rows(rows, v):
    """A mass that is off by its last bit would move the edge of some of these rows."""
    generator = rng(1)
    for turn in range(64):
        logits = 3 * torch.randn(rows, v, device="cuda", generator=generator)
        top = [(900, 0.96), (0, 0.96), (300, 0.5), (0, 0.8)][turn % 4]
        assert_same_rows(logits, top)
        assert_same_rows(logits, top, _masses(logits))


@pytest.mark.gpu
def test_a_gpu_takes_logits_however_they_lie_in_memory():
    logits = torch.randn(6, 7, 500, device="cuda", generator=rng())
    for view in (logits.chunk(2)[1], logits.transpose(0, 1), logits[..., 1::3], logits[:, 2:5]):
        assert_same_rows(view, (50, 0.9))
    assert_same_rows(logits[:1, :1].expand(3, 5, 500), (50, 0.9))


@pytest.mark.gpu
def test_a_gpu_has_the_kernel_for_what_it_can_do():
    logits = torch.zeros(2, 3, 16384, device="cuda")
    assert likeliest._kernel_for(logits) is the_kernel()
    for other in (logits.cpu(), logits[:0], logits[:, :0], logits.clone().requires_grad_()):
        assert likeliest._kernel_for(other) is None
    assert likeliest._kernel_for(torch.zeros(1, 1, 16385, device="cuda")) is None


@pytest.mark.gpu
@pytest.mark.parametrize("top", TOPS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_gpu_draws_the_ids_of_the_search(top, temperature):
    logits = 3 * torch.randn(16, 2048, 4096, device="cuda", generator=rng())
    settings = {"top_k": top[0], "top_p": top[1], "temperature": temperature}
    part = TopKTopP(TopKTopP.Params(**settings))
    noise = torch.empty_like(logits).exponential_(generator=rng(5))
    ids = part.draw(logits, 0.5, rng(5))
    assert ids.shape == (16, 2048) and ids.dtype == torch.int64
    plain = raced(logits / temperature, noise, *top)
    assert (ids != plain).double().mean() < 1e-4
    assert (part._narrowed(logits).gather(-1, ids[..., None]) > -torch.inf).all()


@pytest.mark.gpu
def test_the_draws_of_a_gpu_pass_a_chi_square_test():
    logits = 3 * torch.randn(1, 1, 40, device="cuda", generator=rng(3))
    part = TopKTopP(TopKTopP.Params(top_k=20, top_p=0.95))
    expected = search(logits, 20, 0.95).softmax(-1).flatten().double().cpu()
    ids = part.draw(logits.expand(1, 1_000_000, 40), 0.5, rng())
    counts, kept = ids.flatten().bincount(minlength=40).cpu(), expected > 0
    assert counts[~kept].sum() == 0
    frequencies = expected[kept] / expected[kept].sum()
    assert chisquare(counts[kept], 1_000_000 * frequencies).pvalue > 0.01


@pytest.mark.gpu
def test_a_cuda_graph_draws_the_same_ids():
    part = TopKTopP(TopKTopP.Params())
    first, second = torch.randn(2, 4, 64, 4096, device="cuda", generator=rng()).unbind()

    def compute(logits, generator):
        return part.draw(logits, 0.5, generator)

    recorded = Recording(compute, first, rng())
    for logits in (first, second):
        assert torch.equal(recorded(logits, rng(7)), compute(logits, rng(7)))
