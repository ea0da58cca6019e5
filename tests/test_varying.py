"""`sandbox bench --vary`: a measurement for each value, each in a process of its own."""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_bench import TINY, one_line, small_ceilings

from sandbox.checkpoint import write_json
from sandbox.testing import sandbox_project

__all__ = ["small_ceilings"]

pytestmark = pytest.mark.usefixtures("one_thread", "small_ceilings")

SMALL = ("--parts", "generation", "--batch-sizes", "1", "--repeats", "1")
BACKEND = "generator.backbone.attention.name"


@pytest.fixture
def project(tmp_path):
    return sandbox_project(tmp_path, {"tiny.yaml": TINY})


def test_each_value_is_measured_and_all_stand_beside_each_other(project, monkeypatch):
    def run(command, **named):  # here, where ceilings are small
        if list(command[:3]) != [sys.executable, "-m", "sandbox"]:
            return elsewhere(command, **named)
        outcomes.append(project.sandbox(*command[3:]))
        return SimpleNamespace(returncode=outcomes[-1].status)

    elsewhere, outcomes = subprocess.run, []
    monkeypatch.setattr(subprocess, "run", run)
    words = ("--vary", f"{BACKEND}=math,no-such", "--set", "seed=3", "--out", "out")
    done = project.sandbox("bench", "tiny.yaml", *SMALL, *words)
    assert done.status == 2  # as that of the one that failed
    assert [each.status for each in outcomes] == [0, 2], outcomes
    kept = json.loads((project.folder / "out/bench.json").read_text())["variants"]
    assert [each["settings"] for each in kept] == [{BACKEND: "math"}, {BACKEND: "no-such"}]
    assert [each["status"] for each in kept] == [0, 2]
    (row,) = kept[0]["measured"]["generation"]
    assert row["batch_size"] == 1 and len(row["seconds"]) == 1
    assert "measured" not in kept[1]
    own = project.folder / "out" / kept[0]["folder"]
    assert json.loads((own / "bench.json").read_text()) == kept[0]["measured"]
    recipe = (own / "recipe.yaml").read_text()
    assert "seed: 3" in recipe and "name: math" in recipe
    lines = [line.split() for line in done.out.splitlines() if line.startswith("attention=")]
    assert lines[0][:4] == ["attention=math", "generation", "float32", "1"]
    assert lines[1] == ["attention=no-such", "failed", "(2)"]


def test_each_is_a_process_of_its_own(project, capfd):
    words = ("--vary", f"{BACKEND}=no-such")
    assert project.sandbox("bench", "tiny.yaml", *SMALL, *words).status == 2
    assert "no AttentionBackend is named 'no-such'" in capfd.readouterr().err


def test_every_combination_is_measured_and_parts_may_be_values(project, monkeypatch):
    asked = []

    def run(command, check):
        asked.append(command)
        return SimpleNamespace(returncode=-9 if len(asked) == 2 else 1)

    monkeypatch.setattr(subprocess, "run", run)
    depths = "generator.backbone.depth=1,2"
    schedules = "tokenizer.schedule={name: sides, sides: [1, 2]},{name: sides, sides: [1, 3]}"
    words = ("--vary", depths, "--vary", schedules, "--profile", "--full", "--precision", "float32")
    done = project.sandbox("bench", "tiny.yaml", *SMALL, *words)
    assert done.status == 9 and "everything is in runs/bench-tiny-varied" in done.out
    sets = [tuple(word for before, word in pairwise(each) if before == "--set") for each in asked]
    assert [one for one, _ in sets] == [f"generator.backbone.depth={n}" for n in (1, 1, 2, 2)]
    sides = [json.loads(other.partition("=")[2])["sides"] for _, other in sets]
    assert sides == [[1, 2], [1, 3]] * 2
    for each in asked:
        assert {"tiny.yaml", "--profile", "--full", "--precision", "--batch-sizes"} <= set(each)
    kept = json.loads((project.folder / "runs/bench-tiny-varied/bench.json").read_text())
    names = [each["name"] for each in kept["variants"]]
    assert len(set(names)) == 4 and '"sides": [1, 3]' in names[1], names
    assert [each["status"] for each in kept["variants"]] == [1, -9, 1, 1]
    assert project.sandbox("bench", "tiny.yaml", *words).status == 1  # into the same folder


def test_one_that_was_stopped_at_once_begins_anew(project, monkeypatch):
    def run(command, check):
        raise KeyboardInterrupt

    words = ("bench", "tiny.yaml", *SMALL, "--vary", "seed=1,2")
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", run)
        assert project.sandbox(*words).status == 130
    monkeypatch.setattr(subprocess, "run", lambda command, check: SimpleNamespace(returncode=1))
    done = project.sandbox(*words)
    assert done.status == 1 and done.out.count("failed (1)") == 2


def test_the_table_tells_what_is_not_sound(project, monkeypatch):
    row = {"precision": "float32", "batch_size": 1, "fast": "on", "status": "not finite"}
    row |= {"median_seconds": 0.5, "images_per_second": 2.0}
    found = iter([{"settings": {"parts": ["generation"]}, "generation": [row]}])

    def run(command, check):
        folder = Path(command[command.index("--out") + 1])
        write_json(folder / "bench.json", next(found, {"settings": {"parts": []}}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    done = project.sandbox("bench", "tiny.yaml", *SMALL, "--vary", "seed=1,2")
    lines = [line.split(maxsplit=1) for line in done.out.splitlines() if line.startswith("seed=")]
    told = " ".join(lines[0][1].split())
    assert told == "generation float32 1 fast: on (not finite) 500 2"
    assert lines[1][1].split() == ["nothing", "measured"]


def test_a_value_that_no_recipe_can_hold_is_refused_before_anything_runs(project):
    said = one_line(project.sandbox("bench", "tiny.yaml", "--vary", "seed=1,2024-01-02"))
    assert "date" in said and "quotes" in said


def test_how_a_generator_draws_has_a_flag_of_its_own(project):
    said = one_line(project.sandbox("bench", "tiny.yaml", "--vary", "generator.fast=off,on"))
    assert "--fast off,on instead" in said


@pytest.mark.parametrize("word", ["depth", "=1,2", "depth=", "depth=[1", "depth={a"])
def test_what_cannot_be_read_is_one_line(project, word):
    done = project.sandbox("bench", "tiny.yaml", "--vary", word)
    assert "expected KEY=VALUE,VALUE" in one_line(done) and word in done.err


def test_a_folder_that_holds_anything_else_is_left_alone(project):
    texts = (("notes.txt", "mine"), ("bench.json", '{"generation": []}'), ("bench.json", "{cut"))
    for number, (name, text) in enumerate(texts):
        folder = project.folder / f"of {number}"
        folder.mkdir()
        (folder / name).write_text(text)
        words = ("--vary", "seed=1,2", "--out", str(folder))
        said = one_line(project.sandbox("bench", "tiny.yaml", *words))
        assert "something other than such measurements" in said
        assert [path.name for path in folder.iterdir()] == [name]
