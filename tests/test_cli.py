"""The command line: what it prints, and one line with the right exit status for what goes wrong."""

import fcntl
import json
import os
import subprocess
import sys
from textwrap import dedent

import pytest
import torch
from PIL import Image

from sandbox.testing.project import sandbox_project

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = """\
    seed: 0
    device: cpu
    dataset: {name: shapes, image_size: 8, num_images: 16, num_validation: 8, num_classes: 2}
    tokenizer:
      name: var-vq
      autoencoder: {name: patch, patch: 4, ch: 8, code_dim: 4}
      codebook: {name: vq, vocab_size: 8}
      schedule: {name: sides, sides: [1, 2]}
    tasks:
      - {name: train-tokenizer, num_images: 16, batch_size: 8, num_validation_images: 8}
    """

SAMPLING = """\
    seed: 0
    device: cpu
    num_classes: 2
    tokenizer:
      name: var-vq
      autoencoder: {name: patch, patch: 4, ch: 8, code_dim: 4}
      codebook: {name: vq, vocab_size: 8}
      schedule: {name: sides, sides: [1, 2]}
    generator: {name: autoregressive, backbone: {name: var, depth: 1, width: 16, num_heads: 2}}
    tasks: [{name: sample, num_images: 2}]
    """


@pytest.fixture
def project(tmp_path):
    return sandbox_project(tmp_path, {"tiny.yaml": TINY, "sampling.yaml": SAMPLING})


def one_line(outcome, status):
    """The one line on stderr, without its `sandbox: `."""
    assert outcome.status == status, outcome
    (line,) = outcome.err.splitlines()
    assert line.startswith("sandbox: ") and "Traceback" not in outcome.out
    return line.removeprefix("sandbox: ")


def python(*words, **options):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=env, timeout=120, **options
    )


def test_help_lists_the_commands_without_importing_torch():
    code = (
        "import sys\n"
        "from sandbox.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as stop:\n"
        "    heavy = {'torch', 'numpy', 'pydantic', 'yaml'} & set(sys.modules)\n"
        "    print('status', stop.code, sorted(heavy))\n"
    )
    found = python("-c", code)
    assert found.stdout.splitlines()[-1] == "status 0 []" and not found.stderr
    for command in ("run", "check", "bench", "plugins", "show", "new", "report", "export"):
        assert f"    {command} " in found.stdout


def test_a_run_is_done_with_status_0_and_says_where_everything_is(project):
    outcome = project.sandbox("run", "tiny.yaml", "--set", "observers=[console]")
    assert (outcome.status, outcome.err) == (0, "")
    assert "run folder: runs/tiny" in outcome.out and "images_seen" in outcome.out
    environment = json.loads((project.folder / "runs/tiny/environment.json").read_text())
    assert environment["recipe"] == "tiny" and environment["device"] == "CPU"


def test_a_run_without_observers_is_silent(project):
    outcome = project.sandbox("run", "tiny.yaml", "--out", "elsewhere")
    assert (outcome.status, outcome.out, outcome.err) == (0, "", "")
    assert (project.folder / "elsewhere" / "1-train-tokenizer" / "result.json").exists()


def test_words_the_parser_does_not_know_are_the_users_mistake(project):
    for words in ([], ["rum"], ["run"], ["run", "tiny.yaml", "--full", "--preview"]):
        outcome = project.sandbox(*words)
        assert outcome.status == 2 and "usage: sandbox" in outcome.err


def test_a_missing_recipe_is_one_line(project):
    for command in ("run", "check"):
        assert one_line(project.sandbox(command, "absent.yaml"), 2) == "absent.yaml: no such recipe"


