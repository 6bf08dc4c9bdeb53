"""In a ravine momentum is faster, because it sums up what the gradients have in common.

The level lines are elongated: the surface is fifty times steeper across than along. Gradient descent zigzags, even with
its best step, and comes closer by the factor (k - 1) / (k + 1) per step, k = 50. With momentum m and half of that step
the zigzags cancel, the way along the ravine adds up, and the factor is sqrt(m).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from common import BLUE, ORANGE, Array, Figure, along, descend, level_lines, main, quadratic
from onepass.optim import SGD

FLAT, STEEP = 1.0, 50.0
START, STEPS = (-3.0, 0.6), 120
surface = quadratic(FLAT, STEEP)
MOMENTUM, BEST = 0.75, 2 / (STEEP + FLAT)
RATES = {"gradient descent": (STEEP - FLAT) / (STEEP + FLAT), "momentum": MOMENTUM**0.5}
COLORS = {"gradient descent": ORANGE, "momentum": BLUE}


@dataclass
class Result:
    paths: dict[str, Array]

    def measured_rate(self, name: str) -> float:
        """Of the distance to the minimum per step, from the fall of the loss between a third and the end."""
        log_loss = np.log(along(surface, self.paths[name]))
        return float(np.exp((log_loss[-1] - log_loss[STEPS // 3]) / (STEPS - STEPS // 3) / 2))


def compute(quick: bool) -> Result:
    return Result(
        {
            "gradient descent": descend(surface, START, lambda w: SGD(w, lr=BEST), STEPS),
            "momentum": descend(surface, START, lambda w: SGD(w, lr=BEST / 2, momentum=MOMENTUM), STEPS),
        }
    )


def check(result: Result) -> None:
    for name, rate in RATES.items():
        assert abs(result.measured_rate(name) - rate) < 0.02, f"{name}: {result.measured_rate(name)}, theory {rate}"
    losses = {name: along(surface, path)[-1] for name, path in result.paths.items()}
    assert losses["momentum"] < 1e-6 * losses["gradient descent"]


def draw(result: Result, figure: Figure) -> None:
    grid = figure.subplot_mosaic([["gradient descent", "loss"], ["momentum", "loss"]], width_ratios=(3, 2))
    for name, path in result.paths.items():
        level_lines(grid[name], surface, (-3.2, 0.9), (-0.7, 0.75))
        grid[name].plot(*path.T, "o-", color=COLORS[name], markersize=3, linewidth=1.2)
        grid[name].set_title(name.capitalize())
        grid["loss"].semilogy(along(surface, path), color=COLORS[name], label=name)
        theory = along(surface, path)[0] * RATES[name] ** (2 * np.arange(STEPS + 1))
        grid["loss"].semilogy(theory, ":", color=COLORS[name], label=f"rate of theory, {RATES[name]:.2f}")
    grid["loss"].set(title="Loss", xlabel="step", ylim=(1e-18, 1e5))
    grid["loss"].legend(loc="upper right", fontsize=9)


if __name__ == "__main__":
    main(__doc__, compute, check, draw)
