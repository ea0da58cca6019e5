"""A stranger's plugin: one file in a folder, or an installed package, used by one line of a recipe.

Modules stay imported between loads in one process, so every test names its plugins anew.
"""

import json

import pytest
import yaml

from sandbox.scaffold import write_plugin
from sandbox.testing import sandbox_project

RECIPE = {
    "device": "cpu",
    "dataset": {"name": "shapes", "image_size": 16, "num_images": 8, "num_validation": 4},
    "tokenizer": {
        "name": "var-vq",
        "autoencoder": {"name": "patch", "code_dim": 3},
        "codebook": {"name": "vq", "vocab_size": 16},
        "schedule": {"name": "sides", "sides": [1, 2, 4]},
    },
    "generator": {
        "name": "autoregressive",
        "backbone": {"name": "var", "depth": 1, "width": 16, "num_heads": 2},
        "sampler": "greedy",
    },
    "tasks": [
        {"name": "train-generator", "num_images": 4, "batch_size": 2, "num_validation_images": 2},
        {"name": "sample", "num_images": 2},
    ],
}
SLOT_OF_KIND = {
    "sampler": "generator.sampler",
    "schedule": "tokenizer.schedule",
    "tokenizer": "tokenizer",
    "backbone": "generator.backbone",
    "dataset": "dataset",
}
HOOK = """
@sandbox.hookimpl
def sandbox_register(register):
    register(sandbox.Sampler, "{name}", Mine)
"""
SAMPLER = """\
import sandbox

class Mine:
    Params = sandbox.Params

    def __init__(self, params):
        self.params = params

    def guidance(self, progress):
        return 0.0

    def draw(self, logits, progress, rng):
        return logits.argmax(-1)
"""


def a_project(tmp_path, **files):
    """A folder with `recipe.yaml` and the plugins `mine/NAME.py`."""
    plugins = {f"mine/{name}.py": text for name, text in files.items()}
    return sandbox_project(tmp_path, {"recipe.yaml": yaml.safe_dump(RECIPE), **plugins})


def a_sampler(name):
    return SAMPLER + HOOK.format(name=name)


@pytest.mark.parametrize("kind", SLOT_OF_KIND)
def test_one_file_of_forty_lines_is_used_by_one_line_of_a_recipe(kind, tmp_path):
    project = a_project(tmp_path)
    plugin, _ = write_plugin(tmp_path / "mine", f"strange_{kind}", kind)
    assert len(plugin.read_text().splitlines()) <= 40
    value = f"{{name: strange-{kind}, side: 4}}" if kind == "schedule" else f"strange-{kind}"
    line = f"{SLOT_OF_KIND[kind]}={value}"
    done = project.sandbox("run", "recipe.yaml", "--plugins", "mine", "--set", line)
    assert done.status == 0, done.err
    kept = yaml.safe_load((tmp_path / "runs/recipe/recipe.yaml").read_text())
    for key in SLOT_OF_KIND[kind].split("."):
        kept = kept[key]
    assert kept["name"] == f"strange-{kind}"
    assert (tmp_path / "runs/recipe/samples.npy").exists()


def test_a_strangers_task_and_observer_take_part_in_a_run(tmp_path):
    project = a_project(tmp_path)
    for kind in ("task", "observer"):
        write_plugin(tmp_path / "mine", f"foreign_{kind}", kind)
    lines = ["--set", "tasks=[foreign-task]", "--set", "observers=[foreign-observer]"]
    done = project.sandbox("run", "recipe.yaml", "--plugins", "mine", *lines)
    assert done.status == 0, done.err
    folder = tmp_path / "runs/recipe"
    result = json.loads((folder / "1-foreign-task/result.json").read_text())
    assert sum(result["counts"]) == RECIPE["dataset"]["num_images"]
    assert (folder / "1-foreign-task/means.png").exists()
    assert (folder / "finished.txt").read_text() == "1-foreign-task: done\n"


def test_without_its_folder_a_part_is_unknown(tmp_path):
    project = a_project(tmp_path, elsewhere=a_sampler("elsewhere"))
    line = ("--set", "generator.sampler=elsewhere")
    lost = project.sandbox("check", "recipe.yaml", *line)
    assert lost.status == 2 and "no Sampler is named 'elsewhere'" in lost.err
    assert project.sandbox("check", "recipe.yaml", *line, "--plugins", "mine").status == 0


