"""The gradient of a batch is right on average, and ten examples make it about three times steadier.

A linear classifier of handwritten digits. Left, the gradients of random batches of 1 and 10, seen along two directions:
both clouds lie around the gradient of all examples. Right, the distance to it falls with the root of the batch size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from common import BLACK, BLUE, ORANGE, Array, Figure, digits, main, mlp, slope

SIZES = (1, 3, 10, 30, 100)


@dataclass
class Result:
    full: Array
    gradients: dict[int, Array]  # batch size -> [batches, coordinates]

    def spread(self, size: int) -> float:
        return float(np.sqrt(((self.gradients[size] - self.full) ** 2).sum(1).mean()))


def compute(quick: bool) -> Result:
    data, count = digits(), 200 if quick else 2000
    model = mlp(64, 10)
    with torch.no_grad():
        # The gradient of cross entropy with respect to the weights of a linear classifier, for each example.
        error = torch.softmax(model(data.x), 1) - torch.nn.functional.one_hot(data.y, 10)
        each = (error.unsqueeze(2) * data.x.unsqueeze(1)).flatten(1).double()
    torch.nn.functional.cross_entropy(model(data.x), data.y).backward()  # type: ignore[no-untyped-call]
    weight = model[0].weight.grad
    assert isinstance(weight, torch.Tensor)
    torch.testing.assert_close(each.mean(0).float(), weight.flatten(), atol=1e-6, rtol=1e-4)
    draws = torch.Generator().manual_seed(0)
    gradients = {}
    for size in SIZES:
        batch = torch.randint(len(each), (count, size), generator=draws)
        gradients[size] = torch.stack([each[b].mean(0) for b in batch]).numpy()
    return Result(each.mean(0).numpy(), gradients)


def check(result: Result) -> None:
    for size, gradients in result.gradients.items():
        error = np.sqrt(((gradients.mean(0) - result.full) ** 2).sum())
        assert error < 1.5 * result.spread(size) / np.sqrt(len(gradients)), f"batches of {size} are biased"
    assert abs(slope(SIZES, [result.spread(size) for size in SIZES]) + 0.5) < 0.03


def draw(result: Result, figure: Figure) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    other = np.random.default_rng(0).standard_normal(len(result.full))
    view = np.stack([v / np.linalg.norm(v) for v in (result.full, other)], axis=1)
    for size, color in ((1, ORANGE), (10, BLUE)):
        cloud = (result.gradients[size] @ view).T
        left.scatter(*cloud, s=7, color=color, alpha=0.5, linewidths=0, label=f"batches of {size}")
        left.plot(*cloud.mean(1), "o", color=color, markeredgecolor="white", markersize=10, label="their mean")
    left.plot(*(result.full @ view), "+", color=BLACK, markersize=16, markeredgewidth=2, label="all examples")
    left.set(title="Gradients of batches", xlabel="along the full gradient", ylabel="along a random direction")
    left.legend(loc="best")
    spreads = [result.spread(size) for size in SIZES]
    right.loglog(SIZES, spreads, "o-", color=BLUE, label="measured")
    right.loglog(SIZES, spreads[0] / np.sqrt(SIZES), "--", color=BLACK, linewidth=1, label=r"$\propto 1/\sqrt{batch}$")
    right.set(title="Distance to the full gradient", xlabel="batch size")
    right.legend()


if __name__ == "__main__":
    main(__doc__, compute, check, draw)
