"""Kernels overlap where they can and may, and each waits before it touches memory."""

import ast
import re
import sys
from pathlib import Path

import pytest
import torch

import sandbox
from sandbox import launching

HOPPER = torch.device("cuda", 7)
APART = {"OVERLAPS": False}


@pytest.fixture
def capability(monkeypatch):
    """Set what the GPU is said to be."""
    monkeypatch.setattr(torch.version, "hip", None)
    launching._able.cache_clear()
    yield lambda *found: monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: found)
    launching._able.cache_clear()


def test_kernels_overlap_on_gpus_that_can_unless_they_are_wanted_one_by_one(capability):
    pytest.importorskip("triton", reason="triton is not there on this platform")
    capability(9, 0)
    together = {"OVERLAPS": True, "launch_pdl": True}
    assert sandbox.overlapping(HOPPER) == together
    with sandbox.one_by_one():
        with sandbox.one_by_one():
            assert sandbox.overlapping(HOPPER) == APART
        assert sandbox.overlapping(HOPPER) == APART
    assert sandbox.overlapping(HOPPER) == together
    assert sandbox.overlapping(torch.device("cpu")) == APART


def test_older_gpus_and_other_makers_do_without(capability, monkeypatch):
    capability(8, 9)
    assert sandbox.overlapping(HOPPER) == APART
    launching._able.cache_clear()
    capability(9, 4)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert sandbox.overlapping(HOPPER) == APART


@pytest.mark.parametrize("missing", ["triton", "triton.language.extra.cuda"])
def test_a_triton_that_knows_nothing_of_it_does_without(capability, monkeypatch, missing):
    capability(9, 0)
    monkeypatch.setitem(sys.modules, missing, None)
    assert sandbox.overlapping(HOPPER) == APART


def test_interpreted_kernels_do_without(capability, monkeypatch):
    triton = pytest.importorskip("triton", reason="triton is not there on this platform")
    capability(9, 0)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert sandbox.overlapping(HOPPER) == APART


def kernels():
    """Each with its constants, and what its other arguments are that are no whole numbers."""
    from sandbox_plugins.attention import cached_kernel
    from sandbox_plugins.autoencoders import convolving_kernels, leaving, norm_kernels
    from sandbox_plugins.var import gating, kernel, painting, reading, skinny_kernels

    halves = lambda names: dict.fromkeys(names.split(), "*bf16")  # noqa: E731
    few = {"ROWS": 16, "CHANNELS": 16, "STEP": 128, "OUT": 128}
    few_in, few_out = {**few, "D": 256, "GELU": True}, {**few, "HEADS": 4, "E": 128}
    gated = halves("y weight bias gate residual out")
    sums = {"partial": "*fp32", "arrived": "*i32"}
    yield skinny_kernels.linear, few_in, halves("x weight bias out")
    yield skinny_kernels.gated_linear, {**few_out, "SPLITS": 2}, {**gated, **sums}
    yield skinny_kernels.gated_linear, {**few_out, "SPLITS": 1, **dict.fromkeys(sums)}, gated
    widths = {"D": 96, "BLOCK": 128}
    yield gating._gated_norm, widths, halves("x y gate shift scale added normed")
    placed = {**halves("qkv queries past"), "log_scale": "*fp32"}
    yield kernel._place, {"HEADS": 2, "E": 32, "HELD": 2}, placed
    for once in (True, False):
        seen = {"E": 32, "QUERIES": 16, "KEYS": 32, "ONCE": once}
        yield cached_kernel._attend, seen, {**halves("q k v out"), "scale": "fp32"}
        appended = {**halves("qkv past out"), "log_scale": "*fp32", "cap": "fp32", "scale": "fp32"}
        yield cached_kernel._append, {**seen, "NEW": 16}, appended
    yield from of_norms(norm_kernels, halves)
    yield from of_strips(convolving_kernels, leaving, halves)
    floats = lambda names: dict.fromkeys(names.split(), "*fp32")  # noqa: E731
    sizes = {"W": 3, "H": 3, "C": 16, "COLUMNS": 16, "WIDTH": 16}
    painted = {**sizes, "ROWS": 16, "TRIPLE": 64, "BLOCK": 16}
    arguments = floats("canvas codes rows columns weight bias out")
    yield painting._paint, painted, {**arguments, "ratio": "fp32"}
    yield painting._shrink, {**sizes, "CHANNELS": 16}, floats("canvas rows columns out")
    read = {"C": 16, "D": 128, "WIDTH": 16, "TOKENS": 16, "CHANNELS": 128}
    yield reading._read, read, {"contexts": "*fp32", **halves("weight bias places out")}


