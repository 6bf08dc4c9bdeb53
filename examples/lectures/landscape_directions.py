"""Around a trained network the loss is a bowl, along almost every direction.

A network learns to read digits; then its weights move along random directions, scaled so that 1 means a change as large as
the weights themselves. Left, the loss along one direction from the trained weights, and from the untrained ones, where the
same walk changes little. Right, over a plane of two directions, the trained weights lie at the bottom.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from common import BLUE, GREY, ORANGE, Array, Figure, batches, digits, evaluate, main, mlp, train
from onepass.optim import Adam
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

REACH = 1.0


@dataclass
class Result:
    distance: Array
    lines: dict[str, Array]  # trained or not -> loss [directions, distance]
    plane: Array


def losses_at(model: nn.Module, offsets: torch.Tensor) -> Array:
    """The loss over the training images at the weights plus each of the offsets [..., weights]."""
    data, moved = digits(), copy.deepcopy(model)
    center, flat = parameters_to_vector(model.parameters()).detach(), offsets.reshape(-1, offsets.shape[-1])
    values = []
    for offset in flat:
        vector_to_parameters(center + offset, moved.parameters())
        values.append(evaluate(moved, data.x, data.y)[0])
    return np.array(values).reshape(offsets.shape[:-1])


def compute(quick: bool) -> Result:
    model, points = mlp(64, 64, 10), 9 if quick else 25
    distance = torch.linspace(-REACH, REACH, points)
    lines, draws = {}, torch.Generator().manual_seed(0)
    for name in ("untrained", "trained"):
        if name == "trained":
            train(model, Adam(model.parameters(), lr=3e-3), batches(digits(), 64, 10 if quick else 30))
        size = parameters_to_vector(model.parameters()).detach().norm()
        directions = torch.randn(8, sum(p.numel() for p in model.parameters()), generator=draws)
        directions *= size / directions.norm(dim=1, keepdim=True)
        lines[name] = losses_at(model, directions.unsqueeze(1) * distance.view(-1, 1))
    grid = torch.linspace(-REACH, REACH, points).view(-1, 1, 1)
    plane = losses_at(model, grid * directions[0] + grid.view(1, -1, 1) * directions[1])
    return Result(distance.numpy().astype(float), lines, plane)


def check(result: Result) -> None:
    middle = len(result.distance) // 2
    for line in result.lines["trained"]:
        assert (np.diff(line[middle:]) > 0).all()
        assert (np.diff(line[: middle + 1]) < 0).all()
    assert result.plane.argmin() == middle * len(result.plane) + middle
    rise = {name: (lines[:, -1] - lines[:, middle]).mean() for name, lines in result.lines.items()}
    assert rise["trained"] > 3 * rise["untrained"], rise


def draw(result: Result, figure: Figure) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for (name, lines), color in zip(result.lines.items(), (ORANGE, BLUE), strict=True):
        left.plot(result.distance, lines.T, color=color, linewidth=1.2, label=name)
    left.set(title="Loss along eight random directions", xlabel="distance, in sizes of the weights", ylabel="loss")
    first = {label: line for line, label in zip(*left.get_legend_handles_labels(), strict=True)}
    left.legend(first.values(), first.keys())
    right.clabel(right.contour(result.distance, result.distance, result.plane, 12, cmap="cividis"), fontsize=8)
    right.plot(0, 0, "*", color=GREY, markersize=12)
    right.set(title="Over two of them", xlabel="first direction", ylabel="second direction", aspect="equal")


if __name__ == "__main__":
    main(__doc__, compute, check, draw)
