"""Canvases by Triton kernels: what they paint and shrink is what the plain pyramid does."""

import pytest
import torch
from processes import python

from sandbox import Layout
from sandbox_plugins.var import tokenizer as of_var
from sandbox_plugins.var.pyramid import Pyramid, painter_for

SMALL = [((1, 2, 3), 4), (((1, 1), (2, 3), (3, 5)), 5), (((1, 1), (2, 17)), 1)]
PUBLISHED = ((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 32)


def check(sides, c, device="cpu", b=2):
    from sandbox_plugins.var import painting

    torch.manual_seed(0)
    layout = Layout.pyramid(*sides)
    pyramid = Pyramid(layout).to(device)
    conv = torch.nn.Conv2d(c, c, 3, padding=1, device=device)
    ids = torch.randn(b, layout.seq_len, c, device=device)
    together = {"memory_format": torch.channels_last}
    for step, span in enumerate(layout.spans):
        canvas, codes = torch.randn(b, c, *layout.size, device=device), ids[:, span]
        with torch.no_grad():
            maps = pyramid.grow(codes, step)
            for phi, grown in [
                (None, maps),
                ((conv.weight, conv.bias, 0.3), maps.lerp(conv(maps), 0.3)),
                ((conv.weight.contiguous(**together), conv.bias, 1.0), conv(maps)),
            ]:
                matrices = pyramid.matrices("bicubic", step)
                for given in (canvas, canvas.contiguous(**together)):
                    found = painting.paint(given, codes, *matrices, phi)
                    assert found.is_contiguous(**together)
                    torch.testing.assert_close(found, canvas + grown, rtol=1e-5, atol=2e-5)
            found = painting.shrink(canvas, *pyramid.matrices("area", step))
            shrunk = pyramid.shrink(canvas, step).flatten(2).mT
            torch.testing.assert_close(found, shrunk, rtol=1e-5, atol=2e-6)


INTERPRETED = """
from test_painting import *

for sides, c in SMALL:
    check(sides, c, b=1)
print("agreed")
"""


def test_interpreted_the_kernels_paint_and_shrink():
    pytest.importorskip("triton", reason="triton is not there on this platform")
    assert python(INTERPRETED, TRITON_INTERPRET="1") == "agreed\n"


def test_a_cpu_has_no_painter():
    with torch.no_grad():
        assert painter_for(torch.zeros(1, 4, 2, 2)) is None


@pytest.mark.gpu
@pytest.mark.parametrize(("sides", "c"), [*SMALL, ((1, 17), 1), PUBLISHED])
def test_a_gpu_paints_and_shrinks(sides, c):
    from sandbox import exact_float32

    with exact_float32(torch.device("cuda")):
        for b in (1, 3, 70):
            check(sides, c, "cuda", b)


@pytest.mark.gpu
def test_a_tokenizer_paints_by_kernels_where_no_gradients_are_asked_for(monkeypatch):
    from test_var_tokenizer import build

    tokenizer = build((1, 2, 3)).cuda()
    ids = torch.randint(tokenizer.vocab_size, (2, tokenizer.layout.seq_len), device="cuda")
    canvas = tokenizer.canvas(2)
    with torch.no_grad():
        assert painter_for(canvas) and not painter_for(canvas.bfloat16())
        found = tokenizer.contexts(ids), tokenizer.decode(ids)
        monkeypatch.setattr(of_var, "painter_for", lambda canvas: None)
        plain = tokenizer.contexts(ids), tokenizer.decode(ids)
    assert painter_for(canvas) is None
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
