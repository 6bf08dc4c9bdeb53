"""The picture of `bench`; the only part of it that needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from .results import best_peer, describe

BLUE, GREY = "#0072b2", "#999999"


def picture(result: Mapping[str, Any], file_format: str) -> bytes:
    """One bar per row: how many times faster than the fastest path of torch, with its quartiles."""
    rows = result["rows"]
    places = range(len(rows))
    ratios = [row["ratios"][best_peer(row)] for row in rows]
    figure = Figure(figsize=(8, 1.4 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.barh(places, [median - 1 for _, median, _ in ratios], left=1, color=BLUE, height=0.6)
    errors = [[median - low for low, median, _ in ratios], [high - median for _, median, high in ratios]]
    axes.errorbar([median for _, median, _ in ratios], places, xerr=errors, fmt="none", ecolor=GREY, capsize=3)
    for place, row, (_, median, high) in zip(places, rows, ratios, strict=True):
        text = f"{median:.2f}x {best_peer(row)}"
        axes.annotate(text, (max(high, 1), place), (6, 0), textcoords="offset points", va="center")
    axes.axvline(1, color="black", linewidth=1)
    # Logarithmic: twice as fast is as far from 1 as half as fast.
    axes.set_xscale("log")
    axes.set_xlim(min(0.8, *(0.9 * low for low, _, _ in ratios)), max(2.0, *(1.6 * high for *_, high in ratios)))
    low, high = axes.get_xlim()
    axes.set_xticks([tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= tick <= high])
    axes.minorticks_off()
    axes.set_yticks(places, [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_title("An optimizer step, times faster than the fastest path of torch", loc="left", fontsize=11)
    figure.suptitle(describe(result), fontsize=7, color="#555555", x=0.01, ha="left")
    content = io.BytesIO()
    figure.savefig(content, format=file_format, dpi=150)
    return content.getvalue()