def test_each_mistake_of_a_recipe_is_one_line(project):
    words = ("--set", "sead=1", "--set", "tasks.0.num_images=0")
    for command in ("run", "check"):
        outcome = project.sandbox(command, "tiny.yaml", *words)
        assert outcome.status == 2 and outcome.out == ""
        first, second = outcome.err.splitlines()
        assert first.startswith("sandbox: --set tasks.0.num_images=0: tasks.0.num_images: ")
        assert second == "sandbox: --set sead=1: sead: unknown key (did you mean 'seed'?)"
    assert not (project.folder / "runs").exists()


def test_a_missing_data_folder_is_one_line(project):
    words = ("--set", "dataset={name: image-folder, root: nowhere, image_size: 8}")
    assert "no folder nowhere" in one_line(project.sandbox("run", "tiny.yaml", *words), 2)


@pytest.mark.filterwarnings("default:image-folder")
def test_a_skipped_image_stands_in_the_log(project):
    for number in range(8):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(project.folder / f"{number}.png")
    (project.folder / "cut.png").write_bytes((project.folder / "0.png").read_bytes()[:40])
    dataset = (
        "{name: image-folder, root: ., image_size: 8, on_corrupt: skip, validation_share: 0.3}"
    )
    words = ["--set", f"dataset={dataset}"]
    assert project.sandbox("run", "tiny.yaml", *words).status == 0
    events = (project.folder / "runs" / "tiny" / "log.jsonl").read_text().splitlines()
    told = [e["text"] for e in map(json.loads, events) if e["event"] == "message"]
    assert any("skipped ./cut.png, which cannot be read" in text for text in told)


def test_a_corrupt_image_is_one_line_that_names_it(project):
    for index in range(8):
        path = project.folder / "pictures" / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (index, 0, 0)).save(path)
    path.write_bytes(path.read_bytes()[:40])
    words = ("--set", "dataset={name: image-folder, root: pictures, image_size: 8}")
    told = one_line(project.sandbox("run", "tiny.yaml", *words), 1)
    assert "pictures/7.png cannot be read" in told and "on_corrupt: skip" in told


def test_truncated_weights_are_one_line(project):
    (project.folder / "var.safetensors").write_bytes(b"\x40\x00\x00")
    words = ("--set", "weights.generator=var.safetensors")
    told = one_line(project.sandbox("run", "sampling.yaml", *words), 2)
    assert told.startswith("var.safetensors: truncated or not a safetensors file")


def test_weights_that_are_missing_are_one_line(project):
    told = one_line(project.sandbox("run", "sampling.yaml"), 2)
    assert "no trained weights" in told and "weights.generator" in told
    words = ("--set", "weights.generator=absent.pth")
    assert "no such weights file" in one_line(project.sandbox("run", "sampling.yaml", *words), 2)


def test_a_mistake_can_be_mended_in_the_same_folder(project):
    """A recipe is bound to its folder once a task has kept something there, not before."""
    words = ("--set", "dataset={name: image-folder, root: nowhere, image_size: 8}")
    assert project.sandbox("run", "tiny.yaml", *words).status == 2
    assert project.sandbox("run", "tiny.yaml").status == 0
    told = one_line(project.sandbox("run", "tiny.yaml", "--set", "seed=1"), 2)
    assert "holds a run of another recipe (seed is 0 there, 1 here)" in told


def test_parts_that_do_not_go_together_are_one_line(project):
    words = ("--set", "dataset.image_size=16")
    told = one_line(project.sandbox("run", "tiny.yaml", *words), 2)
    assert (
        "images of (16, 16) pixels (height, width), the tokenizer's schedule makes (8, 8)" in told
    )
    words = ("--set", "tokenizer.schedule={name: sides, sides: [1, 3]}", "--out", "ending")
    told = one_line(project.sandbox("run", "tiny.yaml", *words), 2)
    assert "schedule makes (12, 12): change dataset.image_size or tokenizer.schedule" in told
    words = ("--set", "tokenizer=null", "--out", "other")
    assert "add `tokenizer:`" in one_line(project.sandbox("run", "tiny.yaml", *words), 2)
    words = ("--set", "device=warp", "--out", "third")
    assert "'warp' is no device" in one_line(project.sandbox("run", "tiny.yaml", *words), 2)


