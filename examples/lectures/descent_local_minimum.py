"""The noise of SGD leads out of a shallow minimum.

A loss of one weight with a shallow and a deep minimum. Gradient descent starts in the shallow one and stays there. The
gradients of small batches are noisy; with batches of one nearly every run finds the deep minimum, with batches of
sixteen almost none does in the same number of steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from common import BLUE, GREEN, GREY, ORANGE, Array, Figure, descend, main
from onepass.optim import SGD
from torch import Tensor

STEP, START, NOISE = 0.05, -0.95, 4.0
SIZES = {1: ORANGE, 4: GREEN, 16: BLUE}


def loss(w: Tensor) -> Tensor:
    return (w**2 - 1) ** 2 - 0.5 * w


@dataclass
class Result:
    gd: Array
    sgd: dict[int, Array]  # batch size -> [steps + 1, runs]

    def escaped(self, size: int) -> Array:
        share: Array = (self.sgd[size] > 0).mean(1)
        return share


def compute(quick: bool) -> Result:
    runs, steps = (200, 400) if quick else (1000, 800)
    gd = descend(loss, START, lambda w: SGD(w, lr=STEP), steps)
    sgd = {}
    for size in SIZES:
        draws = torch.Generator().manual_seed(0)

        def batch(w: Tensor, size: int = size, draws: torch.Generator = draws) -> Tensor:
            """Example i adds xi_i w to the loss; the xi have mean 0, so the mean of all examples is the loss above."""
            xi = NOISE / size**0.5 * torch.randn(w.shape, generator=draws, dtype=w.dtype)
            return torch.sum(loss(w) + xi * w)

        sgd[size] = descend(batch, np.full(runs, START), lambda w: SGD(w, lr=STEP), steps)
    return Result(gd, sgd)


def check(result: Result) -> None:
    assert (result.gd < 0).all()
    assert result.escaped(1)[-1] > 0.8
    assert result.escaped(1)[-1] > result.escaped(4)[-1] + 0.2
    assert result.escaped(16)[-1] < 0.05


def draw(result: Result, figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    w = torch.linspace(-1.6, 1.7, 200)
    left.plot(w, loss(w), color=GREY)
    left.set(title="The loss, and where 30 runs end", xlabel="weight", ylabel="loss", ylim=(-0.9, 3.4))
    left.plot(result.gd[-1], loss(torch.tensor(result.gd[-1])), "v", color="black", markersize=11)
    left.annotate("gradient descent\nstays here", (result.gd[-1], 0.55), (-0.75, 1.6), arrowprops={"arrowstyle": "->"})
    ends = torch.tensor(result.sgd[1][-1, :30])
    left.plot(ends, loss(ends), "o", color=ORANGE, markersize=6, alpha=0.7)
    for size, color in SIZES.items():
        right.plot(result.escaped(size), color=color, label=f"batches of {size}")
    right.plot(result.gd > 0, "--", color="black", linewidth=1.2, label="gradient descent")
    right.set(title="Share of runs in the deep minimum", xlabel="step", ylim=(-0.03, 1.03))
    right.legend()


if __name__ == "__main__":
    main(__doc__, compute, check, draw)
