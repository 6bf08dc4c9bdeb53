"""Gradients vanish in depth; skip connections carry them past.

Forty layers of tanh with small weights. Without skips each layer shrinks the gradient on its way down, and the first layers get
next to nothing: the network does not learn. With x + f(x) instead of f(x) the gradient has a direct way, all layers get a
similar share, and the same optimizer trains all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from common import BLUE, ORANGE, Array, Figure, batches, digits, main, smooth, train
from onepass.optim import Adam
from torch import Tensor, nn

DEPTH, WIDTH, COLORS = 40, 32, {"plain": ORANGE, "with skips": BLUE}


class Deep(nn.Module):
    def __init__(self, skip: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.skip = nn.Linear(64, WIDTH), nn.Linear(WIDTH, 10), float(skip)
        self.hidden = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.hidden:
            x = self.skip * x + torch.tanh(layer(x))
        result: Tensor = self.last(x)
        return result


@dataclass
class Result:
    gradients: dict[str, Array]  # norm for every hidden layer, at the start
    losses: dict[str, Array]


def compute(quick: bool) -> Result:
    data, gradients, losses = digits(), {}, {}
    for name in COLORS:
        model = Deep(skip=name == "with skips")
        nn.functional.cross_entropy(model(data.x), data.y).backward()  # type: ignore[no-untyped-call]
        gradients[name] = np.array([float(layer.weight.grad.norm()) for layer in model.hidden])  # type: ignore[union-attr, operator]
        optimizer = Adam(model.parameters(), lr=1e-3)
        losses[name] = np.array(train(model, optimizer, batches(data, 32, 1 if quick else 8)))
    return Result(gradients, losses)


def check(result: Result) -> None:
    share = {name: norms[0] / norms[-1] for name, norms in result.gradients.items()}
    assert share["plain"] < 1e-6, share
    assert 0.2 < share["with skips"] < 20, share
    assert result.losses["with skips"][-10:].mean() < 0.5 * result.losses["plain"][-10:].mean()


def draw(result: Result, figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    for name, color in COLORS.items():
        left.semilogy(range(1, DEPTH + 1), result.gradients[name], "o-", color=color, markersize=3, label=name)
        right.plot(smooth(result.losses[name], 10), color=color, label=name)
    left.set(title="Gradient of each layer at the start", xlabel="layer", ylabel="norm")
    left.legend()
    right.set(title="Training loss", xlabel="step", ylim=(0, None))
    right.legend()


if __name__ == "__main__":
    main(__doc__, compute, check, draw)
