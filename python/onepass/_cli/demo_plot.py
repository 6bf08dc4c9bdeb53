"""The picture of the demo; the only part of it that needs matplotlib."""

from __future__ import annotations

import io

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from .demo import Comparison, smooth

TORCH, ONEPASS, GREY = "#e69f00", "#0072b2", "#bbbbbb"  # distinguishable for colour-blind readers


def picture(results: list[Comparison], file_format: str) -> bytes:
    """A panel per network with both loss curves on top of each other, and one that shows where the time of a step goes."""
    figure = Figure(figsize=(3.4 * len(results) + 5.5, 4.2), layout="constrained")
    panels = figure.subplots(1, len(results) + 1, squeeze=False, width_ratios=[1] * len(results) + [1.6])[0]
    *curves, times = panels
    for axes, result in zip(curves, results, strict=True):
        axes.plot(smooth(result.torch.losses), color=TORCH, linewidth=5, label="torch")
        axes.plot(smooth(result.onepass.losses), color=ONEPASS, linewidth=1.5, label="onepass, on top of it")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 6)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("step")
        axes.set_title(f"{result.network}: {result.optimizer}", loc="left", fontweight="bold")
    curves[0].set_ylabel("training loss (mean of 20 steps)")
    curves[0].legend(frameon=False)
    _draw_times(times, results)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    content = io.BytesIO()
    figure.savefig(content, format=file_format, dpi=150)
    return content.getvalue()


def _draw_times(axes: Axes, results: list[Comparison]) -> None:
    ticks = []
    for i, result in enumerate(results):
        for run, label, colour, place in (
            (result.torch, "torch", TORCH, 2.6 * i),
            (result.onepass, "onepass", ONEPASS, 2.6 * i + 1),
        ):
            products = 100 * (run.step_ms - run.rest_ms) / result.torch.step_ms
            rest = 100 * run.rest_ms / result.torch.step_ms
            axes.barh(place, products, color=GREY, height=0.9)
            axes.barh(place, rest, left=products, color=colour, height=0.9)
            ratio = f"  {result.step_quartiles[1]:.2f}x as fast" if run is result.onepass else ""
            axes.text(products + rest + 1, place, f"{run.step_ms:.2f} ms{ratio}", va="center", size=10)
            ticks.append((place, f"{result.network}, {label}"))
    axes.set_yticks(*zip(*ticks, strict=True))
    axes.invert_yaxis()
    axes.set_xlim(0, 50 + max(100, *(100 * r.onepass.step_ms / r.torch.step_ms for r in results)))
    axes.set_xticks([0, 50, 100], ["0 %", "50 %", "100 %"])
    axes.set_xlabel("of torch's step; grey: matrix products and convolutions")
    axes.tick_params(axis="y", length=0)
    axes.set_title("Where the time of a step goes", loc="left", fontweight="bold")
