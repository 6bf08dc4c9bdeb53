"""Presents the JSON of memory.py as a markdown table and a plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phrases import describe

Json = Mapping[str, Any]


def markdown(result: Json) -> str:
    rows = result["rows"]
    lines = [describe(result) + ".", ""]
    lines += [
        "| AdamW | peak MB | of torch's | time of a step, of torch's | quartiles |",
        "| --- | ---: | ---: | ---: | :---: |",
    ]
    for row in rows:
        cells = [row["name"], f"{row['peak_bytes'] / 1e6:.0f}", f"{row['peak_bytes'] / rows[0]['peak_bytes']:.2f}"]
        if "times_of_torch" in row:
            low, middle, high = row["times_of_torch"]
            cells += [f"{middle:.2f}", f"{low:.2f} to {high:.2f}" + (", busy machine" if row["busy"] else "")]
        else:
            cells += ["not timed", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(result: Json, path: Path) -> None:
    """The measured peaks, one bar per way to train."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = result["rows"][::-1]
    peaks = [row["peak_bytes"] / 1e6 for row in rows]
    figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
    colours = ["#e69f00" if row["name"].startswith("torch") else "#0072b2" for row in rows]
    axes.barh(range(len(rows)), peaks, color=colours, height=0.7)
    for place, peak in enumerate(peaks):
        axes.annotate(f"{peak:.0f}", (peak, place), (4, 0), textcoords="offset points", va="center", size=9)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows], size=9)
    axes.set_xlabel("MB at the peak of a training step", size=9)
    axes.set_title("A language model as large as GPT-2 small, AdamW: measured", loc="left", size=11, weight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