@pytest.mark.parametrize("trained", [False, True])
def test_the_plan_tells_of_a_tokenizer_that_was_never_trained(project, trained):
    task = "{name: train-generator, num_images: 2, batch_size: 2, strips: false}"
    words = ["--set", f"tasks=[{task}]", "--set", "observers=[console]"]
    words += ["--set", "dataset={name: shapes, image_size: 8, num_images: 2, num_classes: 2}"]
    if trained:
        assert project.sandbox("run", "tiny.yaml").status == 0
        words += ["--set", "weights.tokenizer=runs/tiny"]
    outcome = project.sandbox("run", "sampling.yaml", *words)
    assert outcome.status == 0, outcome.err
    assert ("never trained" in outcome.out) != trained


def test_what_a_backend_refuses_is_one_line(project):
    training = "tasks=[{name: train-generator, num_images: 2, batch_size: 2}]"
    words = ["--set", training, "--set", "generator.backbone.attention=xformers"]
    words += ["--set", "dataset={name: shapes, image_size: 8, num_classes: 2}"]
    told = one_line(project.sandbox("run", "sampling.yaml", *words), 2)
    assert told.startswith("1-train-generator: ") and "CUDA devices only" in told


def test_a_gpu_that_is_not_there_is_one_line(project, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    told = one_line(project.sandbox("run", "tiny.yaml", "--set", "device=cuda"), 2)
    assert "torch sees no GPU here" in told


def test_an_interrupt_is_one_line_with_the_shells_status(project, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("sandbox.run.execute", stop)
    told = one_line(project.sandbox("run", "tiny.yaml"), 130)
    assert "goes on from the last checkpoint" in told


def test_a_closed_pipe_is_no_error():
    show = f"env -u PYTHONUNBUFFERED {sys.executable} -m sandbox.cli show greedy"
    command = f"{show} | true; echo ${{PIPESTATUS[0]}}"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert found.stdout.splitlines()[-1] == "0" and found.stderr == ""


def test_fresh_deletes_a_run_folder_and_nothing_else(project):
    assert project.sandbox("run", "tiny.yaml").status == 0
    stale = project.folder / "runs" / "tiny" / "stale"
    stale.write_text("")
    assert project.sandbox("run", "tiny.yaml", "--fresh", "--set", "seed=1").status == 0
    assert not stale.exists()
    (project.folder / "precious").mkdir()
    (project.folder / "precious" / "thesis.tex").write_text("")
    told = one_line(project.sandbox("run", "tiny.yaml", "--fresh", "--out", "precious"), 2)
    assert "is not a run folder" in told and (project.folder / "precious/thesis.tex").exists()


def test_a_run_does_not_take_the_place_of_its_recipe(project):
    own = (project.folder / "tiny.yaml").rename(project.folder / "recipe.yaml").read_text()
    for words in ([], ["--fresh"]):
        told = one_line(project.sandbox("run", "recipe.yaml", "--out", ".", *words), 2)
        assert "would overwrite the recipe" in told
    assert (project.folder / "recipe.yaml").read_text() == own
    assert project.sandbox("run", "recipe.yaml", "--out", "run").status == 0
    assert project.sandbox("run", "run/recipe.yaml", "--out", "run").status == 0


def test_fresh_leaves_a_folder_alone_that_another_process_holds(project):
    assert project.sandbox("run", "tiny.yaml").status == 0
    folder = project.folder / "runs" / "tiny"
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        told = one_line(project.sandbox("run", "tiny.yaml", "--fresh"), 2)
    assert "in use by another process" in told
    assert (folder / "weights" / "tokenizer.safetensors").exists()


PREVIEW = dedent(TINY) + "preview: {tasks.0.num_images: 8}\n"


@pytest.mark.parametrize(
    ("gpu", "words", "num_images", "folder"),
    [
        (False, [], 8, "runs/preview-preview"),
        (False, ["--full"], 16, "runs/preview"),
        (False, ["--preview"], 8, "runs/preview-preview"),
        (True, [], 16, "runs/preview"),
        (True, ["--preview"], 8, "runs/preview-preview"),
    ],
)
def test_the_preview_runs_where_there_is_no_gpu(
    project, monkeypatch, gpu, words, num_images, folder
):
    (project.folder / "preview.yaml").write_text(PREVIEW)
    started = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr("sandbox.run.execute", lambda *given, **_: started.append(given))
    outcome = project.sandbox("run", "preview.yaml", *words)
    assert (outcome.status, outcome.err) == (0, "")
    assert ("no GPU here: running the preview" in outcome.out) is (not gpu and not words)
    ((recipe, where),) = started
    assert (recipe.tasks[0].params.num_images, str(where)) == (num_images, folder)


def test_a_preview_that_is_not_declared_is_refused(project):
    told = one_line(project.sandbox("run", "tiny.yaml", "--preview"), 2)
    assert told == "tiny.yaml: the recipe declares no preview"


def test_check_prints_the_resolved_recipe_and_runs_nothing(project):
    outcome = project.sandbox("check", "tiny.yaml", "--set", "seed=5")
    assert (outcome.status, outcome.err) == (0, "")
    assert "seed: 5" in outcome.out and "learning_rate: 0.001" in outcome.out
    assert not (project.folder / "runs").exists()
    (project.folder / "again.yaml").write_text(outcome.out)
    assert project.sandbox("check", "again.yaml").out == outcome.out


def test_check_tells_the_mistakes_of_the_preview_too(project):
    text = PREVIEW.replace("num_images: 8}", "num_images: 0}")
    (project.folder / "preview.yaml").write_text(text)
    assert "(preview): tasks.0" in one_line(project.sandbox("check", "preview.yaml"), 2)
    assert project.sandbox("check", "preview.yaml", "--full").status == 0


def test_plugins_lists_every_part_with_its_place(project):
    outcome = project.sandbox("plugins")
    assert (outcome.status, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    row = next(i for i, line in enumerate(lines) if line.startswith("Sampler") and "greedy" in line)
    assert lines[row + 1].strip().partition(":")[0].endswith("plugins/samplers/likeliest.py")
    rows = json.loads(project.sandbox("plugins", "--json").out)
    assert len(rows) * 2 == len(lines)
    assert {"interface", "name", "plugin", "summary", "where"} == set(rows[0])
    assert all(row["summary"] for row in rows), "every part has a docstring"


def test_show_tells_types_ranges_defaults_and_meaning(project):
    outcome = project.sandbox("show", "sample")
    assert (outcome.status, outcome.err) == (0, "")
    assert "  num_images: int (> 0)  [default 100]\n      How many images in all." in outcome.out
    assert project.sandbox("show", "task/sample").out == outcome.out
    assert "metrics: " in (shown := project.sandbox("show", "evaluate").out)
    assert "[required]" in shown
    for line in (
        "metrics: tuple[Metric, ...]  [required]",
        "images: samples | reconstructions | train | validation | Path  [default 'samples']",
        "num_images: int | None (> 1)  [default None]",
    ):
        assert f"\n  {line}\n" in shown


def test_show_of_an_unknown_name_suggests(project):
    told = one_line(project.sandbox("show", "smaple"), 2)
    assert told.startswith("no part is named 'smaple' (did you mean 'sample'?)")
    assert one_line(project.sandbox("show", "metric/sample"), 2).startswith("no part is named")


def test_every_part_can_be_shown_and_every_setting_is_explained(project, registry):
    for name in sorted({entry.name for entry in registry}):
        assert project.sandbox("show", name).status == 0
    unexplained = [
        f"{entry.interface.__name__} {entry.name}: {key}"
        for entry in registry
        for key, info in entry.cls.Params.model_fields.items()
        if not info.description
    ]
    assert not unexplained


BROKEN = {"broken_import.py": "import a_module_that_is_not_there\n"}
TWICE = """\
    import sandbox
    from sandbox_plugins.samplers import Greedy

    @sandbox.hookimpl
    def sandbox_register(register):
        register(sandbox.Sampler, "greedy", Greedy)
    """


def test_a_broken_plugin_is_listed_and_stops_only_who_needs_it(project):
    sandbox_project(project.folder / "mine", BROKEN)
    outcome = project.sandbox("plugins", "--plugins", "mine")
    assert outcome.status == 1 and "BROKEN" in outcome.out
    assert "ModuleNotFoundError: No module named 'a_module_that_is_not_there'" in outcome.out
    assert project.sandbox("run", "tiny.yaml", "--plugins", "mine").status == 0
    words = ("--plugins", "mine", "--set", "dataset.name=theirs")
    told = one_line(project.sandbox("run", "tiny.yaml", *words), 2)
    assert "no Dataset is named 'theirs'" in told
    assert "plugin 'broken_import' did not load: ModuleNotFoundError" in told


def test_two_plugins_that_claim_one_name_stop_everything(project):
    sandbox_project(project.folder / "mine", {"second_greedy.py": TWICE})
    for words in (["plugins"], ["run", "tiny.yaml"], ["show", "greedy"]):
        told = one_line(project.sandbox(*words, "--plugins", "mine"), 2)
        assert "'second_greedy'" in told and "'samplers'" in told


def test_a_plugin_folder_that_is_missing_is_one_line(project):
    told = one_line(project.sandbox("plugins", "--plugins", "nowhere"), 2)
    assert told == "--plugins nowhere: no such folder"


def test_the_report_can_be_written_again(project):
    assert "is not a run folder" in one_line(project.sandbox("report", "nowhere"), 2)
    assert project.sandbox("run", "tiny.yaml").status == 0
    told = one_line(project.sandbox("report", "runs/tiny", "--beside", "nowhere"), 2)
    assert told.startswith("nowhere is not a run folder")
    outcome = project.sandbox("report", "runs/tiny")
    assert outcome.status == 0 and (project.folder / outcome.out.strip()).stat().st_size > 1000


def test_what_has_no_published_layout_is_not_exported(project):
    assert project.sandbox("run", "tiny.yaml").status == 0
    told = one_line(project.sandbox("export", "runs/tiny", "out"), 2)
    assert "published layout" in told and not (project.folder / "out").exists()
    assert "no such recipe" in one_line(project.sandbox("export", "nowhere", "out"), 2)


def test_own_weights_are_exported_for_other_recipes(project):
    assert project.sandbox("run", "tiny.yaml").status == 0
    outcome = project.sandbox(
        "export", "runs/tiny", "out", "--layout", "own", "--dtype", "bfloat16"
    )
    assert (outcome.status, outcome.out) == (0, "out/tokenizer.safetensors\n")
    again = ["--set", "weights.tokenizer=out/tokenizer.safetensors", "--out", "runs/again"]
    assert project.sandbox("run", "tiny.yaml", *again).status == 0
    assert project.sandbox("export", "runs/tiny", "out", "--layout", "theirs").status == 2


def test_what_has_no_weights_is_not_exported(project):
    told = one_line(project.sandbox("export", "sampling.yaml", "out"), 2)
    assert told == "the tokenizer has no trained weights to export"


def test_an_unexpected_error_keeps_its_traceback_for_who_asks(project, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError("in\ntwo lines")

    monkeypatch.setattr("sandbox.run.execute", fail)
    told = one_line(project.sandbox("run", "tiny.yaml"), 1)
    assert told.startswith("ZeroDivisionError: in two lines (SANDBOX_TRACEBACK=1")
    monkeypatch.setenv("SANDBOX_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        project.sandbox("run", "tiny.yaml")
