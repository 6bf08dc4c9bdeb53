"""Gradient descent walks down the surface of the loss.

Every step goes against the gradient, across the level lines. With a step below 2 / L, where L is the largest curvature,
the loss falls at every step, by at least the amount that the descent lemma promises. With a step above it, it rises.
"""

from __future__ import annotations

from dataclasses import dataclass

from common import BLUE, RED, Array, Figure, along, descend, level_lines, main
from onepass.optim import SGD
from torch import Tensor

STEP, TOO_LARGE = 0.12, 0.44
START = (-2.3, 1.1)
CURVATURE = 5.0  # the largest of the surface: along the second coordinate


def surface(w: Tensor) -> Tensor:
    return (1 - (1.5 * w[0]).cos()) / 1.5 + w[0] ** 2 / 4 + CURVATURE * w[1] ** 2 / 2


@dataclass
class Result:
    path: Array
    losses: Array
    promised: Array  # by the descent lemma: the loss after a step is at most this
    too_large: Array


def compute(quick: bool) -> Result:
    path = descend(surface, START, lambda w: SGD(w, lr=STEP), 40)
    losses = along(surface, path)
    squared_gradient = (((path[1:] - path[:-1]) / STEP) ** 2).sum(1)
    promised = losses[:-1] - STEP * (1 - STEP * CURVATURE / 2) * squared_gradient
    return Result(path, losses, promised, along(surface, descend(surface, START, lambda w: SGD(w, lr=TOO_LARGE), 40)))


def check(result: Result) -> None:
    assert (result.losses[1:] < result.losses[:-1]).all()
    assert (result.losses[1:] <= result.promised + 1e-12).all()
    assert result.too_large[-1] > result.too_large[0]


def draw(result: Result, figure: Figure) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    level_lines(left, surface, (-2.6, 1.2), (-1.3, 1.4), log=False)
    left.plot(*result.path.T, "o-", color=BLUE, markersize=4)
    left.plot(0, 0, "*", color=RED, markersize=13)
    left.annotate("start", START, (6, 4), textcoords="offset points")
    left.set(title="Across the level lines to the minimum", xlabel="first weight", ylabel="second weight")
    right.plot(result.losses, "o-", color=BLUE, markersize=3, label=f"step {STEP}: falls every time")
    right.plot(result.too_large, "--", color=RED, label=f"step {TOO_LARGE} > 2 / L: rises")
    right.set(title="The loss of every step", xlabel="step", ylabel="loss", ylim=(0, 8))
    right.legend(loc="upper right")


if __name__ == "__main__":
    main(__doc__, compute, check, draw)
