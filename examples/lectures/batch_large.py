"""Large batches need larger steps, and a warm-up to start them.

The same number of epochs with batches of 16 and of 512: 32 times fewer steps. With the learning rate of the small batch (none)
the network is not done. The root of the ratio helps. The ratio itself (linear) is too large a step for the first weights; with
a warm-up, which raises the rate over the first third of the steps, it is the best of the four and close to the small batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from common import BLUE, GREEN, GREY, ORANGE, SKY, Figure, batches, digits, evaluate, main, mlp, train
from onepass.optim import SGD
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

SMALL, LARGE, LR, MOMENTUM, WARM_UP = 16, 512, 0.03, 0.9, 0.3
RATIO = LARGE / SMALL
COLORS = (GREY, SKY, ORANGE, BLUE, GREEN)


@dataclass
class Result:
    loss: dict[str, float]  # over all training images, at the end; the mean over seeds
    error: dict[str, float]  # of the test
    lr: dict[str, float]


def rising(steps: float, t: int) -> float:
    """The factor of the learning rate in a warm-up."""
    return min(1, (t + 1) / steps)


def compute(quick: bool) -> Result:
    data, epochs, seeds = digits(), 30, 2 if quick else 10
    rows = {
        f"batch {SMALL}": (SMALL, LR, 0.0),
        "none": (LARGE, LR, 0.0),
        "root": (LARGE, LR * RATIO**0.5, 0.0),
        "linear": (LARGE, LR * RATIO, 0.0),
        "linear,\nwarm-up": (LARGE, LR * RATIO, WARM_UP),
    }
    result = Result({}, {}, {name: lr for name, (_, lr, _) in rows.items()})
    for name, (size, lr, warm_up) in rows.items():
        losses, errors = [], []
        for seed in range(1 if size == SMALL else seeds):
            model = mlp(64, 64, 64, 10, act=nn.Tanh, seed=seed)
            optimizer = SGD(model.parameters(), lr=lr, momentum=MOMENTUM)
            steps = max(1, warm_up * epochs * (len(data.y) // size))
            scheduler = LambdaLR(optimizer, partial(rising, steps))
            train(model, optimizer, batches(data, size, epochs, seed), scheduler)
            losses.append(evaluate(model, data.x, data.y)[0])
            errors.append(evaluate(model, data.test_x, data.test_y)[1])
        result.loss[name], result.error[name] = sum(losses) / len(losses), sum(errors) / len(errors)
    return result


def check(result: Result) -> None:
    small, none, root, linear, warm_up = result.error.values()
    assert none > 2 * root > 2 * warm_up, result.error
    assert linear > 1.2 * warm_up, result.error
    assert result.loss["linear"] > 3 * result.loss["linear,\nwarm-up"], result.loss
    assert warm_up < small + 0.015


def draw(result: Result, figure: Figure) -> None:
    axes = figure.subplots()
    bars = axes.bar([*result.error], [100 * e for e in result.error.values()], color=COLORS, width=0.6)
    labels = [f"{e:.1%}\nlr {lr:.2g}" for e, lr in zip(result.error.values(), result.lr.values(), strict=True)]
    axes.bar_label(bars, labels, padding=3)
    axes.set(title=f"Test error after the same epochs: batch {SMALL}, then {LARGE} by four rules", ylabel="percent")
    axes.margins(y=0.18)


if __name__ == "__main__":
    main(__doc__, compute, check, draw)
