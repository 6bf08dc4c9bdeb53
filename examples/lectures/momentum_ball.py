"""Momentum is a ball with friction, followed in small steps of time.

The ball obeys x'' = -c x' - grad L(x). An Euler step of length h changes the velocity first and moves with the new one:
that is momentum with learning rate h^2 and momentum 1 - c h, and as h shrinks it becomes the ball's own path. Moving with
the old velocity looks as good on paper and is a slip: where the curvature exceeds c / h it blows up.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from common import BLACK, BLUE, RED, Array, Figure, descend, main, quadratic, slope
from onepass.optim import SGD

FRICTION, CURVATURE, START, TIME = 0.5, 4.0, 1.0, 8.0
SURFACE = quadratic(CURVATURE)
STEPS_OF_TIME = (0.2, 0.1, 0.05, 0.025, 0.0125)


def ball(t: Array) -> Array:
    """The differential equation, solved exactly: a damped oscillation that starts at rest."""
    omega = (CURVATURE - FRICTION**2 / 4) ** 0.5
    wave = np.cos(omega * t) + FRICTION / (2 * omega) * np.sin(omega * t)
    return np.asarray(START * np.exp(-FRICTION * t / 2) * wave)


def momentum(h: float) -> Array:
    return descend(SURFACE, [START], lambda w: SGD(w, lr=h**2, momentum=1 - FRICTION * h), round(TIME / h))[:, 0]


def slip(h: float) -> Array:
    """Position and velocity both from the old values: no optimizer does this, and the check shows why."""
    x, v, path = START, 0.0, [START]
    for _ in range(round(TIME / h)):
        x, v = x + h * v, v - h * (FRICTION * v + CURVATURE * x)
        path.append(x)
    return np.array(path)


@dataclass
class Result:
    momentum: dict[float, Array]
    slip: dict[float, Array]

    def errors(self, paths: dict[float, Array]) -> list[float]:
        return [float(np.abs(path - ball(h * np.arange(len(path)))).max()) for h, path in paths.items()]


def compute(quick: bool) -> Result:
    return Result({h: momentum(h) for h in STEPS_OF_TIME}, {h: slip(h) for h in STEPS_OF_TIME})


def check(result: Result) -> None:
    errors = result.errors(result.momentum)
    assert abs(slope(STEPS_OF_TIME, errors) - 1) < 0.1, "the error of Euler steps falls with h"
    assert all(a < b for a, b in zip(errors, result.errors(result.slip), strict=True))
    large = STEPS_OF_TIME[0]
    assert np.abs(result.momentum[large][-5:]).max() < 0.3 * START < START < np.abs(result.slip[large][-10:]).max()


def draw(result: Result, figure: Figure) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    large, t = STEPS_OF_TIME[0], np.linspace(0, TIME, 400)
    left.plot(t, ball(t), color=BLACK, linewidth=1.2, label="the ball")
    time = large * np.arange(len(result.momentum[large]))
    left.plot(time, result.momentum[large], "o", color=BLUE, markersize=4.5, label="momentum (new velocity)")
    left.plot(time, result.slip[large], "x--", color=RED, markersize=5, linewidth=0.8, label="slip (old velocity)")
    left.set(title=f"Position, steps of time h = {large}", xlabel="time", ylim=(-2.4, 3.6))
    left.legend(loc="upper left", ncols=2, fontsize=9)
    right.loglog(STEPS_OF_TIME, result.errors(result.momentum), "o-", color=BLUE, label="momentum: falls with h")
    right.loglog(STEPS_OF_TIME, result.errors(result.slip), "x--", color=RED, label="slip")
    right.set(title="Largest distance to the ball", xlabel="h")
    right.set_xticks(STEPS_OF_TIME, [str(h) for h in STEPS_OF_TIME], minor=False)
    right.set_xticks([], minor=True)
    right.legend()


if __name__ == "__main__":
    main(__doc__, compute, check, draw)
