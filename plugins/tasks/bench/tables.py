"""The rows of a measurement as a person reads them: round numbers, one table a part."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

_GB, _TERA = 1e9, 1e12


def table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line a row."""
    return [_line(row) for row in rows]


def split_table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Percent of each row's time by part."""
    found = []
    for row in rows:
        if splits := row.get("splits"):
            parts = {name: statistics.median(s[name] for s in splits) for name in splits[0]}
            parts.pop("whole", None)
            total = sum(parts.values())
            found.append(
                _where(row) | {f"{k}_%": round(100 * v / total, 1) for k, v in parts.items()}
            )
    return found


def ceilings_table(
    products: Sequence[Mapping[str, Any]], copied: Mapping[str, Any]
) -> dict[str, Any]:
    """TFLOP/s by precision, GB/s of a copy; words where they could not be measured."""
    found: dict[str, Any] = {
        f"matmul {row['precision']}": f"{row['flops_per_second'] / _TERA:.4g} TFLOP/s"
        if "flops_per_second" in row
        else row["status"]
        for row in products
    }
    known = "bytes_per_second" in copied
    found["copy"] = f"{copied['bytes_per_second'] / _GB:.4g} GB/s" if known else copied["status"]
    return found


def brief(part: str, row: Mapping[str, Any]) -> str:
    """A row in half a line."""
    mode = " (compiled)" if row.get("compiled") else ""
    mode += f" (fast: {row['fast']})" if row.get("fast", "off") != "off" else ""
    where = f"{part} {row['precision']} x {row['batch_size']}{mode}"
    if "median_seconds" not in row:
        return f"{where}: {row['status']}" + (f" ({row['reason']})" if "reason" in row else "")
    warning = "" if row["status"] == "ok" else f", {row['status']}"
    first = f" (first {row['first_seconds']:.3g} s)" if "first_seconds" in row else ""
    return (
        f"{where}: {row['ms_per_image']:.4g} ms an image, {row['images_per_second']:.4g} "
        f"images/s{first}{warning}"
    )


def _where(row: Mapping[str, Any]) -> dict[str, Any]:
    where = {"precision": row["precision"], "batch": row["batch_size"]}
    where |= {"compiled": "yes"} if row.get("compiled") else {}
    return where | ({"fast": row["fast"]} if "fast" in row else {})


def _line(row: Mapping[str, Any]) -> dict[str, Any]:
    if "median_seconds" not in row:
        return _where(row) | {"status": row["status"]}
    line = _where(row) | {
        "status": row["status"],
        "ms": _round(1000 * row["median_seconds"]),
        "ms_q1": _round(1000 * row["q1_seconds"]),
        "ms_q3": _round(1000 * row["q3_seconds"]),
        "ms_per_image": _round(row["ms_per_image"]),
        "images_per_sec": _round(row["images_per_second"]),
    }
    if "first_seconds" in row:
        line["first_sec"] = _round(row["first_seconds"])
    if "times_as_fast" in row:
        line["times_as_fast"] = _round(row["times_as_fast"])
    if row.get("peak_bytes") is not None:
        line["peak_MiB"] = round(row["peak_bytes"] / 2**20)
    if "ids_changed" in row:
        line["ids_changed_%"] = _round(100 * row["ids_changed"])
    for name in ("share_of_matmul", "share_of_copy"):
        if row.get(name) is not None:
            line[f"%_of_{name.rpartition('_')[2]}"] = _round(100 * row[name])
    return line


def _round(value: float) -> float:
    return float(f"{value:.4g}")
