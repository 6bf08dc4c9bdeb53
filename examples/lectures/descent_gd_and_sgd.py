"""SGD wanders around the path of gradient descent, and on average it is that path.

Linear regression with two weights. One run of SGD, which sees a single random example per step, staggers towards the
minimum. The loss is quadratic and every example is drawn independently, so the mean of many runs is the path of full
gradient descent.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from common import BLUE, GREEN, ORANGE, Array, Figure, along, descend, level_lines, main
from onepass.optim import SGD
from torch import Tensor

STEP, STEPS, START = 0.05, 150, (-2.0, 2.0)
generator = torch.Generator().manual_seed(0)
X = torch.randn(200, 2, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 0.6])
Y = X @ torch.tensor([1.0, -0.5], dtype=torch.float64) + 0.7 * torch.randn(200, generator=generator).double()


def loss(w: Tensor) -> Tensor:
    """The mean over all examples, for weights [2, ...]."""
    return ((w.movedim(0, -1) @ X.T - Y) ** 2 / 2).mean(-1)


@dataclass
class Result:
    gd: Array
    sgd: Array  # [steps + 1, runs, 2]


def compute(quick: bool) -> Result:
    runs = 100 if quick else 1000
    draws = torch.Generator().manual_seed(1)

    def one_example_each(w: Tensor) -> Tensor:
        i = torch.randint(len(Y), (len(w),), generator=draws)
        return (((w * X[i]).sum(1) - Y[i]) ** 2 / 2).sum()

    gd = descend(loss, START, lambda w: SGD(w, lr=STEP), STEPS)
    return Result(gd, descend(one_example_each, np.tile(START, (runs, 1)), lambda w: SGD(w, lr=STEP), STEPS))


def check(result: Result) -> None:
    losses, noisy = along(loss, result.gd), along(loss, result.sgd[:, 0])
    assert (np.diff(losses) < 0).all()
    assert (np.diff(noisy) > 0).mean() > 0.2  # SGD goes uphill often
    away = np.abs(result.sgd.mean(1) - result.gd)[1:]
    assert (away < 5 * result.sgd.std(1)[1:] / np.sqrt(result.sgd.shape[1])).all()


def draw(result: Result, figure: Figure) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    level_lines(left, loss, (-2.5, 2.2), (-1.7, 2.4))
    mean = result.sgd.mean(1)
    for axes, curves in (
        (left, (result.sgd[:, 0].T, result.gd.T, mean.T)),
        (right, [[along(loss, p)] for p in (result.sgd[:, 0], result.gd, mean)]),
    ):
        axes.plot(*curves[0], color=ORANGE, linewidth=1.1, label="SGD, one example per step")
        axes.plot(*curves[1], color=BLUE, linewidth=4, label="gradient descent")
        axes.plot(*curves[2], "--", color=GREEN, label=f"mean of {result.sgd.shape[1]} runs of SGD")
    left.set(title="Two weights", xlabel="first weight", ylabel="second weight")
    right.set(title="Loss over all examples", xlabel="step", yscale="log")
    left.legend(loc="lower left")


if __name__ == "__main__":
    main(__doc__, compute, check, draw)
