"""Gradients explode at a cliff; clipping keeps the step short.

A recurrent unit that is applied fifty times: h <- sigmoid(w h + b). Its loss has a cliff, where the gradient is hundreds of times
larger than beside it. One step from there throws plain gradient descent far away, to where it learns nothing. With
`max_norm` the same optimizer takes the same direction with a step of bounded length, and comes down.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from common import BLUE, RED, Array, Figure, along, descend, level_lines, main
from onepass.optim import SGD
from torch import Tensor

TARGET, DEPTH, LR, MAX_NORM = 0.7, 50, 0.3, 0.2
START = (5.5, -2.2)


def loss(w: Tensor) -> Tensor:
    h = torch.zeros_like(w[0])
    for _ in range(DEPTH):
        h = torch.sigmoid(w[0] * h + w[1])
    return (h - TARGET) ** 2


@dataclass
class Result:
    paths: dict[str, Array]
    largest: dict[str, float]  # gradient norm


def compute(quick: bool) -> Result:
    paths, largest = {}, {}
    for name, max_norm, steps in (("plain", None, 100), ("clipped", MAX_NORM, 400)):
        path = descend(loss, START, partial(SGD, lr=LR, max_norm=max_norm), steps)
        points = torch.tensor(path, requires_grad=True)
        loss(points.T).sum().backward()  # type: ignore[no-untyped-call]
        assert points.grad is not None
        paths[name], largest[name] = path, float(points.grad.norm(dim=1).max())
    return Result(paths, largest)


def check(result: Result) -> None:
    lengths = {name: np.linalg.norm(np.diff(path, axis=0), axis=1).max() for name, path in result.paths.items()}
    assert lengths["clipped"] <= LR * MAX_NORM * (1 + 1e-5)
    assert lengths["plain"] > 20 * lengths["clipped"], lengths
    ends = {name: along(loss, path)[-1] for name, path in result.paths.items()}
    assert ends["clipped"] < 1e-3 < 1e-2 < ends["plain"], ends


def draw(result: Result, figure: Figure) -> None:
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    level_lines(left, loss, (3.5, 8.5), (-3.5, 1.0), log=False)
    for name, color in (("clipped", BLUE), ("plain", RED)):
        path = result.paths[name]
        left.plot(*path.T, "o-", color=color, markersize=4, linewidth=1.2, label=name)
        right.semilogy(along(loss, path), color=color, linewidth=3.0 if name == "plain" else 0.7, label=name)
    left.set(title="The cliff, and two walks from the same start", xlabel="w", ylabel="b")
    left.legend()
    right.set(title="Loss", xlabel="step")
    right.legend()


if __name__ == "__main__":
    main(__doc__, compute, check, draw)
