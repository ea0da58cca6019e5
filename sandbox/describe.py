"""What is registered, put in words: the tables of `sandbox plugins` and `sandbox show`."""

import inspect
from collections.abc import Iterator
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from sandbox.errors import SandboxError, did_you_mean
from sandbox.parts import Part
from sandbox.registry import Entry, Registry


def table(registry: Registry) -> list[dict[str, str]]:
    """One row a part, sorted by interface and name; broken plugins last."""
    rows = [
        {
            "interface": entry.interface.__name__,
            "name": entry.name,
            "plugin": entry.plugin,
            "summary": _summary(entry.cls),
            "where": entry.where,
        }
        for entry in sorted(registry, key=lambda e: (e.interface.__name__, e.name))
    ]
    for plugin, error in registry.broken.items():
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        rows.append(
            {
                "interface": "BROKEN",
                "name": plugin,
                "plugin": plugin,
                "summary": reason,
                "where": "",
            }
        )
    return rows


def describe(registry: Registry, name: str) -> str:
    """The settings of every part called `name`; `interface/name` picks one of several."""
    kind, _, plain = name.rpartition("/")
    found = [
        entry
        for entry in registry
        if entry.name == plain and kind.lower() in ("", entry.interface.__name__.lower())
    ]
    if not found:
        hint = did_you_mean(plain, {entry.name for entry in registry})
        raise SandboxError(f"no part is named {name!r}{hint}; `sandbox plugins` lists them")
    return "\n\n".join("\n".join(_lines(entry)) for entry in found)


def _lines(entry: Entry) -> Iterator[str]:
    yield f"{entry.interface.__name__} {entry.name!r}, of plugin {entry.plugin!r}"
    yield f"  {entry.where}"
    if text := inspect.getdoc(entry.cls):
        yield ""
        yield from (f"  {line}".rstrip() for line in text.splitlines())
    yield ""
    fields = entry.cls.Params.model_fields
    if not fields:
        yield "  no settings"
    for key, info in fields.items():
        yield f"  {key}: {_type(info.annotation)}{_limits(info)}  {_default(info)}"
        for line in inspect.cleandoc(info.description or "").splitlines():
            yield f"      {line}"


def _summary(cls: type) -> str:
    return (inspect.getdoc(cls) or "").partition("\n")[0]


def _type(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Part:
        return str(inner[0].__name__)
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin in (Union, UnionType):
        return " | ".join(map(_type, inner))
    if origin is not None:
        words = ("..." if each is Ellipsis else _type(each) for each in inner)
        return f"{origin.__name__}[{', '.join(words)}]"
    return "None" if annotation is type(None) else str(getattr(annotation, "__name__", annotation))


def _limits(info: FieldInfo) -> str:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    limits = [
        f"{sign} {getattr(rule, name)}"
        for rule in info.metadata
        for name, sign in signs.items()
        if getattr(rule, name, None) is not None
    ]
    return f" ({', '.join(limits)})" if limits else ""


def _default(info: FieldInfo) -> str:
    if info.default_factory is not None:
        return "[made when absent]"
    return "[required]" if info.default is PydanticUndefined else f"[default {info.default!r}]"