def of_norms(norm_kernels, halves):
    maps, tile = halves("first first_bias second second_bias summed"), {"WIDTH": 32, "ROWS": 16}
    learned = {"weight": "*fp32", "bias": "*fp32", "eps": "fp32"}
    moments = {"moments": "*fp32"}
    strips = {"APART": True, "TO_APART": True}
    yield norm_kernels.sum_up, {"D": 32, **tile, **strips}, {**maps, **moments}
    parts = {"D": 64, "CHANNELS": 2, "SHARES": 4, "BLOCK": 4, "WIDTH": 2, "REPEATS": 4}
    yield norm_kernels.finish, parts, {**moments, "scales": "*fp32", **learned}
    applied = {**halves("maps bias out"), "scales": "*fp32"}
    strips = {"APART": True, "TO_STRIP": True, "ROUNDED": True}
    yield norm_kernels.apply, {"D": 32, **tile, **strips, "SILU": True}, applied
    group = {"D": 64, "CHANNELS": 2, "BLOCK": 16, "WIDTH": 2, "SILU": True}
    yield norm_kernels.held, group, {**maps, **halves("out"), **learned}


def of_strips(convolving_kernels, leaving, halves):
    def tiles(names, *sizes):
        return dict.fromkeys(names.split(), f"tensordesc<bf16{list(sizes)}>")

    taken = {"E": 96, "TILE": 64, "BLOCK": 32, "FIRST": 64, "REST": 32}
    windows = tiles("windows last_windows", 1, 64, 32)
    read = {**windows, **tiles("weight last_weight", 64, 32)}
    read |= tiles("rest_weight last_rest_weight", 32, 32)
    added = {**tiles("out beside", 1, 64, 64), **tiles("rest_out rest_beside", 1, 64, 32)}
    sums = {**halves("bias beside_bias"), "moments": "*fp32"}
    yield convolving_kernels.convolve, {"WINDOW": 96, **taken}, {**read, **added, **sums}
    doubled = {**read, **halves("out bias"), "moments": "*fp32"}
    yield convolving_kernels.convolve_doubled, {"WINDOW": 64, **taken}, doubled
    taps = {"scales": "*fp32", "taps": "*fp32"}
    sizes = {"D": 64, "BLOCK": 32, "COUNT": 27, "MOST": 32, "TILE": 64}
    yield leaving._tap, sizes, {**halves("maps bias weight"), **taps}
    yield leaving._tap, sizes, {**dict.fromkeys(("maps", "bias", "weight"), "*fp32"), **taps}
    yield leaving._gather, {"E": 3, "SIZE": 64}, {**halves("bias out"), "taps": "*fp32"}


def ptx(kernel, constants, types):
    """What is built of it for Hopper."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    constants = {**constants, "OVERLAPS": True}
    types = {
        **dict.fromkeys(kernel.arg_names, "i32"),
        **types,
        **dict.fromkeys(constants, "constexpr"),
    }
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    options = {"num_warps": 4, "num_stages": 4, "launch_pdl": True}
    return compile(ASTSource(kernel, types, values), GPUTarget("cuda", 90, 32), options).asm["ptx"]


def test_every_kernel_that_may_overlap_is_looked_at():
    pytest.importorskip("triton", reason="triton is not there on this platform")
    plugins = Path(__file__).parents[1] / "plugins"
    named = {
        (path.stem, node.name)
        for path in plugins.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and "OVERLAPS" in [a.arg for a in node.args.args]
    }
    looked = {(kernel.fn.__module__.split(".")[-1], kernel.fn.__name__) for kernel, *_ in kernels()}
    assert looked == named and named


def test_what_is_built_waits_before_it_touches_memory(monkeypatch, tmp_path):
    pytest.importorskip("triton", reason="triton is not there on this platform")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    touches = re.compile(r"\b(ld|st|atom|red)\.[\w.:]*global|\bcp\.async|\bbra\b|\bret\b")
    for kernel, *how in kernels():
        before, after = ptx(kernel, *how).split("griddepcontrol.wait;")  # once, in all programs
        assert not touches.search(before) and touches.search(after), kernel
        assert after.count("griddepcontrol.launch_dependents;") == 1
