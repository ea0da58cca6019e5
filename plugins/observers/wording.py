"""Numbers and times as a person wants to read them; the console and the report share these."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard


def number(value: Any) -> str:
    """A value in few characters: four significant digits, thousands grouped, text unchanged."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if not isinstance(value, float):
        return str(value)
    if math.isfinite(value) and 1e4 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """A time span: `0.4 s`, `42 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    return f"{total // 3600} h {total % 3600 // 60:02d} min"


def is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def is_table(value: Any) -> TypeGuard[Sequence[Mapping[str, Any]]]:
    """Whether a value is a list of flat mappings, such as the codebook's rows, one a scale."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(isinstance(row, Mapping) and all(map(is_scalar, row.values())) for row in value)
    )


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Every key of the rows, in order of first appearance."""
    return list(dict.fromkeys(key for row in rows for key in row))


def folded(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same with `used/scale1`, `used/scale2`, ... as one list, `used by scale`."""
    lists: dict[str, list[Any]] = {}
    for key, value in values.items():
        name, _, scale = str(key).partition("/scale")
        if scale == str(len(lists.get(name, ())) + 1) and isinstance(value, int | float):
            lists.setdefault(name, []).append(value)
    lists = {name: each for name, each in lists.items() if len(each) > 1}
    short: dict[str, Any] = {}
    for key, value in values.items():
        name, _, scale = str(key).partition("/scale")
        taken = name in lists and scale in map(str, range(1, len(lists[name]) + 1))
        short[f"{name} by scale" if taken else key] = lists[name] if taken else value
    return short


def one_line(error: BaseException | str) -> str:
    """The first line of an error, or its type where it says nothing (Ctrl-C)."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
