"""A row beside others: its share of a ceiling, and its lead over the plain one."""

from collections.abc import Mapping
from typing import Any

import torch


def add_shares(
    found: Mapping[str, list[dict[str, Any]]], ceilings: Mapping[str, Any], device: torch.device
) -> None:
    """The share of each ceiling that a row reaches, where both are known."""
    rates = {row["precision"]: row.get("flops_per_second") or 0 for row in ceilings["matmul"]}
    # A CPU may have no fast product in 16 bits; and a part may keep some of its work in float32.
    best = {precision: max(rate, rates["float32"]) for precision, rate in rates.items()}
    for part, rows in found.items():
        for row in rows:
            # A GPU's training runs float32 as TF32, which is not what the product was measured in.
            tf32 = (part, row["precision"], device.type) == ("training", "float32", "cuda")
            if (rate := row.get("flops_per_second")) and best[row["precision"]] and not tf32:
                row["share_of_matmul"] = rate / best[row["precision"]]
            copied = ceilings["copy"].get("bytes_per_second")
            if (rate := row.get("bytes_per_second")) and copied:
                row["share_of_copy"] = rate / copied


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """How many times as fast a row is as the plain one beside it."""
    plain = {
        (row["precision"], row["batch_size"]): row.get("median_seconds")
        for row in rows
        if _is_plain(row)
    }
    for row in rows:
        before = plain.get((row["precision"], row["batch_size"]))
        if not _is_plain(row) and before and "median_seconds" in row:
            row["times_as_fast"] = before / row["median_seconds"]


def _is_plain(row: Mapping[str, Any]) -> bool:
    return not row.get("compiled") and row.get("fast", "off") == "off"
