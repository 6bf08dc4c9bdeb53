"""The one kind of plot: how many times faster, one line per row, with quartiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

# Colour-blind safe (Okabe and Ito), and different in shape as well.
STYLES = [("#0072b2", "o"), ("#d55e00", "D")]
GREY = "#777777"
TICKS = (0.1, 0.2, 0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.5, 2, 3, 5, 10, 20, 50, 100)

Quartiles = Sequence[float]


def plot_ratios(
    names: Sequence[str], series: Mapping[str, Sequence[Quartiles | None]], title: str, description: str, path: Path
) -> None:
    """``series`` has the ratio to each peer, at most two: a marker at the median, a bar from quartile to quartile.

    The medians are written in columns beside the plot, where they cannot overlap. Made to be read 800 pixels wide.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    series = {label: quartiles for label, quartiles in series.items() if any(quartiles)}
    figure, axes = plt.subplots(figsize=(8, 1.5 + 0.24 * len(names)), layout="constrained")
    values = [value for quartiles in series.values() for q in quartiles if q for value in q]
    low, high = min([*values, 0.95]) / 1.05, max([*values, 1.05]) * 1.05
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.minorticks_off()
    axes.set_xticks(_spaced([tick for tick in TICKS if low <= tick <= high], low, high))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.axvline(1, color="black", linewidth=1)
    for place in range(0, len(names), 2):
        axes.axhspan(place - 0.5, place + 0.5, color="#f4f4f4", linewidth=0)

    for i, ((label, quartiles), (colour, marker)) in enumerate(zip(series.items(), STYLES, strict=False)):
        shift = 0.18 * (2 * i - 1) if len(series) > 1 else 0.0
        column = 45 + 60 * i  # its right edge, in points from the axes
        measured = [(place, q) for place, q in enumerate(quartiles) if q]
        axes.hlines(
            [place + shift for place, _ in measured],
            [q[0] for _, q in measured],
            [q[2] for _, q in measured],
            color=colour,
            linewidth=2,
            alpha=0.5,
        )
        axes.plot(
            [q[1] for _, q in measured], [place + shift for place, _ in measured], marker, color=colour, markersize=5
        )
        texts = [(-1, label), *((place, f"{q[1]:.2f}x" if q else "-") for place, q in enumerate(quartiles))]
        for place, text in texts:
            axes.annotate(
                text,
                (1, place),
                (column, 0),
                xycoords=axes.get_yaxis_transform(),
                textcoords="offset points",
                color=colour,
                size=8,
                ha="right",
                va="center",
                annotation_clip=False,
            )

    axes.set_yticks(range(len(names)), names, size=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.suptitle(title, size=11, weight="bold", x=0.01, ha="left")
    figure.supxlabel(
        f"right of 1x: onepass is faster; bars: quartiles\n{description}", size=7, color=GREY, x=0.01, ha="left"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _spaced(ticks: Sequence[float], low: float, high: float) -> list[float]:
    """Those ticks that leave room for their labels; 1 is always among them."""
    room = (high / low) ** (1 / 12)
    kept = [1.0]
    for tick in sorted(ticks, key=lambda tick: max(tick, 1 / tick)):
        if all(max(tick / other, other / tick) > room for other in kept):
            kept.append(tick)
    return sorted(kept)
