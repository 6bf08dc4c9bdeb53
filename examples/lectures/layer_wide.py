"""One hidden layer approximates a function, the better the wider it is.

A network with one hidden layer of tanh fits a curve of one variable. The gradient is that of all points together, the case that
Rprop is made for. With two units it can bend twice; with each doubling of the width the error falls further.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from common import BLACK, BLUE, GREEN, ORANGE, Array, Figure, main, mlp
from onepass.optim import Rprop
from torch import nn

WIDTHS, SHOWN = (2, 4, 8, 16, 32), {2: ORANGE, 4: GREEN, 32: BLUE}
X = torch.linspace(-1, 1, 200).unsqueeze(1)
Y = torch.sin(7 * X) * (1 - X / 2) + (3 * X).abs() / 3


@dataclass
class Result:
    curves: dict[int, Array]
    error: Array  # root mean square for every width


def compute(quick: bool) -> Result:
    curves, error, steps = {}, [], 400 if quick else 1200
    for width in WIDTHS:
        model = mlp(1, width, 1, act=nn.Tanh)
        with torch.no_grad():  # the bends all over the interval, not at 0 only
            model[0].weight.mul_(6)  # type: ignore[operator]
            model[0].bias.mul_(6)  # type: ignore[operator]
        optimizer = Rprop(model.parameters(), lr=0.01)
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(X), Y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        curves[width] = model(X).detach().squeeze(1).double().numpy()
        error.append(float(np.sqrt(((curves[width] - Y.squeeze(1).numpy()) ** 2).mean())))
    return Result(curves, np.array(error))


def check(result: Result) -> None:
    assert (np.diff(result.error[:4]) < 0).all(), result.error
    assert result.error[-1] < result.error[0] / 10, result.error


def draw(result: Result, figure: Figure) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    left.plot(X, Y, color=BLACK, linewidth=4, alpha=0.35, label="the function")
    for width, color in SHOWN.items():
        left.plot(X, result.curves[width], color=color, label=f"{width} units")
    left.set(title="One hidden layer", xlabel="input")
    left.legend()
    right.loglog(WIDTHS, result.error, "o-", color=BLUE)
    right.set(title="Error, root mean square", xlabel="units")
    right.set_xticks(WIDTHS, [str(width) for width in WIDTHS])
    right.set_xticks([], minor=True)


if __name__ == "__main__":
    main(__doc__, compute, check, draw)
