"""The command line: run, check, bench, plugins, show, new, report, export.

Exit status 0: done. 1: failed while running. 2: the user's mistake. Nothing here imports torch
before a command needs it.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sandbox.errors import RunError, SandboxError

if TYPE_CHECKING:
    from sandbox.recipe import Recipe
    from sandbox.registry import Registry


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        status = int(arguments.command(arguments))
        sys.stdout.flush()  # here, where a closed pipe is no error yet
        return status
    except SandboxError as error:
        for line in str(error).splitlines():
            print(f"sandbox: {line}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"sandbox: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        hint = "the same command goes on from the last checkpoint, if there is one"
        print(f"sandbox: stopped; {hint}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `sandbox plugins | head`
        return 0
    except Exception as error:
        if os.environ.get("SANDBOX_TRACEBACK"):
            raise
        print(
            f"sandbox: {type(error).__name__}: {' '.join(str(error).split())[:500]} "
            "(SANDBOX_TRACEBACK=1 shows where; a run also keeps it in error.log)",
            file=sys.stderr,
        )
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sandbox", description="A research sandbox for visual autoregressive image generation."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=command.__doc__, description=command.__doc__)
        sub.set_defaults(command=command)
        sub.add_argument("--plugins", type=Path, action="append", default=[], metavar="FOLDER")
        return sub

    for name, command in (("run", _run), ("check", _check), ("bench", _bench)):
        sub = add(name, command)
        sub.add_argument("recipe", type=Path)
        sub.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
        preview = sub.add_mutually_exclusive_group()
        preview.add_argument("--full", action="store_true", help="never the recipe's preview")
        preview.add_argument(
            "--preview", action="store_true", help="the recipe's preview, anywhere"
        )
        if name == "run":
            sub.add_argument("--out", type=Path, help="run folder; default runs/RECIPE")
            sub.add_argument("--fresh", action="store_true", help="delete the run folder first")
        if name == "bench":
            _add_bench(sub)
    add("plugins", _plugins).add_argument("--json", action="store_true")
    add("show", _show).add_argument("name", help="a part's name, as in `var` or `sampler/greedy`")
    sub = add("new", _new)
    sub.add_argument("name", help="the plugin's name, as in my_sampler")
    sub.add_argument("--kind", default="sampler", help="sampler, schedule, tokenizer, ...")
    sub.add_argument("--folder", type=Path, default=Path("my_plugins"))
    sub = add("report", _report)
    sub.add_argument("folder", type=Path)
    sub.add_argument("--beside", type=Path, action="append", default=[], metavar="FOLDER")
    _add_export(add("export", _export))
    return parser


def _add_export(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("folder", type=Path, help="a run folder")
    sub.add_argument("out", type=Path, help="a folder for the files")
    sub.add_argument(
        "--layout",
        choices=("published", "own"),
        default="published",
        help="the published checkpoints' names, or the sandbox's own, which every recipe reads",
    )
    sub.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of large floating tensors; bfloat16 halves the files",
    )


def _add_bench(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--out", type=Path, help="folder; default runs/bench-RECIPE")
    sub.add_argument("--parts", metavar="P,...", help="generation, encoding, decoding, training")
    sub.add_argument("--batch-sizes", metavar="1,8,64", help="images at a time")
    sub.add_argument(
        "--precision", metavar="P,...", help="auto, float32, bfloat16, float16; several by comma"
    )
    sub.add_argument("--fast", metavar="MODE,...", help="off, auto, on: how generation is measured")
    sub.add_argument("--repeats", metavar="N", help="timed calls of everything")
    sub.add_argument("--compile", metavar="WHEN", help="auto, on, off: measure compiled too")
    sub.add_argument("--profile", action="store_true", help="keep kernels, and a Chrome trace")
    sub.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="KEY=VALUE,...",
        help="measure once with each value of a setting, each in a process of its own",
    )


def _run(arguments: argparse.Namespace) -> int:
    """Run a recipe, or go on with it; with torchrun, in several processes."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return _run_here(arguments)
    from sandbox.distributed import process_group

    with process_group(size):
        return _run_here(arguments)


def _run_here(arguments: argparse.Namespace) -> int:
    registry = _registry(arguments)
    preview = _wants_preview(arguments)
    recipe = _load(arguments, registry, preview)
    from sandbox.run import execute

    name = arguments.recipe.stem + ("-preview" if preview else "")
    folder = arguments.out or Path("runs") / name
    if (folder / "recipe.yaml").resolve() == arguments.recipe.resolve() and not (
        folder / "log.jsonl"
    ).exists():
        raise SandboxError(f"--out {folder}: the run would overwrite the recipe; choose another")
    if arguments.fresh and folder.exists() and not (folder / "recipe.yaml").exists():
        raise SandboxError(
            f"--fresh: {folder} is not a run folder; delete it yourself if you mean it"
        )
    execute(
        recipe,
        folder,
        name=arguments.recipe.stem,
        command=_command(),
        fresh=arguments.fresh,
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
    )
    return 0


