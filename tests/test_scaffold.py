"""`sandbox new`: every kind's skeleton is small, clean and obeys its laws."""

import subprocess
import sys

import pytest

import sandbox
from sandbox import scaffold
from sandbox.testing import check, load_plugins, sandbox_project

KINDS = list(scaffold.INTERFACE_OF_KIND)


@pytest.mark.parametrize("kind", KINDS)
def test_every_skeleton_obeys_the_laws_of_its_interface(kind, tmp_path):
    name = f"fresh_{kind.replace('-', '_')}"
    plugin, test = scaffold.write_plugin(tmp_path, name, kind)
    assert [plugin.name, test.name] == [f"{name}.py", f"test_{name}.py"]
    assert len(plugin.read_text().splitlines()) <= 40
    interface = getattr(sandbox, scaffold.INTERFACE_OF_KIND[kind])
    registry = load_plugins([tmp_path], strict=True)
    check(interface, registry.find(interface, f"fresh-{kind}"), registry)
    assert "keleton" not in plugin.read_text() + test.read_text()


def test_skeletons_are_lint_clean(tmp_path):
    ruff = pytest.importorskip("ruff", reason="ruff is installed by tox -e lint")
    for kind in KINDS:
        scaffold.write_plugin(tmp_path, f"some_{kind.replace('-', '_')}", kind)
    strangers = 'lint.isort.known-third-party = ["sandbox"]'  # to them, it is a library
    rules = ["--isolated", "--line-length", "100", "--config", strangers]
    for command in (["check", "--select", "E,F,I,UP,B,N,SIM,RUF"], ["format", "--check"]):
        call = [ruff.find_ruff_bin(), *command, *rules, str(tmp_path)]
        done = subprocess.run(call, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_written_test_passes_as_it_is(tmp_path):
    _, test = scaffold.write_plugin(tmp_path, "as_written", "schedule")
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, test.name], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_new_prints_what_it_wrote(tmp_path):
    project = sandbox_project(tmp_path, {})
    made = project.sandbox("new", "told_sampler", "--kind", "sampler", "--folder", "mine")
    assert (made.status, made.out) == (0, "mine/told_sampler.py\nmine/test_told_sampler.py\n")
    shown = project.sandbox("show", "told-sampler", "--plugins", "mine")
    assert shown.status == 0 and "temperature" in shown.out


@pytest.mark.parametrize("name", ["My_Sampler", "2fast", "my-sampler", "class", "", "a/b"])
def test_a_name_that_cannot_be_a_plugins_is_refused(name, tmp_path):
    with pytest.raises(sandbox.SandboxError, match="cannot name a plugin"):
        scaffold.write_plugin(tmp_path, name, "sampler")
    assert list(tmp_path.iterdir()) == []


def test_a_plugin_is_not_named_like_a_test(tmp_path):
    with pytest.raises(sandbox.SandboxError, match="taken for a test"):
        scaffold.write_plugin(tmp_path, "test_mine", "sampler")


def test_an_unknown_kind_names_the_closest(tmp_path):
    with pytest.raises(sandbox.SandboxError, match="did you mean 'sampler'"):
        scaffold.write_plugin(tmp_path, "mine", "smapler")


@pytest.mark.parametrize("taken", ["mine.py", "test_mine.py"])
def test_nothing_is_ever_overwritten(taken, tmp_path):
    (tmp_path / taken).write_text("precious")
    project = sandbox_project(tmp_path, {})
    refused = project.sandbox("new", "mine", "--folder", ".")
    assert refused.status == 2 and "exists already" in refused.err
    assert [path.name for path in tmp_path.iterdir()] == [taken]
    assert (tmp_path / taken).read_text() == "precious"


def test_a_folder_that_cannot_be_made_is_the_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(sandbox.SandboxError, match="cannot write the plugin"):
        scaffold.write_plugin(tmp_path / "file", "mine", "sampler")
