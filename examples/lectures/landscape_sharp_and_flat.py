"""SAM looks for flat minima.

Left, a loss with a sharp, slightly deeper minimum and a flat one. SAM minimises the worst loss within a distance rho, and by that
measure the flat one is the best. Right, a network for digits, trained with SGD and with SAM around it: when all weights are moved
uphill, the loss rises less around the weights that SAM found.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from common import BLUE, ORANGE, Array, Figure, batches, digits, evaluate, main, mlp, train
from onepass.optim import SAM, SGD
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

RHO, RADII = 0.3, np.linspace(0, 1, 11)
WEIGHTS = torch.linspace(-2.4, 2.4, 961, dtype=torch.float64)


def loss(w: Tensor) -> Tensor:
    sharp, flat = torch.exp(-(((w + 1) / 0.12) ** 2)), torch.exp(-(((w - 1) / 0.8) ** 2))
    return 1 + 0.05 * w**2 - 0.7 * sharp - 0.65 * flat


@dataclass
class Result:
    loss: Array  # at WEIGHTS
    worst: Array  # within RHO of them
    around: dict[str, Array]  # the loss at a distance uphill from the trained weights
    test_error: dict[str, float]


def uphill(model: nn.Module) -> Array:
    """The loss over the training images, up to RADII from the weights along its own gradient; the model is moved."""
    data, values = digits(), []
    loss = nn.functional.cross_entropy(model(data.x), data.y)
    gradient = parameters_to_vector(torch.autograd.grad(loss, [*model.parameters()]))
    weights = parameters_to_vector(model.parameters()).detach()
    for radius in RADII:
        vector_to_parameters(weights + float(radius) * gradient / gradient.norm(), model.parameters())
        values.append(evaluate(model, data.x, data.y)[0])
    return np.array(values)


def compute(quick: bool) -> Result:
    worst = loss(WEIGHTS.unsqueeze(1) + torch.linspace(-RHO, RHO, 121)).amax(1).numpy()
    around, test_error, data = {}, {}, digits()
    for name in ("SGD", "SAM"):
        model = mlp(64, 64, 10)
        base = partial(SGD, lr=0.1, momentum=0.9)
        optimizer = base(model.parameters()) if name == "SGD" else SAM(model.parameters(), base, rho=0.2)
        train(model, optimizer, batches(data, 64, 5 if quick else 40))
        test_error[name], around[name] = evaluate(model, data.test_x, data.test_y)[1], uphill(model)
    return Result(loss(WEIGHTS).numpy(), worst, around, test_error)


def check(result: Result) -> None:
    assert abs(WEIGHTS[result.loss.argmin()] + 1) < 0.1 > abs(WEIGHTS[result.worst.argmin()] - 1)
    assert result.around["SAM"][-1] < 0.7 * result.around["SGD"][-1], result.around


def draw(result: Result, figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    for values, color, name in ((result.loss, ORANGE, "the loss"), (result.worst, BLUE, f"the worst within {RHO}")):
        left.plot(WEIGHTS, values, color=color, label=name)
        left.plot(WEIGHTS[values.argmin()], values.min(), "v", color=color, markersize=11)
    left.set(title="Sharp and flat, and the best of each", xlabel="weight", ylim=(0.2, 1.6))
    left.legend(loc="upper center")
    for (name, around), color in zip(result.around.items(), (ORANGE, BLUE), strict=True):
        right.plot(RADII, around, "o-", color=color, label=f"{name}, test error {result.test_error[name]:.1%}")
    right.set(title="A network's loss, uphill from its weights", xlabel="distance", ylabel="loss")
    right.legend()


if __name__ == "__main__":
    main(__doc__, compute, check, draw)
