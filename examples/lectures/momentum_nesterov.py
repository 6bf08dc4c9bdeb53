"""Nesterov looks ahead and swings less.

Momentum computes the gradient where the ball is, Nesterov where its velocity will have carried it. Same step, same
momentum: across the ravine the swings of momentum shrink by sqrt(m) per step, those of Nesterov by the smaller
sqrt(m (1 - step * curvature)), for a look-ahead sees the other wall coming.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from common import BLUE, GREEN, Array, Figure, descend, level_lines, main, quadratic
from onepass.optim import SGD

STEEP, LR, M, STEPS, START = 20.0, 0.02, 0.9, 100, (-3.0, 0.9)
surface = quadratic(1.0, STEEP)
RATES = {"momentum": M**0.5, "Nesterov": (M * (1 - LR * STEEP)) ** 0.5}
COLORS = {"momentum": BLUE, "Nesterov": GREEN}


@dataclass
class Result:
    paths: dict[str, Array]
    lecture_form: Array

    def measured_rate(self, name: str) -> float:
        """How much the swings across the ravine shrink per step."""
        swings = np.abs(self.paths[name][:, 1])
        highest = [i for i in range(1, STEPS) if swings[i] > max(swings[i - 1], swings[i + 1]) and swings[i] > 1e-9]
        return float(np.exp(np.polyfit(highest, np.log(swings[highest]), 1)[0]))


def compute(quick: bool) -> Result:
    paths = {
        "momentum": descend(surface, START, lambda w: SGD(w, lr=LR, momentum=M), STEPS),
        "Nesterov": descend(surface, START, lambda w: SGD(w, lr=LR, momentum=M, nesterov=True), STEPS),
    }
    # h <- m h + lr gradient(w - m h); w <- w - h: the same path while the learning rate is constant.
    form = descend(surface, START, lambda w: SGD(w, lr=LR, momentum=M, nesterov=True, lr_in_velocity=True), STEPS)
    return Result(paths, form)


def check(result: Result) -> None:
    for name, rate in RATES.items():
        assert abs(result.measured_rate(name) - rate) < 0.02, f"{name}: {result.measured_rate(name)}, theory {rate}"
    assert np.abs(result.lecture_form - result.paths["Nesterov"]).max() < 1e-12


def draw(result: Result, figure: Figure) -> None:
    grid = figure.subplot_mosaic([["momentum", "swing"], ["Nesterov", "swing"]], width_ratios=(3, 2))
    for name, path in result.paths.items():
        level_lines(grid[name], surface, (-3.2, 2.2), (-1.0, 1.05))
        grid[name].plot(*path.T, "o-", color=COLORS[name], markersize=3, linewidth=1.2)
        grid[name].set_title(name[0].upper() + name[1:])
        steps = np.arange(50)
        grid["swing"].plot(steps, path[:50, 1], color=COLORS[name], label=name)
        for sign in (-1, 1):
            envelope = sign * START[1] * RATES[name] ** steps
            grid["swing"].plot(steps, envelope, ":", color=COLORS[name], linewidth=1.2)
    grid["swing"].set(title="Across the ravine", xlabel="step")
    grid["swing"].text(49, -0.93, "dotted: rates of theory", ha="right", fontsize=9)
    grid["swing"].legend(loc="upper right")


if __name__ == "__main__":
    main(__doc__, compute, check, draw)
