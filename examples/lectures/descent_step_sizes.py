"""A constant step stops at a floor; a shrinking step goes on.

SGD with noisy gradients on a loss of curvature mu. With a constant step alpha the mean squared distance to the minimum
falls fast and then stays at alpha B^2 / (2 mu), where B^2 is the mean squared gradient: a third of the step, a third of
the floor. The step 0.1 / t^0.3 begins like the large one and ends below both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from common import BLUE, GREEN, ORANGE, Array, Figure, descend, main
from onepass.optim import SGD
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

MU, NOISE, START, CONSTANT = 1.0, 1.0, 3.0, (0.1, 0.03)


@dataclass
class Result:
    distance: dict[str, Array]  # mean squared distance to the minimum at every step
    floor: dict[str, float]


def compute(quick: bool) -> Result:
    runs, steps = (200, 800) if quick else (1000, 3000)
    distance, floor = {}, {}
    schedules = {
        "constant 0.1": (0.1, lambda t: 1.0),
        "constant 0.03": (0.03, lambda t: 1.0),
        "0.1 / t^0.3": (0.1, lambda t: (t + 1) ** -0.3),  # the scheduler counts from 0
    }
    for name, (lr, factor) in schedules.items():
        noise = torch.Generator().manual_seed(0)

        def loss(w: Tensor, noise: torch.Generator = noise) -> Tensor:
            """mu w^2 / 2 with a gradient that has random noise in it; the sum of independent runs."""
            xi = NOISE * torch.randn(w.shape, generator=noise, dtype=w.dtype)
            return (MU * w**2 / 2 + xi * w).sum()

        path = descend(loss, np.full(runs, START), partial(SGD, lr=lr), steps, partial(LambdaLR, lr_lambda=factor))
        distance[name] = (path**2).mean(1)
        if name.startswith("constant"):
            squared_gradient = MU**2 * distance[name][steps // 2 :].mean() + NOISE**2
            floor[name] = lr * squared_gradient / (2 * MU)
    return Result(distance, floor)


def check(result: Result) -> None:
    settled = {name: curve[len(curve) // 2 :].mean() for name, curve in result.distance.items()}
    for name, floor in result.floor.items():
        assert abs(settled[name] / floor - 1) < 0.05, f"{name}: {settled[name]} at a floor of {floor}"
    assert settled["constant 0.1"] > 3 * settled["constant 0.03"]
    assert result.distance["0.1 / t^0.3"][-200:].mean() < 0.8 * settled["constant 0.03"]


def draw(result: Result, figure: Figure) -> None:
    axes = figure.subplots()
    for (name, curve), color in zip(result.distance.items(), (ORANGE, BLUE, GREEN), strict=True):
        axes.plot(np.arange(1, len(curve)), curve[1:], color=color, label=name)
        if name in result.floor:
            axes.axhline(result.floor[name], color=color, linestyle="--", linewidth=1)
            axes.text(1, result.floor[name] * 1.08, r"floor $\alpha B^2/(2\mu)$, " + name, color=color)
    axes.set(xscale="log", yscale="log", xlabel="step", title="Mean squared distance to the minimum")
    axes.legend(title="step size", loc="upper right")


if __name__ == "__main__":
    main(__doc__, compute, check, draw)
