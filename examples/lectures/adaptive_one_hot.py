"""Rare features need large steps, and Adagrad gives them.

One-hot features, the first in half of the examples, the last in one of five hundred. With one step size for all, SGD knows
the weights of the popular ones soon and those of the rare ones hardly at all. Adagrad divides by the root of the summed
squared gradients of each weight, so the rare weights are learned in about as many of their own examples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from common import BLUE, GREEN, ORANGE, SKY, Array, Figure, Make, descend, main
from onepass.optim import SGD, Adagrad
from torch import Tensor

SHARES = (0.5, 0.3, 0.15, 0.04, 0.008, 0.002)
TRUTH, NOISE, BATCH = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0], dtype=torch.float64), 0.3, 10
METHODS: dict[str, Make] = {"SGD": lambda w: SGD(w, lr=0.3), "Adagrad": lambda w: Adagrad(w, lr=0.3)}
COLORS = (BLUE, SKY, GREEN, ORANGE, "#d55e00", "#cc79a7")


@dataclass
class Result:
    error: dict[str, Array]  # [steps + 1, features], relative to the weights


def compute(quick: bool) -> Result:
    steps = 1000 if quick else 3000
    error = {}
    for name, make in METHODS.items():
        draws = torch.Generator().manual_seed(0)

        def loss(w: Tensor, draws: torch.Generator = draws) -> Tensor:
            feature = torch.multinomial(torch.tensor(SHARES), BATCH, replacement=True, generator=draws)
            y = TRUTH[feature] + NOISE * torch.randn(BATCH, generator=draws)
            return ((w[feature] - y) ** 2 / 2).mean()

        error[name] = np.abs(descend(loss, np.zeros(len(SHARES)), make, steps) - TRUTH.numpy())
    return Result(error)


def check(result: Result) -> None:
    popular = {name: error[-200:, 0].mean() for name, error in result.error.items()}
    rare = {name: error[600:1000, -1].mean() for name, error in result.error.items()}
    assert max(popular.values()) < 0.15
    assert rare["SGD"] > 0.5 > 3 * rare["Adagrad"], rare


def draw(result: Result, figure: Figure) -> None:
    for axes, (name, error) in zip(figure.subplots(1, 2, sharey=True), result.error.items(), strict=True):
        for i, (share, color) in enumerate(zip(SHARES, COLORS, strict=True)):
            window = max(1, len(error) // 100)
            mean = error[1 : len(error) // window * window + 1][: len(error) // window * window]
            curve = mean[: len(mean) // window * window, i].reshape(-1, window).mean(1)
            axes.plot(window * np.arange(len(curve)), curve, color=color, label=f"{share:.1%} of the examples")
        axes.set(title=name, xlabel="step", ylim=(-0.03, 1.1))
    figure.axes[0].set_ylabel("error of the weight")
    figure.axes[1].legend(title="the feature is in")


if __name__ == "__main__":
    main(__doc__, compute, check, draw)
