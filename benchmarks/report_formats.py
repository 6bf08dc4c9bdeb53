"""Presents the JSON of formats.py as markdown tables and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from phrases import describe, milliseconds

Json = Mapping[str, Any]


def markdown(result: Json) -> str:
    steps = [row for row in result["rows"] if row["kind"] == "step"]
    losses = [row for row in result["rows"] if row["kind"] == "loss"]
    lines = [describe(result) + ".", ""]
    if steps:
        times = [
            ["parameters", "AdamW with", "bytes of states per parameter", "ms", "times float32 states", "quartiles"]
        ]
        times.append(["---", "---", *["---:"] * 4])
        for row in steps:
            low, middle, high = row["times_of_full"]
            spread = f"{low:.2f} to {high:.2f}" + (", busy machine" if row["busy"] else "")
            cells = [row["dtype"], row["name"], f"{row['bytes']:.3g}", milliseconds(row["median_ms"])]
            times.append([*cells, f"{middle:.2f}", spread])
        lines += [
            *_lines(times),
            "",
            f"One tensor of {steps[0]['elements'] / 1e6:.3g}M elements, interleaved rounds.",
            "",
        ]
    if losses:
        tasks = list(dict.fromkeys(row["task"] for row in losses))
        trained = [["parameters", "states", *tasks], ["---", "---", *["---:"] * len(tasks)]]
        for key in dict.fromkeys((row["dtype"], row["name"]) for row in losses):
            of_key = [row["loss"] for row in losses if (row["dtype"], row["name"]) == key]
            trained.append([*key, *(f"{mean:.4f} ± {spread:.4f}" for mean, spread in of_key)])
        lines += [
            *_lines(trained),
            "",
            "Loss on held-out data after training: mean and standard deviation over five seeds.",
        ]
    return "\n".join(lines)


def _lines(table: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in table]


def plot(result: Json, path: Path) -> None:
    """Bytes per parameter of weights, gradients and states, one bar per dtype of the parameters and option."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in result["rows"] if row["kind"] == "step" and row["name"] != "torch fused"][::-1]
    weights = [2.0 if row["dtype"] == "bfloat16" else 4.0 for row in rows]
    parts = [("weights", weights, "#0072b2"), ("gradients", weights, "#e69f00")]
    parts.append(("states of AdamW", [row["bytes"] for row in rows], "#999999"))
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    left = [0.0] * len(rows)
    for label, sizes, colour in parts:
        axes.barh(range(len(rows)), sizes, left=left, color=colour, label=label, height=0.7)
        left = [before + size for before, size in zip(left, sizes, strict=True)]
    for place, total in enumerate(left):
        axes.annotate(f"{total:.3g}", (total, place), (4, 0), textcoords="offset points", va="center", size=9)
    axes.set_yticks(range(len(rows)), [f"{row['dtype']}, {row['name']}" for row in rows], size=9)
    axes.set_xlabel("bytes per parameter", size=9)
    axes.set_title("Memory of weights, gradients and states", loc="left", size=11, weight="bold")
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
