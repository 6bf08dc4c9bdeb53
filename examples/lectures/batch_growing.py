"""Growing the batch does what shrinking the step does, in fewer steps.

Noise of SGD goes with learning rate over batch size. Training a network in three stages, one run divides the learning rate by four
from stage to stage, the other multiplies the batch by four. As functions of the epoch their losses are alike, and the growing
batch takes less than half of the steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from common import BLUE, GREY, ORANGE, Array, Figure, batches, digits, evaluate, main, mlp, train
from onepass.optim import SGD

SIZE, LR, FACTOR, STAGES = 8, 0.2, 4, 3
RUNS = {"shrinking step": ORANGE, "growing batch": BLUE}


@dataclass
class Result:
    losses: dict[str, Array]  # over all training images, after every epoch; the mean over seeds
    steps: dict[str, Array]  # taken until then


def compute(quick: bool) -> Result:
    data, epochs, seeds = digits(), 2 if quick else 6, 1 if quick else 2
    losses, steps = {}, {}
    for name in RUNS:
        curves = []
        for seed in range(seeds):
            model, curve, taken = mlp(64, 32, 10, seed=seed), [], [0]
            optimizer = SGD(model.parameters(), lr=LR)
            curve.append(evaluate(model, data.x, data.y)[0])
            for stage in range(STAGES):
                by = FACTOR**stage
                size = SIZE * by if name == "growing batch" else SIZE
                optimizer.param_groups[0]["lr"] = LR / by if name == "shrinking step" else LR
                for epoch in range(epochs):
                    batch = batches(data, size, 1, seed=1000 * seed + 100 * stage + epoch)
                    taken.append(taken[-1] + len(train(model, optimizer, batch)))
                    curve.append(evaluate(model, data.x, data.y)[0])
            curves.append(curve)
        losses[name], steps[name] = np.mean(curves, axis=0), np.array(taken)
    return Result(losses, steps)


def check(result: Result) -> None:
    end = {name: losses[-1] for name, losses in result.losses.items()}
    assert abs(end["growing batch"] / end["shrinking step"] - 1) < 0.3, end
    assert result.steps["growing batch"][-1] < 0.5 * result.steps["shrinking step"][-1]


def draw(result: Result, figure: Figure) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    for name, color in RUNS.items():
        left.semilogy(result.losses[name], "o-", color=color, markersize=3, label=name)
        right.semilogy(result.steps[name], result.losses[name], "o-", color=color, markersize=3)
    epochs = (len(result.losses["growing batch"]) - 1) // STAGES
    for stage in range(1, STAGES):
        left.axvline(stage * epochs, color=GREY, linewidth=0.8, linestyle=":")
    left.set(title="Loss by epoch: alike", xlabel="epoch", ylabel="training loss")
    right.set(title="The growing batch takes fewer steps", xlabel="step")
    left.legend()


if __name__ == "__main__":
    main(__doc__, compute, check, draw)
