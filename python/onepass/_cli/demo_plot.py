"""The picture of the demo; the only part of it that needs matplotlib."""

from __future__ import annotations

import io

from matplotlib.figure import Figure

from .demo import Comparison, smooth

TORCH, ONEPASS = "#e69f00", "#0072b2"  # distinguishable for colour-blind readers


def picture(results: list[Comparison], file_format: str) -> bytes:
    """A panel per network with both loss curves on top of each other, and one with the times in the optimizer."""
    figure = Figure(figsize=(3.6 * len(results) + 4, 4), layout="constrained")
    *panels, times = figure.subplots(1, len(results) + 1, squeeze=False)[0]
    for axes, result in zip(panels, results, strict=True):
        axes.plot(smooth(result.torch.losses), color=TORCH, linewidth=5, label="torch.optim")
        axes.plot(smooth(result.onepass.losses), color=ONEPASS, linewidth=1.5, label="onepass, on top of it")
        axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_title(f"{result.network}: {result.optimizer}", loc="left", fontweight="bold")
    panels[0].set_ylabel("training loss (mean of 20 steps)")
    panels[0].legend(frameon=False)

    for side, label, colour, offset in (("torch", "torch.optim", TORCH, -0.2), ("onepass", "onepass", ONEPASS, 0.2)):
        heights = [1e3 * getattr(result, side).optimizer_ms for result in results]
        bars = times.bar(
            [place + offset for place in range(len(results))], heights, width=0.38, color=colour, label=label
        )
        times.bar_label(bars, fmt="%.0f", padding=2)
    times.set_xticks(range(len(results)), [f"{result.network}\n{result.ratio:.1f}x" for result in results])
    times.set_ylabel("microseconds per step (median)")
    times.set_title("Time in the optimizer", loc="left", fontweight="bold")
    times.legend(frameon=False)

    for axes in (*panels, times):
        axes.spines[["top", "right"]].set_visible(False)
    content = io.BytesIO()
    figure.savefig(content, format=file_format, dpi=150)
    return content.getvalue()
