"""Features of different scale make a ravine; an adaptive method or a standardised input gets out of it.

Linear regression on two features, one thirty times larger than the other. The large one limits the step of gradient descent,
and the weight of the small one creeps. Adagrad has a step size for each weight and does not mind. Scaling the features to
the same size rounds the level lines, and then plain gradient descent is the fastest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from common import BLUE, GREEN, ORANGE, Array, Figure, Make, along, descend, level_lines, main
from onepass.optim import SGD, Adagrad
from torch import Tensor

SCALE, STEPS, NOISE = 30.0, 200, 0.1
generator = torch.Generator().manual_seed(0)
X = torch.randn(300, 2, generator=generator, dtype=torch.float64)
Y = X @ torch.tensor([1.0, 1.0], dtype=torch.float64) + NOISE * torch.randn(300, generator=generator).double()
RAW = X * torch.tensor([1.0, SCALE], dtype=torch.float64)


def raw(w: Tensor) -> Tensor:
    return ((w.movedim(0, -1) @ RAW.T - Y) ** 2 / 2).mean(-1)


def standardised(w: Tensor) -> Tensor:
    return ((w.movedim(0, -1) @ X.T - Y) ** 2 / 2).mean(-1)


@dataclass
class Result:
    paths: dict[str, Array]
    losses: dict[str, Array]


def compute(quick: bool) -> Result:
    steepest = float(torch.linalg.eigvalsh(RAW.T @ RAW / len(RAW)).max())
    runs: dict[str, tuple[Make, str]] = {
        "gradient descent": (lambda w: SGD(w, lr=1 / steepest), "raw"),
        "Adagrad": (lambda w: Adagrad(w, lr=0.2), "raw"),
        "gradient descent, standardised": (lambda w: SGD(w, lr=0.9), "standardised"),
    }
    surfaces = {"raw": raw, "standardised": standardised}
    start = {"raw": (0.0, 2 / SCALE), "standardised": (0.0, 2.0)}
    paths = {name: descend(surfaces[s], start[s], make, STEPS) for name, (make, s) in runs.items()}
    return Result(paths, {name: along(surfaces[s], paths[name]) for name, (_, s) in runs.items()})


def check(result: Result) -> None:
    best = min(losses.min() for losses in result.losses.values())
    excess = {name: losses[50] - best for name, losses in result.losses.items()}
    assert excess["gradient descent"] > 0.2
    assert excess["Adagrad"] < 0.1 * excess["gradient descent"], excess
    assert excess["gradient descent, standardised"] < 1e-6 < excess["Adagrad"], excess


def draw(result: Result, figure: Figure) -> None:
    colors = dict(zip(result.paths, (ORANGE, BLUE, GREEN), strict=True))
    left, middle, right = figure.subplots(1, 3)
    level_lines(left, raw, (-0.2, 1.4), (-0.01, 0.08))
    level_lines(middle, standardised, (-0.2, 1.4), (-0.3, 2.4))
    for name, path in result.paths.items():
        axes = middle if "standardised" in name else left
        axes.plot(*path.T, "o-", color=colors[name], markersize=3, linewidth=1.2)
        right.semilogy(result.losses[name], color=colors[name], label=name.replace(", ", ",\n"))
    left.set(title=f"Raw features, 1 : {SCALE:.0f}", xlabel="first weight", ylabel="second weight")
    middle.set(title="Standardised", xlabel="first weight")
    right.set(title="Loss", xlabel="step", ylim=(np.min(right.get_ylim()), 20))
    right.legend(loc="upper right", fontsize=9)


if __name__ == "__main__":
    main(__doc__, compute, check, draw)