def test_an_installed_package_enters_through_its_entry_point(tmp_path, monkeypatch):
    site = tmp_path / "site"
    sandbox_project(
        site,
        {
            "stranger_package/__init__.py": "from .parts import sandbox_register\n",
            "stranger_package/parts.py": a_sampler("from-package"),
            "stranger_package-1.0.dist-info/METADATA": (
                "Metadata-Version: 2.1\nName: stranger-package\nVersion: 1.0\n"
            ),
            "stranger_package-1.0.dist-info/entry_points.txt": (
                "[sandbox]\nstranger = stranger_package\n"
            ),
        },
    )
    monkeypatch.syspath_prepend(site)
    project = a_project(tmp_path)
    rows = json.loads(project.sandbox("plugins", "--json").out)
    (row,) = [row for row in rows if row["name"] == "from-package"]
    assert row["plugin"] == "stranger"
    assert row["where"].startswith(str(site / "stranger_package" / "parts.py"))
    chosen = project.sandbox("check", "recipe.yaml", "--set", "generator.sampler=from-package")
    assert chosen.status == 0, chosen.err


def test_an_installed_plugin_changes_no_recipe_that_does_not_name_it(tmp_path):
    project = a_project(tmp_path, idle=a_sampler("idle"))
    alone = project.sandbox("check", "recipe.yaml")
    beside = project.sandbox("check", "recipe.yaml", "--plugins", "mine")
    assert alone.status == beside.status == 0
    assert alone.out == beside.out


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("broken_import", "import no_such_module_anywhere\n", "ModuleNotFoundError"),
        ("broken_syntax", "def half(:\n", "SyntaxError"),
        (
            "broken_hook",
            a_sampler("half-hearted").replace("sandbox_register", "sandbox_registre"),
            "unknown hook",
        ),
        (
            "broken_decorator",
            a_sampler("undecorated").replace("@sandbox.hookimpl", ""),
            "lacks its decorator",
        ),
        (
            "broken_part",
            a_sampler("half-done").replace("def draw", "def drawn"),
            "lacks draw",
        ),
        (
            "broken_params",
            a_sampler("paramless").replace("Params = sandbox.Params", "Params = dict"),
            "needs a nested",
        ),
    ],
)
def test_a_broken_plugin_is_listed_and_stops_only_who_needs_it(name, text, reason, tmp_path):
    project = a_project(tmp_path, **{name: text})
    listed = project.sandbox("plugins", "--plugins", "mine")
    assert listed.status == 1
    (line,) = [line for line in listed.out.splitlines() if line.startswith("BROKEN")]
    assert name in line and reason in line
    unharmed = project.sandbox("check", "recipe.yaml", "--plugins", "mine")
    assert unharmed.status == 0, unharmed.err
    needed = ("--plugins", "mine", "--set", "generator.sampler=wanted")
    stopped = project.sandbox("check", "recipe.yaml", *needed)
    assert stopped.status == 2
    assert f"plugin {name!r} did not load" in stopped.err and reason in stopped.err


def test_two_plugins_with_one_name_stop_everything_and_both_are_named(tmp_path):
    project = a_project(tmp_path, first_claim=a_sampler("same"), second_claim=a_sampler("same"))
    for command in (["plugins"], ["check", "recipe.yaml"]):
        refused = project.sandbox(*command, "--plugins", "mine")
        assert refused.status == 2
        assert f"{tmp_path}/mine/first_claim.py:3" in refused.err
        assert f"{tmp_path}/mine/second_claim.py:3" in refused.err


def test_a_built_in_name_cannot_be_taken(tmp_path):
    project = a_project(tmp_path, usurper=a_sampler("greedy"))
    refused = project.sandbox("check", "recipe.yaml", "--plugins", "mine")
    assert refused.status == 2
    assert "usurper.py:3" in refused.err and "samplers/likeliest.py:" in refused.err


def test_two_folders_with_a_module_of_one_name_are_both_named(tmp_path):
    project = a_project(tmp_path, twin=a_sampler("one"))
    sandbox_project(tmp_path, {"yours/twin.py": a_sampler("other")})
    refused = project.sandbox("plugins", "--plugins", "mine", "--plugins", "yours")
    assert refused.status == 2
    assert f"{tmp_path}/mine" in refused.err and f"{tmp_path}/yours" in refused.err


def test_a_folder_that_is_not_there_is_the_users_mistake(tmp_path):
    refused = a_project(tmp_path).sandbox("plugins", "--plugins", "nowhere")
    assert refused.status == 2 and "no such folder" in refused.err
