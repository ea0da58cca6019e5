"""The rules of the house, read off the source: directions of import, sizes, forbidden calls.

Each test is one rule over all files and names every offence as `file:line: what`.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sandbox

ROOT = Path(__file__).parent.parent
CORE = sorted((ROOT / "sandbox").glob("*.py"))
TESTKIT = sorted((ROOT / "sandbox" / "testing").rglob("*.py"))
PLUGINS = sorted((ROOT / "plugins").rglob("*.py"))

LAYERS = [
    {
        "errors",
        "seeds",
        "layout",
        "pictures",
        "distributed",
        "precision",
        "compiler",
        "launching",
        "products",
        "replay",
    },
    {"values", "parts", "hooks"},
    {"interfaces", "judges", "registry"},
    {"checkpoint", "loading", "sampling", "rendering", "plugins", "task", "provenance", "describe"},
    {"recipe", "weights"},
    {"assembly", "record"},
    {"run"},
    {"bench", "notebook", "scaffold"},
    {"varying"},
    {"cli"},
    {"__main__"},
]
"""The core's modules, lowest first. A module imports from layers below its own, never its own."""

TYPES_ONLY = {("values", "interfaces")}
"""Imports for annotations alone, which run against the direction and never at run time."""


def parse(path):
    return ast.parse(path.read_text(), str(path))


def imports(tree):
    """Every (absolute module, name or None, line) that a file imports from, wherever it does."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None, node.lineno
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                yield node.module, alias.name, node.lineno


def core_imports(path):
    for module, _, line in imports(parse(path)):
        if module.startswith("sandbox."):
            yield module.split(".")[1], line


def calls(tree, *dotted):
    """Calls of any of these dotted names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in dotted:
            yield node


LIBRARY = [*CORE, *TESTKIT, *PLUGINS]


def name(path):
    return path.relative_to(ROOT).as_posix()


def keywords(call):
    return {word.arg: ast.unparse(word.value) for word in call.keywords}


def test_every_core_module_has_one_layer():
    placed = [module for layer in LAYERS for module in layer]
    assert len(placed) == len(set(placed))
    assert {path.stem for path in CORE} - {"__init__"} == set(placed)


def test_the_core_imports_in_one_direction():
    height = {module: index for index, layer in enumerate(LAYERS) for module in layer}
    assert not [
        f"{name(path)}:{line}: imports {module}, which is not below it"
        for path in CORE
        for module, line in core_imports(path)
        if path.stem != "__init__" and (path.stem, module) not in TYPES_ONLY
        if height[module] >= height[path.stem]
    ]


def test_imports_for_types_alone_stand_under_type_checking():
    for importer, imported in TYPES_ONLY:
        tree, module = parse(ROOT / "sandbox" / f"{importer}.py"), f"sandbox.{imported}"
        every = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module == module]
        guarded = [
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for inner in node.body
        ]
        assert len(every) == 1 and every[0] in guarded


def test_only_the_plugin_loader_knows_the_plugins():
    assert {
        (path.stem, module)
        for path in CORE
        for module, _, _ in imports(parse(path))
        if module.startswith("sandbox_plugins")
    } == {("plugins", "sandbox_plugins")}


def test_plugins_import_public_names_and_their_own_package_only():
    public = set(sandbox.__all__)
    offences = []
    for path in PLUGINS:
        tree = parse(path)
        for module, imported, line in imports(tree):
            private = module.startswith("sandbox.") or module.startswith("sandbox_plugins")
            if private or (module == "sandbox" and imported and imported not in public):
                offences.append(f"{name(path)}:{line}: {module} {imported or ''}")
        depth = len(path.relative_to(ROOT / "plugins").parts) - 1
        offences += [
            f"{name(path)}:{node.lineno}: {ast.unparse(node)}"
            for node in ast.walk(tree)
            if (isinstance(node, ast.ImportFrom) and node.level > depth)
            or (
                isinstance(node, ast.Attribute)
                and ast.unparse(node.value) == "sandbox"
                and node.attr not in public
            )
        ]
    assert not offences


def test_core_files_and_functions_stay_small():
    assert not [name(path) for path in CORE if len(path.read_text().splitlines()) > 300]
    assert not [
        f"{name(path)}:{node.lineno}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for path in CORE
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 50
    ]


def test_modules_say_what_they_are_for():
    assert not [name(path) for path in LIBRARY if not ast.get_docstring(parse(path))]


def test_files_that_could_run_code_are_never_loaded():
    banned = ["yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "os.system"]
    banned += ["pickle.load", "pickle.loads", "pickle.Unpickler"]
    offences = []
    for path in LIBRARY:
        tree = parse(path)
        found = list(calls(tree, *banned))
        found += [c for c in calls(tree, "torch.load") if keywords(c).get("weights_only") != "True"]
        found += [c for c in calls(tree, "np.load") if keywords(c).get("allow_pickle") != "False"]
        offences += [f"{name(path)}:{call.lineno}: {ast.unparse(call)}" for call in found]
    assert not offences


def test_pickle_is_imported_once_for_its_exception_alone():
    importers = [
        path
        for path in LIBRARY
        if {module.split(".")[0] for module, _, _ in imports(parse(path))}
        & {"pickle", "dill", "cloudpickle", "joblib", "shelve"}
    ]
    assert [name(path) for path in importers] == ["sandbox/weights.py"]
    used = {
        ast.unparse(node)
        for node in ast.walk(parse(importers[0]))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle"
    }
    assert used == {"pickle.UnpicklingError"}


def test_library_code_does_not_print():
    speakers = {"sandbox/cli.py", "plugins/observers/console.py", "plugins/observers/jsonl.py"}
    assert not [
        f"{name(path)}:{call.lineno}"
        for path in LIBRARY
        if name(path) not in speakers
        for call in calls(parse(path), "print")
    ]


def test_library_code_reads_no_environment_and_sets_no_device():
    for path in LIBRARY:
        code = ast.unparse(parse(path))
        if name(path) != "sandbox/cli.py":
            assert "os.environ" not in code and "getenv" not in code, name(path)
        assert "set_default_device" not in code and "cuda.set_device" not in code, name(path)


def test_source_is_ascii_and_has_nothing_left_to_do():
    for path in LIBRARY:
        text = path.read_text()
        assert text.isascii(), name(path)
        assert not [word for word in ("TODO", "FIXME", "XXX") if word in text], name(path)


def test_every_public_name_exists():
    for public in sandbox.__all__:
        assert getattr(sandbox, public) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = sandbox.nonsense


def test_importing_the_package_has_no_effects():
    """Neither `import sandbox` nor the command line's own imports bring torch in."""
    code = (
        "import sys, threading\n"
        "import sandbox, sandbox.cli\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'yaml', 'PIL', 'sandbox_plugins'}\n"
        "print(sorted(heavy & set(sys.modules)), threading.active_count())\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (out.stdout.strip(), out.stderr) == ("[] 1", "")
