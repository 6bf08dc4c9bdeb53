"""In many dimensions random directions are nearly orthogonal.

The cosine between two random directions of d dimensions has mean 0 and standard deviation 1 / sqrt(d). In the plane any angle
is as good as any other; among the weights of a network two random directions are as good as perpendicular, and so is a random
direction to the gradient. It is why plots of the loss along random directions show so little of what training follows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from common import BLACK, BLUE, GREEN, ORANGE, RED, Array, Figure, digits, main, mlp, slope

SIZES = {2: ORANGE, 10: GREEN, 100: BLUE, 10_000: BLACK}


@dataclass
class Result:
    cosines: dict[int, Array]  # dimensions -> of pairs
    to_gradient: Array  # of a network with `weights` weights
    weights: int


def compute(quick: bool) -> Result:
    pairs, draws = 500 if quick else 2000, torch.Generator().manual_seed(0)

    def cosine(a: torch.Tensor, dims: int) -> Array:
        b = torch.randn(pairs, dims, generator=draws)
        result: Array = torch.nn.functional.cosine_similarity(a, b).double().numpy()
        return result

    cosines = {dims: cosine(torch.randn(pairs, dims, generator=draws), dims) for dims in SIZES}
    model, data = mlp(64, 64, 10), digits()
    torch.nn.functional.cross_entropy(model(data.x), data.y).backward()  # type: ignore[no-untyped-call]
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return Result(cosines, cosine(gradient.unsqueeze(0), len(gradient)), len(gradient))


def check(result: Result) -> None:
    deviations = {dims: float(cosines.std()) for dims, cosines in result.cosines.items()}
    for dims, deviation in deviations.items():
        assert abs(deviation * dims**0.5 - 1) < 0.1, f"{dims} dimensions: {deviation}"
    assert abs(slope([*SIZES], [*deviations.values()]) + 0.5) < 0.02
    assert abs(result.to_gradient.std() * result.weights**0.5 - 1) < 0.1
    assert np.abs(result.to_gradient).max() < 0.08


def draw(result: Result, figure: Figure) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for dims, color in SIZES.items():
        degrees = np.degrees(np.arccos(result.cosines[dims]))
        left.hist(degrees, bins=60, range=(0, 180), density=True, histtype="step", color=color, linewidth=1.8)
        left.plot([], [], color=color, label=f"{dims:,} dimensions")
    left.set(title="Angle between two random directions", xlabel="degrees", xticks=range(0, 181, 30), yscale="log")
    left.set(ylabel="density", ylim=(1e-4, 1))
    left.legend(loc="upper left", fontsize=9)
    right.loglog([*SIZES], [c.std() for c in result.cosines.values()], "o", color=BLUE, label="two random directions")
    label = f"a random one and the gradient\nof a network, {result.weights:,} weights"
    right.loglog(result.weights, result.to_gradient.std(), "*", color=RED, markersize=13, label=label)
    line = np.array([1.5, 2e4])
    right.loglog(line, line**-0.5, "--", color=BLACK, linewidth=1, label=r"$1/\sqrt{d}$")
    right.set(title="Deviation of the cosine", xlabel="dimensions d", ylim=(3e-3, 12))
    right.legend(loc="upper right", fontsize=9)


if __name__ == "__main__":
    main(__doc__, compute, check, draw)
