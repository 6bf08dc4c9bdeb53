"""Larger batches make an epoch faster and its steps fewer.

The same number of epochs with the same learning rate, batches of 1 to 1024. The time of an epoch falls until the processor
is busy, because every step has a cost of its own. But an epoch of large batches is a few steps only, and the test error after a
fixed number of epochs rises: a larger batch has to buy its speed with a larger step.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from common import BLUE, ORANGE, Array, Figure, batches, digits, evaluate, main, mlp, train
from onepass.optim import SGD

SIZES, LR = (1, 4, 16, 64, 256, 1024), 0.05


@dataclass
class Result:
    steps: Array  # per epoch
    seconds: Array  # of an epoch, measured
    error: Array  # of the test, after the same number of epochs


def compute(quick: bool) -> Result:
    data, epochs, rows = digits(), 1 if quick else 6, []
    for size in SIZES:
        model = mlp(64, 64, 10)
        begin = time.perf_counter()
        steps = len(train(model, SGD(model.parameters(), lr=LR), batches(data, size, epochs)))
        seconds = time.perf_counter() - begin
        rows.append((steps / epochs, seconds / epochs, evaluate(model, data.test_x, data.test_y)[1]))
    return Result(*np.array(rows).T)


def check(result: Result) -> None:
    """The times are measured, not asserted; what makes them is the number of steps."""
    assert (np.diff(result.steps) < 0).all()
    assert (np.diff(result.error[1:]) > 0).all()
    assert result.error[-1] > 3 * result.error[0]


def draw(result: Result, figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    left.loglog(SIZES, 1e3 * result.seconds, "o-", color=BLUE)
    left.set(title="Time of an epoch, measured", ylabel="milliseconds")
    right.semilogx(SIZES, 100 * result.error, "o-", color=ORANGE)
    right.set(title=f"Test error, learning rate {LR}", ylabel="percent", ylim=(0, None))
    for axes in (left, right):
        axes.set_xlabel("batch size")
        axes.set_xticks(SIZES, [str(size) for size in SIZES])
        axes.minorticks_off()


if __name__ == "__main__":
    main(__doc__, compute, check, draw)
