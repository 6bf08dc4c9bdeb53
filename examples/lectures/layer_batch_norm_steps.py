"""With BatchNorm larger steps are safe.

The same network for digits, with and without BatchNorm, trained for the same steps at learning rates from 0.01 to over 30. Without
it the range of good rates is narrow and ends early: above it the training fails. With it the range is wide and reaches more
than five times further.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from common import BLUE, ORANGE, Array, Figure, batches, digits, evaluate, main, mlp, train
from onepass.nn import BatchNorm1d
from onepass.optim import SGD

NORMS = {"without": None, "with BatchNorm": BatchNorm1d}
COLORS = {"without": ORANGE, "with BatchNorm": BLUE}
GOOD = 0.1  # a test error below this counts as trained


@dataclass
class Result:
    rates: Array
    error: dict[str, Array]  # of the test

    def largest(self, name: str) -> float:
        return float(self.rates[self.error[name] < GOOD].max(initial=0))


def compute(quick: bool) -> Result:
    data, rates = digits(), 10 ** np.arange(-2, 2, 0.5 if quick else 0.25)
    error: dict[str, list[float]] = {name: [] for name in NORMS}
    for name, norm in NORMS.items():
        for lr in rates:
            model = mlp(64, 48, 48, 10, norm=norm)
            train(model, SGD(model.parameters(), lr=lr), batches(data, 64, 6 if quick else 10))
            error[name].append(evaluate(model, data.test_x, data.test_y)[1])
    return Result(rates, {name: np.array(errors) for name, errors in error.items()})


def check(result: Result) -> None:
    without, with_norm = (result.largest(name) for name in NORMS)
    assert without > 0, result.error
    assert with_norm > 5 * without, (with_norm, without)


def draw(result: Result, figure: Figure) -> None:
    axes = figure.subplots()
    for name, errors in result.error.items():
        axes.semilogx(result.rates, 100 * errors, "o-", color=COLORS[name], label=name)
        axes.axvline(result.largest(name), color=COLORS[name], linestyle=":", linewidth=1.2)
    axes.axhline(100 * GOOD, color="black", linewidth=0.8, linestyle="--")
    axes.set(title="Test error by learning rate", xlabel="learning rate", ylabel="percent")
    axes.legend(loc="center right")


if __name__ == "__main__":
    main(__doc__, compute, check, draw)
