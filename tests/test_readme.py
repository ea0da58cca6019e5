"""The README is run: its plugin, its Python, its commands, its tree and its table of recipes."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from sandbox.cli import _parser, main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for kind, text in BLOCKS
    if kind == "sh"
    for line in text.splitlines()
    if line.startswith("sandbox ")
]
TINY = [
    "dataset.num_images=64",
    "dataset.num_validation=32",
    *(f"tasks.{task}.num_images={count}" for task, count in enumerate([64, 64, 64, 20])),
    *(f"tasks.{task}.validate_every=64" for task in (1, 2)),
    *(f"tasks.{task}.batch_size=16" for task in (0, 1, 2)),
    *(f"tasks.{task}.num_validation_images=16" for task in (0, 1, 2)),
    "tasks.5.metrics=[class-accuracy]",
    "tasks.4.metrics=[psnr]",
    "observers=[report]",
]


def block(marker: str) -> str:
    (text,) = (text for kind, text in BLOCKS if kind == "python" and marker in text)
    return text


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """A folder in which the quickstart has run, at a size for tests."""
    folder = tmp_path_factory.mktemp("readme")
    sets = [word for setting in TINY for word in ("--set", setting)]
    run = ["run", str(ROOT / "recipes/quickstart.yaml"), "--out", str(folder / "runs/quickstart")]
    assert main([*run, *sets]) == 0
    return folder


def test_the_first_command_of_the_readme_writes_a_report(quickstart):
    assert "pip install -e . && sandbox run recipes/quickstart.yaml" in README
    report = (quickstart / "runs/quickstart/report.html").read_text()
    assert "class_accuracy" in report
    assert "data:image/png;base64" in report


def test_the_ci_calls_the_readmes_test_command_word_for_word():
    assert "\npip install tox && tox\n" in README
    assert "\npip install tox && tox\n" in (ROOT / ".ci/run").read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_is_one(command):
    words = shlex.split(command)[1:]
    arguments = _parser().parse_args(words)
    recipe = getattr(arguments, "recipe", None)
    assert recipe is None or (ROOT / recipe).exists()


def test_the_readmes_plugin_is_short_works_and_is_used_by_one_changed_line(tmp_path):
    text = block("class Cooling")
    assert len(text.splitlines()) <= 40
    (tmp_path / "my_plugins").mkdir()
    (tmp_path / "my_plugins/readme_cooling.py").write_text(text)
    (command,) = (c for c in COMMANDS if "name: cooling" in c)
    words = shlex.split(command)
    override = words[words.index("--set") + 1]
    plugins = ["--plugins", str(tmp_path / "my_plugins")]
    recipe = str(ROOT / "recipes/quickstart.yaml")
    tiny = [w for s in [*TINY, override] for w in ("--set", s)]
    assert main(["run", recipe, *plugins, *tiny, "--out", str(tmp_path / "run")]) == 0
    assert "name: cooling" in (tmp_path / "run/recipe.yaml").read_text()


def test_the_readmes_python_runs(quickstart, monkeypatch):
    monkeypatch.chdir(quickstart)
    text = block('sandbox.load("runs/quickstart")')
    assert len([line for line in text.splitlines() if line]) <= 10
    names: dict[str, object] = {}
    exec(text, names)
    images, scales = names["images"], names["scales"]
    assert images.shape == (10, 3, 15, 15)
    assert len(scales) == 4
    assert torch.equal(scales[-1], images)
    assert names["reconstruction"].shape == names["batch"].images.shape


def test_every_file_of_the_readmes_tree_exists_and_every_module_is_in_it():
    (tree,) = re.findall(r"## The tree\n\n```\n(.*?)```", README, re.DOTALL)
    for folder in ("sandbox", "plugins"):
        (part,) = re.findall(rf"^{folder}/.*?(?=^\S|\Z)", tree, re.MULTILINE | re.DOTALL)
        named = set(re.findall(r"([a-z_]+\.py|[a-z_]+/)", part)) - {f"{folder}/"}
        for name in named:
            assert (ROOT / folder / name).exists(), name
        there = {path.name for path in (ROOT / folder).glob("[a-z]*.py")}
        assert there - named <= {"errors.py", "seeds.py"}


def test_the_table_of_recipes_names_every_recipe():
    named = set(re.findall(r"`(\w+)\.yaml`", README))
    assert named == {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
