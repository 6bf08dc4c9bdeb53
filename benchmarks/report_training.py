"""Presents the JSON of training.py as text, a markdown table and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plots
from phrases import describe, left_out, milliseconds, spread, times

Json = Mapping[str, Any]

OURS, EAGER, COMPILED = "onepass", "torch", "compile"
HEADERS = [
    *("model", "peer", "peer ms", "onepass ms", "ratio", "quartiles"),
    *("outside of products", "there", "peak MB: torch / onepass", "s to compile"),
]


def cells(row: Json) -> list[list[str]]:
    """One line per peer."""
    ours = row["variants"][OURS]
    lines = []
    for name, ratio in row["ratios"].items():
        peer = row["variants"][name]
        seconds = row["compile"].get("seconds") if name == COMPILED else None
        lines.append(
            [
                row["name"],
                name,
                milliseconds(peer["median_ms"]),
                milliseconds(ours["median_ms"]),
                times(ratio),
                spread(ratio, name in row["busy"]),
                f"{peer['outside_ms'] / peer['median_ms']:.0%}",
                f"{peer['outside_ms'] / ours['outside_ms']:.2f}x",
                f"{megabytes(peer)} / {megabytes(ours)}",
                "-" if seconds is None else f"{seconds:.0f}",
            ]
        )
    return lines


def megabytes(variant: Json) -> str:
    return f"{variant['peak_bytes'] * 1e-6:.0f}" if "peak_bytes" in variant else "-"


def line(row: Json) -> str:
    """The row as text, printed as soon as it is measured."""
    return "\n".join(
        "; ".join(f"{header} {cell}" for header, cell in zip(HEADERS, cells_, strict=True)) for cells_ in cells(row)
    )


def mean(rows: Sequence[Json]) -> float:
    return statistics.geometric_mean(row["ratios"][EAGER][1] for row in rows)


def markdown(result: Json) -> str:
    table = [HEADERS, ["---", "---", *["---:"] * (len(HEADERS) - 2)]]
    table += [line for row in result["rows"] for line in cells(row)]
    lines = ["| " + " | ".join(row) + " |" for row in table]
    notes = [
        f"Geometric mean of the ratios to torch: {mean(result['rows']):.2f}x. A ratio is the median over interleaved rounds of one step each.",
        "Outside of products: the share of the peer's step that is not in matrix products and convolutions, which is all that",
        "onepass can shorten; there: how many times less time onepass spends in it. Peak MB: what a step allocates at the same",
        "time, beyond parameters and optimizer states.",
    ]
    reasons = left_out(result["rows"])
    notes += [f"torch.compile is left out of {where}: {reason}." for reason, where in reasons.items()]
    return "\n".join([describe(result) + ".", "", *lines, "", *notes])


def plot(result: Json, path: Path) -> None:
    rows = result["rows"]
    series = {
        "eager": [row["ratios"].get(EAGER) for row in rows],
        "compiled": [row["ratios"].get(COMPILED) for row in rows],
    }
    title = "A whole training step, times faster than torch"
    plots.plot_ratios([row["name"] for row in rows], series, title, describe(result), path)
