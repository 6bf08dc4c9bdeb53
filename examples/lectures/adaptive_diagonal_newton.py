"""What adaptive methods share with diagonal Newton: they see curvature only along the axes.

A ravine along the axes, and the same ravine turned by 45 degrees. Newton's method with the diagonal of the Hessian solves the
first in one step, and Adagrad is nearly as good. Turned, the diagonal is the same for both weights: diagonal Newton becomes
gradient descent with its zigzag, and Adagrad, too, loses most of its lead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from common import BLUE, GREEN, ORANGE, Array, Figure, Loss, Make, along, descend, level_lines, main
from onepass.optim import SGD, Adagrad
from torch import nn

FLAT, STEEP, STEPS, REACHED = 1.0, 30.0, 150, 0.05
METHODS = {"gradient descent": ORANGE, "diagonal Newton": GREEN, "Adagrad": BLUE}


def turned(angle: float) -> Loss:
    c, s = math.cos(angle), math.sin(angle)
    return lambda w: (FLAT * (c * w[0] + s * w[1]) ** 2 + STEEP * (c * w[1] - s * w[0]) ** 2) / 2


def diagonal_newton(angle: float) -> Make:
    """Gradient descent with every gradient divided by the diagonal of the Hessian."""
    c, s = math.cos(angle) ** 2, math.sin(angle) ** 2
    curvature = (FLAT * c + STEEP * s, FLAT * s + STEEP * c)

    def make(w: list[nn.Parameter]) -> SGD:
        w[0].register_hook(lambda gradient: gradient / torch.tensor(curvature))  # type: ignore[no-untyped-call]
        return SGD(w, lr=1)

    return make


@dataclass
class Result:
    paths: dict[float, dict[str, Array]]  # angle -> method -> path

    def steps_needed(self, angle: float, name: str) -> int:
        return int((along(turned(angle), self.paths[angle][name]) > REACHED).sum())


def compute(quick: bool) -> Result:
    paths = {}
    for angle in (0.0, math.pi / 4):
        surface, c, s = turned(angle), math.cos(angle), math.sin(angle)
        start = (-3 * c - 0.5 * s, -3 * s + 0.5 * c)  # the same point of the ravine
        paths[angle] = {
            "gradient descent": descend(surface, start, lambda w: SGD(w, lr=1.9 / STEEP), STEPS),
            "diagonal Newton": descend(surface, start, diagonal_newton(angle), STEPS),
            "Adagrad": descend(surface, start, lambda w: Adagrad(w, lr=1), STEPS),
        }
    return Result(paths)


def check(result: Result) -> None:
    straight, turned_by_45 = ({name: result.steps_needed(angle, name) for name in METHODS} for angle in result.paths)
    assert straight["diagonal Newton"] == 1
    assert straight["gradient descent"] == turned_by_45["gradient descent"]
    assert abs(turned_by_45["diagonal Newton"] - turned_by_45["gradient descent"]) < 0.2 * STEPS
    assert straight["Adagrad"] < 0.3 * turned_by_45["Adagrad"], (straight, turned_by_45)


def draw(result: Result, figure: Figure) -> None:
    titles = ("A ravine along the axes", "The same, turned by 45 degrees")
    for axes, title, (angle, paths) in zip(figure.subplots(1, 2), titles, result.paths.items(), strict=True):
        level_lines(axes, turned(angle), (-3.5, 1), (-3, 1.5))
        for name, path in paths.items():
            label = f"{name}: {result.steps_needed(angle, name)} steps"
            axes.plot(*path.T, "o-", color=METHODS[name], markersize=3, linewidth=1.1, label=label)
        axes.set(title=title, xlabel="first weight", ylabel="second weight", aspect="equal")
        axes.legend(loc="upper left" if angle else "lower right", fontsize=9.5, title=f"to a loss of {REACHED}")


if __name__ == "__main__":
    main(__doc__, compute, check, draw)
