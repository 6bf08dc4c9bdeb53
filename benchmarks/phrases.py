"""How the reports write numbers, ratios and machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Json = Mapping[str, Any]
Quartiles = Sequence[float]


def milliseconds(value: float | None) -> str:
    """Three significant digits, never an exponent."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def times(quartiles: Quartiles | None) -> str:
    return f"{quartiles[1]:.2f}x" if quartiles else "-"


def spread(quartiles: Quartiles | None, busy: bool) -> str:
    """The quartiles of a ratio, and whether they leave open which of the two is faster."""
    if not quartiles:
        return "-"
    low, _, high = quartiles
    digits = 3 if "1.00" in (f"{low:.2f}", f"{high:.2f}") else 2  # which side of 1 it is on
    return f"{low:.{digits}f} to {high:.{digits}f}" + ", straddles 1" * (low < 1 < high) + ", busy machine" * busy


def left_out(rows: Sequence[Json]) -> dict[str, str]:
    """Why torch.compile is missing, and in which rows."""
    names: dict[str, list[str]] = {}
    for row in rows:
        if "left_out" in row["compile"]:
            names.setdefault(row["compile"]["left_out"], []).append(row["name"])
    return {why: "all rows" if len(where) == len(rows) else ", ".join(where) for why, where in names.items()}


def describe(result: Json) -> str:
    """The machine and the versions, in one line."""
    environment = result["environment"]
    machine, versions = environment["machine"], environment["versions"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['isa']}, {environment['threads']} threads"
    software = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{where}; {software}; {environment['date'][:10]}"