def _command() -> str:
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    start = f"torchrun --nproc-per-node={here} -m sandbox " if here > 1 else "sandbox "
    return start + shlex.join(sys.argv[1:])


def _wants_preview(arguments: argparse.Namespace) -> bool:
    from sandbox.recipe import has_preview

    declared = has_preview(arguments.recipe)
    if arguments.preview and not declared:
        raise SandboxError(f"{arguments.recipe}: the recipe declares no preview")
    if arguments.preview or arguments.full or not declared:
        return bool(arguments.preview)
    import torch

    if torch.cuda.is_available():
        return False
    from sandbox.distributed import rank

    if rank() > 0:
        return True
    print(
        f"no GPU here: running the preview that {arguments.recipe} declares (--full runs all of it)"
    )
    return True


def _check(arguments: argparse.Namespace) -> int:
    """Check a recipe without running it, and print it resolved."""
    from sandbox.recipe import has_preview, to_yaml

    registry = _registry(arguments)
    recipe = _load(arguments, registry, arguments.preview)
    if has_preview(arguments.recipe) and not arguments.full:
        _load(arguments, registry, True)
    print(to_yaml(recipe), end="")
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    """Measure a recipe's generator and tokenizer on this machine; trains nothing."""
    from sandbox import bench, varying

    name, preview = arguments.recipe.stem, _wants_preview(arguments)
    if arguments.vary:
        out = arguments.out or Path("runs", f"bench-{name}-varied" + "-preview" * preview)
        return varying.measure_each(
            arguments.vary, out, arguments, lambda text: print(text, flush=True)
        )
    registry = _registry(arguments)
    recipe = _load(arguments, registry, preview)
    settings = bench.settings_of(arguments)
    out = arguments.out or Path("runs", f"bench-{name}" + "-preview" * preview)
    bench.measure(recipe, registry, settings, out, name=name, command=_command())
    return 0


def _plugins(arguments: argparse.Namespace) -> int:
    """List what is registered, from where, and what is broken."""
    from sandbox.describe import table

    registry = _registry(arguments)
    rows = table(registry)
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        width = {key: max(len(row[key]) for row in rows) for key in ("interface", "name", "plugin")}
        for row in rows:
            left = "  ".join(row[key].ljust(width[key]) for key in width)
            print(f"{left}  {row['summary']}\n{' ' * len(left)}  {row['where']}")
    return 1 if registry.broken else 0


def _show(arguments: argparse.Namespace) -> int:
    """Show a part's settings: types, ranges, defaults and documentation."""
    from sandbox.describe import describe

    print(describe(_registry(arguments), arguments.name))
    return 0


def _new(arguments: argparse.Namespace) -> int:
    """Write a plugin's skeleton with a passing contract test."""
    from sandbox.scaffold import write_plugin

    for path in write_plugin(arguments.folder, arguments.name, arguments.kind):
        print(path)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    """Write a run's HTML report again, beside other runs if named."""
    from sandbox.interfaces import Observer
    from sandbox.registry import Registry

    registry: Registry = _registry(arguments)
    for folder in (arguments.folder, *arguments.beside):
        if not (folder / "recipe.yaml").exists():
            raise SandboxError(f"{folder} is not a run folder (it has no recipe.yaml)")
    report = registry.find(Observer, "report")
    observer = report(report.Params(beside=tuple(arguments.beside)))
    print(observer.write(arguments.folder))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    """Export a run's weights, in the layout of the published checkpoints or our own."""
    from sandbox.notebook import export, load

    run = load(arguments.folder, plugins=arguments.plugins, device="cpu")
    for path in export(run, arguments.out, layout=arguments.layout, dtype=arguments.dtype):
        print(path)
    return 0


def _registry(arguments: argparse.Namespace) -> "Registry":
    from sandbox.plugins import load_plugins

    return load_plugins(arguments.plugins)


def _load(arguments: argparse.Namespace, registry: "Registry", preview: bool) -> "Recipe":
    from sandbox.recipe import load_recipe

    return load_recipe(arguments.recipe, arguments.set, registry, preview=preview)


if __name__ == "__main__":
    sys.exit(main())
