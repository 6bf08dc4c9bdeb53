"""Large steps first, small steps last.

Six schedules from the same learning rate, and the test error of a linear classifier under each; a fifth of its training labels
is wrong. A constant large rate follows the wrong labels of every batch. All schedules that end with small steps average them out
and end below it. A warm-up alone changes nothing here; it is for networks that a large first step throws off.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from common import BLACK, BLUE, GREEN, ORANGE, PINK, SKY, Array, Figure, batches, digits, evaluate, main, mlp, train
from onepass.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

LR, SIZE, WARM_UP, WRONG = 0.5, 8, 0.1, 0.2
# The share of training that is over -> factor of the learning rate.
SCHEDULES: dict[str, Callable[[float, int], float]] = {
    "constant": lambda s, t: 1,
    r"$1/t^{0.3}$": lambda s, t: (t + 1) ** -0.3,
    "steps of 1/5": lambda s, t: 0.2 ** math.floor(3 * s),
    "cosine": lambda s, t: (1 + math.cos(math.pi * s)) / 2,
    "warm-up, constant": lambda s, t: min(1, s / WARM_UP),
    "warm-up, cosine": lambda s, t: min(s / WARM_UP, (1 + math.cos(math.pi * max(0, s - WARM_UP) / (1 - WARM_UP))) / 2),
}


@dataclass
class Result:
    rates: dict[str, Array]
    errors: dict[str, Array]  # of the test, at the end of every epoch


def at_step(factor: Callable[[float, int], float], total: int, t: int) -> float:
    return factor(t / total, t)


def compute(quick: bool) -> Result:
    data, epochs, draws = digits(), 5 if quick else 10, torch.Generator().manual_seed(0)
    wrong = torch.rand(len(data.y), generator=draws) < WRONG
    data = data._replace(y=torch.where(wrong, torch.randint(10, data.y.shape, generator=draws), data.y))
    total, rates, errors = epochs * (len(data.y) // SIZE), {}, {}
    for name, factor in SCHEDULES.items():
        model, curve = mlp(64, 10), []
        optimizer = SGD(model.parameters(), lr=LR)
        scheduler = LambdaLR(optimizer, partial(at_step, factor, total))
        for epoch in range(epochs):
            train(model, optimizer, batches(data, SIZE, 1, epoch), scheduler)
            curve.append(evaluate(model, data.test_x, data.test_y)[1])
        rates[name] = LR * np.array([at_step(factor, total, t) for t in range(total)])
        errors[name] = np.array(curve)
    return Result(rates, errors)


def check(result: Result) -> None:
    end = {name: errors[-2:].mean() for name, errors in result.errors.items()}
    falling = [name for name, rates in result.rates.items() if rates[-1] < 0.3 * LR]
    assert len(falling) == 4
    assert all(end[name] < 0.7 * end["constant"] for name in falling), end


def draw(result: Result, figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    for (name, rates), color in zip(result.rates.items(), (BLACK, ORANGE, SKY, BLUE, PINK, GREEN), strict=True):
        style = "--" if "warm-up" in name else "-"
        left.plot(np.linspace(0, len(result.errors[name]), len(rates)), rates, style, color=color, label=name)
        errors = 100 * result.errors[name]
        right.plot(range(1, len(errors) + 1), errors, style, marker="o", markersize=3, color=color, label=name)
    left.set(title="Learning rate", xlabel="epoch", ylim=(0, LR * 1.05))
    right.set(title="Test error", xlabel="epoch", ylabel="percent", ylim=(0, None))
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8.5)


if __name__ == "__main__":
    main(__doc__, compute, check, draw)
