"""`benchmarks/growth.py`: what it counts, how it fits, and that a tiny run keeps its numbers."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from sandbox import Layout

PATH = Path(__file__).parent.parent / "benchmarks/growth.py"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def growth():
    spec = importlib.util.spec_from_file_location("growth", PATH)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "growth", module)  # its dataclass looks itself up
        spec.loader.exec_module(module)
        yield module


def test_work_is_what_the_steps_add_up_to(growth):
    pyramid, raster = Layout.pyramid(1, 2, 3), Layout.raster(3, 4)
    work = growth.work_of("next-scale", pyramid)
    assert (work.steps, work.tokens, work.pairs) == (3, 14, 1 * 1 + 4 * 5 + 9 * 14)
    work = growth.work_of("raster", raster)
    assert (work.steps, work.tokens, work.pairs) == (12, 12, sum(range(13)))
    work = growth.work_of("raster, no cache", raster)
    assert work.tokens == sum(range(13)) and work.pairs == sum(n * n for n in range(13))


def test_sides_of_256_px_take_ten_steps_and_of_1024_px_fourteen(growth):
    layouts = {cells: growth.layout_of("next-scale", cells) for cells in (2, 8, 16, 64)}
    assert [len(layout.steps) for layout in layouts.values()] == [2, 8, 10, 14]
    assert all(layout.size == (cells, cells) for cells, layout in layouts.items())


def test_attention_leads_where_the_theory_says(growth):
    """A narrow network's FLOPs grow as attention does, a wide one's as linear layers do."""
    for way, theory in growth.THEORY.items():
        works = [growth.work_of(way, growth.layout_of(way, cells)) for cells in (64, 128)]
        for width, leading in ((8, "attention"), (2**20, "linear")):
            flops = [sum(work.flops(width, 2).values()) for work in works]
            rows = [{"resolution_px": n, "flops": f} for n, f in zip((1, 2), flops, strict=True)]
            slope = growth.exponents(rows, "flops")["last"]
            assert slope == pytest.approx(theory[leading], abs=0.3)


def test_what_has_no_cache_predicts_the_same(growth):
    layout = growth.layout_of("raster", 3)
    network = growth.network_of(layout, 32, 2, torch.device("cpu"))
    contexts = torch.randn(2, 9, growth.CODE_DIM, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 5])
    with torch.no_grad():
        whole = network(contexts, labels)
        for count in (1, 4, 9):
            last = growth.anew(network, contexts[:, :count], labels)
            torch.testing.assert_close(last, whole[:, count - 1 : count])


def test_evenly_spaced_lengths_have_the_mean_of_all(growth):
    assert growth.lengths(5, 9) == [1, 2, 3, 4, 5]
    found = growth.lengths(256, 8)
    assert len(found) == 8 and abs(sum(found) / 8 - 128.5) <= 1 and max(found) <= 256


def test_a_power_law_is_found(growth):
    rows = [{"resolution_px": n, "seconds": 3 * n**2.5} for n in (128, 256, 1024)]
    rows.append({"resolution_px": 2048, "status": "out of memory"})
    assert growth.exponents(rows, "seconds") == pytest.approx({"fitted": 2.5, "last": 2.5})
    assert growth.exponents(rows[:1], "seconds") is None


def test_a_tiny_run_keeps_numbers_table_and_picture(growth, tmp_path, monkeypatch, capsys):
    words = "--device cpu --precision float32 --resolutions 64 32 --width 32 --depth 1 --repeats 1"
    out = tmp_path / "growth"
    command = [str(PATH), *words.split(), "--uncached-steps", "2", "--out", str(out)]
    monkeypatch.setattr("sys.argv", command)
    growth.main()
    found = json.loads((out / "growth.json").read_text())
    assert found["complete"] is True
    where = [(row["way"], row["resolution_px"]) for row in found["rows"]]
    assert where == [(way, px) for way in growth.THEORY for px in (32, 64)]
    assert all(row["status"] == "ok" and row["seconds"] > 0 for row in found["rows"])
    assert all(way["seconds"]["fitted"] for way in found["ways"].values())
    assert (out / "growth.png").stat().st_size > 1000
    assert "| raster, no cache | 64 | 16 | 136 |" in capsys.readouterr().out


def test_a_run_that_is_stopped_keeps_its_rows(growth, tmp_path, monkeypatch):
    measured = growth.measured

    def stopped(way, cells, *others):
        if way == "raster, no cache":
            raise KeyboardInterrupt
        return measured(way, cells, *others)

    words = "--device cpu --precision float32 --resolutions 32 --width 32 --depth 1 --repeats 1"
    monkeypatch.setattr("sys.argv", [str(PATH), *words.split(), "--out", str(tmp_path)])
    monkeypatch.setattr(growth, "measured", stopped)
    with pytest.raises(KeyboardInterrupt):
        growth.main()
    found = json.loads((tmp_path / "growth.json").read_text())
    assert found["complete"] is False and list(found["ways"]) == ["next-scale", "raster"]
    assert [row["way"] for row in found["rows"]] == ["next-scale", "raster"]

    ways = []
    monkeypatch.setattr(growth, "measured", lambda way, *_: (ways.append(way), {"seconds": 1.0})[1])
    monkeypatch.setattr("sys.argv", [*sys.argv, "--resume"])
    growth.main()
    resumed = json.loads((tmp_path / "growth.json").read_text())
    assert ways == ["raster, no cache"] and resumed["complete"] is True
    assert resumed["rows"][:2] == found["rows"]
    monkeypatch.setattr("sys.argv", [*sys.argv, "--depth", "2"])
    with pytest.raises(SystemExit, match="of another network, device or torch"):
        growth.main()
