"""A network with dropout is the average of its sub-networks.

A classifier of digits is trained with dropout in front of its last layer. A single sub-network, with half of the units, errs more often than
the average of several does. The whole network, in one pass, is as good as the average of many: for a last layer with softmax it
is exactly their geometric mean, which the check computes over all sub-networks of a small one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from common import BLUE, GREEN, ORANGE, Array, Figure, batches, digits, evaluate, main, mlp, train
from onepass.nn import Dropout
from onepass.optim import Adam
from torch import nn

COUNTS = (1, 2, 4, 8, 16, 32)


@dataclass
class Result:
    single: Array  # test errors of sub-networks
    average: Array  # of averages of COUNTS of them; the mean over draws
    whole: float
    geometric: float  # the largest difference of probabilities between the geometric mean and the whole network


def geometric_difference() -> float:
    """Over all 2^10 masks of ten inputs of a softmax layer."""
    torch.manual_seed(0)
    layer, x = nn.Linear(10, 5).double(), torch.randn(10, dtype=torch.float64)
    masks = torch.cartesian_prod(*10 * [torch.tensor([0.0, 1.0], dtype=torch.float64)])
    logs = torch.log_softmax(layer(masks * x * 2), 1)  # inverted dropout, p = 0.5
    difference = torch.softmax(logs.mean(0), 0) - torch.softmax(layer(x), 0)
    return float(difference.detach().abs().max())


def compute(quick: bool) -> Result:
    data, draws = digits(), 4 if quick else 20
    body = mlp(64, 48, 48, seed=0)
    model = nn.Sequential(body, nn.ReLU(), Dropout(0.5), nn.Linear(48, 10))
    train(model, Adam(model.parameters(), lr=3e-3), batches(data, 32, 4 if quick else 12))
    whole = evaluate(model, data.test_x, data.test_y)[1]
    model.train()  # a mask for every image: each draw is many sub-networks
    with torch.no_grad():
        outs = torch.stack([torch.softmax(model(data.test_x), 1) for _ in range(draws * COUNTS[-1])])
    errors = []
    for count in COUNTS:
        groups = outs.view(-1, count, *outs.shape[1:]).mean(1)
        errors.append((groups.argmax(2) != data.test_y).double().mean(1).numpy())
    return Result(errors[0], np.array([e.mean() for e in errors]), whole, geometric_difference())


def check(result: Result) -> None:
    assert result.geometric < 1e-12
    assert result.average[0] > 1.3 * result.average[-1], result.average
    assert (np.diff(result.average[:4]) < 0).all(), result.average
    assert abs(result.average[-1] - result.whole) < 0.015, (result.average, result.whole)


def draw(result: Result, figure: Figure) -> None:
    axes = figure.subplots()
    jitter = np.random.default_rng(0).uniform(0.93, 1.07, len(result.single))
    axes.plot(jitter, 100 * result.single, ".", color=ORANGE, alpha=0.4, label="sub-networks, one by one")
    axes.semilogx(COUNTS, 100 * result.average, "o-", color=BLUE, label="averages of several")
    axes.axhline(100 * result.whole, color=GREEN, linestyle="--", label="the whole network, in one pass")
    axes.set(title="Test error", xlabel="sub-networks in the average", ylabel="percent", ylim=(0, None))
    axes.set_xticks(COUNTS, [str(count) for count in COUNTS])
    axes.set_xticks([], minor=True)
    axes.legend()


if __name__ == "__main__":
    main(__doc__, compute, check, draw)
