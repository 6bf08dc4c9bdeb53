"""Presents the JSON of training.py as a markdown table and a plot; called by report.py."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Json = Mapping[str, Any]

BLUE, GREY = "#0072b2", "#999999"


def markdown(result: Json, description: str) -> str:
    """One row per model and peer."""
    lines = [
        "| model | peer | peer ms | onepass ms | ratio | quartiles | outside of products | there |",
        "| --- | --- | ---: | ---: | ---: | :---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        ours = row["variants"]["onepass"]
        for name, (low, median, high) in row["ratios"].items():
            peer = row["variants"][name]
            less = peer["outside_ms"] / ours["outside_ms"]
            quartiles = f"{low:.2f} to {high:.2f}" + (", straddles 1" if low < 1 < high else "")
            cells = [
                row["row"],
                name,
                f"{peer['median_ms']:.0f}",
                f"{ours['median_ms']:.0f}",
                f"{median:.2f}x",
                quartiles,
            ]
            cells += [f"{peer['outside_ms'] / peer['median_ms']:.0%}", f"{less:.2f}x"]
            lines.append("| " + " | ".join(cells) + " |")
    mean = statistics.geometric_mean(row["ratios"]["torch"][1] for row in result["rows"])
    notes = [
        f"Geometric mean of the ratios to torch: {mean:.2f}x. A ratio is the median over interleaved rounds of one step each.",
        "Outside of products: the share of the peer's step that is not in matrix products and convolutions, which is all that",
        "onepass can shorten; there: how many times less time onepass spends in it.",
    ]
    return "\n".join([description + ".", "", *lines, "", "\n".join(notes)])


def plot(result: Json, description: str, path: Path) -> None:
    """One bar per model: how many times faster a whole step is than torch's, with its quartiles."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = result["rows"]
    places = range(len(rows))
    figure, axes = plt.subplots(figsize=(8, 1.4 + 0.42 * len(rows)), layout="constrained")
    ratios = [row["ratios"]["torch"] for row in rows]
    axes.barh(places, [median - 1 for _, median, _ in ratios], left=1, color=BLUE, height=0.6)
    errors = [[m - low for low, m, _ in ratios], [high - m for _, m, high in ratios]]
    axes.errorbar([m for _, m, _ in ratios], places, xerr=errors, fmt="none", ecolor=GREY, capsize=3)
    for place, (_, median, high) in zip(places, ratios, strict=True):
        axes.annotate(f"{median:.2f}x", (max(high, median, 1), place), (6, 0), textcoords="offset points", va="center")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlim(min(0.9, *(low for low, _, _ in ratios)), 1.1 * max(high for *_, high in ratios))
    axes.set_yticks(places, [row["row"] for row in rows])
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_title("A whole training step, times faster than torch eager", loc="left", fontsize=11)
    figure.suptitle(description, fontsize=7, color="#555555", x=0.01, ha="left")
    figure.savefig(path, dpi=150)
    plt.close(figure)
