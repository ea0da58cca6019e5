"""Products of float32 on a CPU."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from sandbox import products

SIZES = st.integers(1, 40)


def plainly(x, weight, bias, gelu):
    made = F.linear(x.double(), weight.double(), bias.double())
    return (F.gelu(made, approximate="tanh") if gelu else made).float()


@given(b=st.integers(0, 3), n=SIZES, d=SIZES, f=SIZES, gelu=st.booleans(), turned=st.booleans())
def test_they_are_those_of_a_linear_layer(b, n, d, f, gelu, turned):
    x, weight, bias = torch.randn(b, n, d), torch.randn(f, d), torch.randn(f)
    if turned:
        x, weight = x.mT.contiguous().mT, weight.T.contiguous().T
    made = products.onednn_linear(x, weight, bias, gelu)
    assert made.shape == (b, n, f) and made.is_contiguous()
    torch.testing.assert_close(made, plainly(x, weight, bias, gelu), rtol=1e-5, atol=1e-5)


def test_gelu_is_as_close_as_that_of_torch():
    x = torch.linspace(-12, 12, 4001)[:, None]
    one, none = torch.ones(1, 1), torch.zeros(1)
    exact = plainly(x, one, none, True)
    error = (products.onednn_linear(x, one, none, True) - exact).abs().max()
    assert error <= 2 * (F.gelu(x, approximate="tanh") - exact).abs().max()


@pytest.mark.parametrize("rows", [products.FEWEST - 1, products.FEWEST])
@pytest.mark.parametrize("gelu", [False, True])
def test_few_rows_and_what_is_not_finite_are_as_in_a_layer(rows, gelu):
    x, weight, bias = torch.randn(rows, 8), torch.randn(4, 8), torch.randn(4)
    x[0, 0], x[1, 1], x[2, 2] = torch.nan, torch.inf, 1e30
    made = products.onednn_linear(x, weight, bias, gelu)
    torch.testing.assert_close(made, plainly(x, weight, bias, gelu), equal_nan=True)


@pytest.mark.parametrize("rows", [products.FEWEST - 1, products.FEWEST])
def test_autocast_casts_nothing_of_it(rows):
    x, weight, bias = torch.randn(rows, 8), torch.randn(4, 8), torch.randn(4)
    assert products.suits_onednn(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert not products.suits_onednn(x, weight)
        made = products.onednn_linear(x, weight, bias)
    torch.testing.assert_close(made, F.linear(x, weight, bias))


def test_without_onednn_the_layer_itself_does_it(monkeypatch):
    def missing():
        raise AttributeError("no such operator")

    monkeypatch.setattr(products, "_onednn", missing)
    products.runs.cache_clear()
    try:
        x, weight, bias = torch.randn(20, 8), torch.randn(4, 8), torch.randn(4)
        assert not products.runs()
        assert torch.equal(products.onednn_linear(x, weight, bias), F.linear(x, weight, bias))
    finally:
        products.runs.cache_clear()


def test_the_operator_keeps_the_compilers_rules():
    made = torch.randn(2, 20, 8), torch.randn(4, 8), torch.randn(4)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(products.onednn_linear, (*made, True), test_utils=tests)
    torch.library.opcheck(products.onednn_linear, made, test_utils=tests)
