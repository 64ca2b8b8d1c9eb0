"""Measurements as Markdown, CSV, JSON or JSON lines."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


FORMATS = ("md", "csv", "json", "jsonl")


def render(rows: Sequence[Row], output: str, columns: Sequence[str] = ()) -> str:
    """Rows in one of FORMATS. columns: those of the Markdown table (default: all)."""
    if output == "md":
        return markdown(rows, columns or list(rows[0]))
    if output == "csv":
        return as_csv(rows)
    return as_json(rows) if output == "json" else "\n".join(as_json(row, line=True) for row in rows)


def markdown(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """A Markdown table with padded columns; floats have two decimals, ratios three."""
    cells = [[_cell(row.get(name), 3 if "/" in name else 2) for name in columns] for row in rows]
    widths = [max(len(name), 3, *(len(line[i]) for line in cells), 0) for i, name in enumerate(columns)]
    numbers = [all(isinstance(row.get(name), int | float | None) for row in rows) or name == "t/s" for name in columns]
    rule = [("-" * (w - 1) + ":") if right else "-" * w for w, right in zip(widths, numbers, strict=True)]

    def line(values: Sequence[str]) -> str:
        padded = (v.rjust(w) if r else v.ljust(w) for v, w, r in zip(values, widths, numbers, strict=True))
        return "| " + " | ".join(padded) + " |"

    return "\n".join([line(columns), line(rule), *(line(values) for values in cells)])


def _cell(value: Any, digits: int) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def as_csv(rows: Sequence[Row]) -> str:
    """CSV with a header and all fields quoted, like llama-bench's, without lists."""
    names = [name for name, value in rows[0].items() if not isinstance(value, list | dict)] if rows else []
    out = io.StringIO()
    writer = csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([row.get(name) for name in names] for row in rows)
    return out.getvalue().rstrip("\n")


def as_json(value: Any, *, line: bool = False) -> str:
    """JSON, on one line or indented; nan and infinities become null."""
    return json.dumps(_clean(value), indent=None if line else 2, allow_nan=False)


def _clean(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return value


def rounded(value: float | None, digits: int = 3) -> float | None:
    """A rounded float; None stays None."""
    return None if value is None else round(float(value), digits)
