"""BatchNorm does not work by steadying what layers receive.

After each BatchNorm noise is added that changes with every step: a random shift and a random scale for each feature. What the next layer
receives is then less steady than without any norm, and still the network trains faster than without: a blow to the explanation
by "internal covariate shift" (Santurkar et al. 2018).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from common import BLUE, GREEN, ORANGE, Array, Figure, batches, digits, main, mlp, smooth, train
from onepass.nn import BatchNorm1d
from onepass.optim import SGD
from torch import Tensor, nn

LR, LAYERS, NOISE = 0.1, 2, 0.4
COLORS = {"without a norm": ORANGE, "BatchNorm": BLUE, "BatchNorm and noise": GREEN}


class NoisyBatchNorm(BatchNorm1d):
    """Shifts and scales every feature at random, otherwise at every step."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        shift, scale = (NOISE * torch.randn(y.shape[1]) for _ in range(2))
        return y * (1 + scale) + shift


@dataclass
class Result:
    losses: dict[str, Array]
    drift: dict[str, Array]  # how far the mean that the last hidden layer receives moves per step, in deviations


def compute(quick: bool) -> Result:
    data, losses, drift = digits(), {}, {}
    norms = {"without a norm": None, "BatchNorm": BatchNorm1d, "BatchNorm and noise": NoisyBatchNorm}
    for name, norm in norms.items():
        means: list[Tensor] = []
        model = mlp(64, *LAYERS * [48], 10, norm=norm)
        inputs: list[nn.Module] = [m for m in model if isinstance(m, nn.Linear)]

        def note(module: nn.Module, x: tuple[Tensor], seen: list[Tensor] = means) -> None:
            seen.append(x[0].detach().mean(0) / (x[0].detach().std() + 1e-12))

        inputs[-2].register_forward_pre_hook(note)
        optimizer = SGD(model.parameters(), lr=LR)
        losses[name] = np.array(train(model, optimizer, batches(data, 64, 8 if quick else 25)))
        drift[name] = torch.stack(means).diff(dim=0).abs().mean(1).double().numpy()
    return Result(losses, drift)


def check(result: Result) -> None:
    part = len(result.losses["BatchNorm"]) // 3
    loss = {name: losses[:part].mean() for name, losses in result.losses.items()}
    drift = {name: values.mean() for name, values in result.drift.items()}
    assert drift["BatchNorm and noise"] > 2 * drift["without a norm"], drift
    assert loss["BatchNorm"] < loss["BatchNorm and noise"] < 0.8 * loss["without a norm"], loss


def draw(result: Result, figure: Figure) -> None:
    left, right = figure.subplots(1, 2)
    for name, color in COLORS.items():
        left.plot(smooth(result.losses[name], 10), color=color, label=name)
        right.semilogy(smooth(result.drift[name], 10), color=color, label=name)
    left.set(title="Training loss", xlabel="step", ylim=(0, None))
    left.legend()
    right.set(title="How far a layer's input drifts", xlabel="step", ylabel="mean, in deviations per step")


if __name__ == "__main__":
    main(__doc__, compute, check, draw)
