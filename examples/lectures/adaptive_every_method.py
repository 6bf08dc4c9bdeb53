"""Every method from one start.

Eleven methods go down the same curved valley, side by side. Plain gradient descent is fast to the bottom of the valley and
slow along it; momentum and Nesterov carry on and overshoot; methods with a step size for every weight turn into the valley
at once; Lookahead smooths the path of the optimizer inside it. Which one wins depends on surface and learning rate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from common import BLUE, GREY, ORANGE, Array, Figure, Make, along, descend, level_lines, main
from onepass.optim import SAM, SGD, Adagrad, Adam, Lookahead, NAdam, RMSprop, Rprop
from torch import Tensor

START, MINIMUM, STEPS, PER_FRAME = (-1.6, 1.3), (1.0, 1.0), 90, 3
METHODS: dict[str, Make] = {
    "gradient descent": lambda w: SGD(w, lr=0.03),
    "momentum": lambda w: SGD(w, lr=0.01, momentum=0.9),
    "Nesterov": lambda w: SGD(w, lr=0.01, momentum=0.9, nesterov=True),
    "Adagrad": lambda w: Adagrad(w, lr=0.4),
    "RMSprop": lambda w: RMSprop(w, lr=0.05, alpha=0.9),
    "Adam": lambda w: Adam(w, lr=0.15),
    "NAdam": lambda w: NAdam(w, lr=0.15),
    "Rprop": lambda w: Rprop(w, lr=0.05),
    "Lookahead, 0.5": lambda w: Lookahead(SGD(w, lr=0.01, momentum=0.9), k=5, alpha=0.5),
    "Lookahead, quadratic": lambda w: Lookahead(SGD(w, lr=0.01, momentum=0.9), k=5, alpha="quadratic"),
    "SAM": lambda w: SAM(w, SGD, rho=0.05, lr=0.03),
}


def valley(w: Tensor) -> Tensor:
    return (1 - w[0]) ** 2 / 2 + 3 * (w[1] - w[0] ** 2) ** 2


@dataclass
class Result:
    paths: dict[str, Array]

    def losses(self, name: str) -> Array:
        return along(valley, self.paths[name])


def compute(quick: bool) -> Result:
    return Result({name: descend(valley, START, make, STEPS) for name, make in METHODS.items()})


def check(result: Result) -> None:
    end = {name: result.losses(name)[-1] for name in METHODS}
    assert all(loss < 0.1 * result.losses(name)[0] for name, loss in end.items()), end
    assert max(end["momentum"], end["Nesterov"], end["Adam"], end["Rprop"]) < end["gradient descent"], end
    assert end["Lookahead, quadratic"] < end["Lookahead, 0.5"], end


def draw(result: Result, figure: Figure) -> Iterator[None]:
    grid = figure.subplots(3, 4, sharex=True, sharey=True).flat
    lines = {}
    for axes, name in zip(grid, METHODS, strict=False):
        level_lines(axes, valley, (-2.2, 2.2), (-0.7, 2.9))
        axes.plot(*MINIMUM, "*", color=ORANGE, markersize=9)
        axes.set_title(name, fontsize=9.5)
        axes.set(xticks=[], yticks=[])
        lines[name] = (*axes.plot([], [], color=BLUE, linewidth=1.4), *axes.plot([], [], "o", color=BLUE, markersize=5))
    last = figure.axes[-1]
    last.axis("off")
    text = last.text(0.5, 0.5, "", ha="center", va="center", transform=last.transAxes, fontsize=15, color=GREY)
    for step in np.arange(0, STEPS + 1, PER_FRAME):
        for name, (line, head) in lines.items():
            line.set_data(*result.paths[name][: step + 1].T)
            head.set_data(*result.paths[name][step : step + 1].T)
        text.set_text(f"step {step}")
        yield


if __name__ == "__main__":
    main(__doc__, compute, check, draw)
