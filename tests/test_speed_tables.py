"""`benchmarks/speed.py`: its tables, and that those of docs/results/speed.md are what it makes."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import again
import speed

COMMON = {"status": "ok", "peak_bytes": 2**30, "first_seconds": 60.0, "share_of_matmul": 0.5}


def row(size, seconds, **more):
    times = dict.fromkeys(("q1_seconds", "median_seconds", "q3_seconds"), seconds)
    return {
        **COMMON,
        **{"precision": "bfloat16", "batch_size": size, "images_per_second": size / seconds},
        **times,
        **more,
    }


@pytest.fixture
def measured(tmp_path):
    kept = {
        "device": "a GPU",
        "date": "2026-11-25T00:00:00",
        "environment": {"command": "sandbox bench x"},
        "ceilings": {
            "matmul": [{"flops_per_second": 8e14}],
            "copy": {"bytes_per_second": 4e12},
        },
    }
    kernels = [{"name": "gemm", "calls": 3, "seconds": 0.004}]
    told = {"kernels": kernels, "kernels_seconds": 0.008}
    fast = [row(1, 0.010, fast="on", **told), row(8, 0.020, fast="on")]
    slow = [row(1, 0.1, fast="off"), {"precision": "bfloat16", "status": "out of memory"}]
    raster = [row(1, 0.2, fast="on"), row(8, 0.5, fast="on"), row(32, 1.6, fast="on")]
    for name, rows in {"d16": slow + fast, "raster": raster}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({**kept, "generation": rows}))
    return tmp_path


def test_the_tables_hold_what_was_measured_and_say_what_was_not_reached(measured, capsys):
    sys.argv = ["speed.py", str(measured)]
    speed.main()
    out = capsys.readouterr().out
    assert "| d16 | `sandbox bench x` | a GPU | 2026-11-25 | 800 | 4.00 |" in out
    assert "| VAR-d16, batch 1 | 142 ms | 2 ms | 9 ms | **10 ms** | d16 | 10 to 10 | no |" in out
    assert "| 330 img/s | **400 img/s** | d16 | 20 to 20 | yes |" in out
    assert "| on | 10 | 200 | **20.0** | 400 (8) | 20 (32) | **20** |" in out
    assert "| 4 | 50 | 3 | `gemm` |" in out
    assert "training" not in out.lower().replace("training step", "").split("## kernels")[1]


def test_parts_are_told_of_calls_that_took_as_long_as_the_row():
    parts = {"transformer": 0.06, "sampling": 0.01, "decoder": 0.02, "rest": 0.01}
    alike, slower = {"whole": 0.1, **parts}, {"whole": 0.2, **parts, "rest": 0.11}
    assert speed.split(row(1, 0.095, splits=[alike])) == "60, 10, 20, 10"
    assert speed.split(row(1, 0.1, splits=[slower])) == "" == speed.split(row(1, 0.1))


def test_of_several_files_of_a_kind_the_latest_row_counts(measured, capsys):
    for name, date, seconds in (("d16-more", "2026-11-26", 0.040), ("d16-old", "2026-11-24", 1)):
        kept = json.loads((measured / "d16.json").read_text())
        told = {"date": f"{date}T00:00:00", "generation": [row(8, seconds, fast="on")]}
        (measured / f"{name}.json").write_text(json.dumps(kept | told))
    sys.argv = ["speed.py", str(measured)]
    speed.main()
    out = capsys.readouterr().out
    assert "**10 ms** | d16 |" in out and "**200 img/s** | d16-more |" in out
    assert "| on | 10 | 200 | **20.0** | 200 (8) | 20 (32) | **10** |" in out


def test_where_one_batch_was_measured_no_best_one_is_told(measured, capsys):
    path = measured / "raster.json"
    kept = json.loads(path.read_text())
    path.write_text(json.dumps(kept | {"generation": kept["generation"][:1]}))
    sys.argv = ["speed.py", str(measured)]
    speed.main()
    assert "| on | 10 | 200 | **20.0** | | | |" in capsys.readouterr().out


def test_what_a_stopped_bench_left_is_read_and_says_so(measured, capsys):
    path = measured / "raster.json"
    stopped = json.loads(path.read_text()) | {"complete": False, "encoding": [], "training": []}
    path.write_text(json.dumps(stopped))
    sys.argv = ["speed.py", str(measured)]
    speed.main()
    out = capsys.readouterr().out
    assert "| raster (stopped before its end) | `sandbox bench x` |" in out and "| d16 | `" in out
    assert "| raster | bfloat16 | 8 | on |" in out


def test_the_page_holds_what_the_bench_kept(capsys):
    results = Path(__file__).parents[1] / "docs/results"
    sys.argv = ["speed.py", str(results / "speed")]
    speed.main()
    page = (results / "speed.md").read_text().splitlines()
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert len(lines) > 20 and not [line for line in lines if line not in page]


def test_every_kept_command_is_run_again_in_a_folder_of_its_own(measured, tmp_path, monkeypatch):
    kept = json.loads((measured / "d16.json").read_text()) | {"device": "CPU"}
    kept["environment"]["command"] = (
        "sandbox bench x.yaml --set 'weights={}' --out runs/x --fast on"
    )
    (measured / "cpu.json").write_text(json.dumps(kept))
    (measured / "growth.json").write_text(json.dumps({"rows": []}))  # of no bench
    asked = []

    def run(words, check):
        asked.append(words[2:])
        folder = Path(words[-1])
        folder.mkdir(parents=True)
        (folder / "bench.json").write_text(folder.name)
        return SimpleNamespace(returncode=folder.name == "d16")

    monkeypatch.setattr(again.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["again.py", str(measured), str(tmp_path / "now")])
    assert again.main() == 1
    folders = [f"{tmp_path}/now/folders/{name}" for name in ("cpu", "d16", "raster")]
    assert asked[0] == [
        *("sandbox", "bench", "x.yaml", "--set", "weights={}", "--fast", "on"),
        *("--set", "device=cpu", "--out", folders[0]),
    ]
    assert [words[-1] for words in asked] == folders and asked[1][:3] == ["sandbox", "bench", "x"]
    assert sorted(path.name for path in (tmp_path / "now").glob("*.json")) == [
        *("cpu.json", "d16.json", "raster.json")
    ]
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--only", "d61"])
    with pytest.raises(SystemExit):
        again.main()
