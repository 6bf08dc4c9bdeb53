"""The time of an optimizer step is its bytes over the bandwidth (computed, not measured).

A step does little arithmetic for each number it moves, so the memory sets the pace. The bytes are those that a fused step of each of our
optimizers has to move: weight and gradient read, weight written, every state read and written. Divided by the bandwidth in the data
sheet of a GPU they give a lower bound for a model of 1.5 billion float32 weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from common import Array, Figure, Make, main
from onepass.optim import SGD, Adagrad, Adam, RMSprop
from torch import nn

WEIGHTS = 1.5e9
GPUS = {  # GB/s, from the makers' data sheets
    "T4": 320,
    "RTX 3090": 936,
    "RTX 4090": 1008,
    "V100": 900,
    "A100 40 GB": 1555,
    "A100 80 GB": 2039,
    "H100 SXM": 3350,
    "H200": 4800,
}
METHODS: dict[str, Make] = {
    "SGD": lambda w: SGD(w),
    "momentum": lambda w: SGD(w, momentum=0.9),
    "Adagrad": lambda w: Adagrad(w),
    "RMSprop": lambda w: RMSprop(w),
    "Adam": lambda w: Adam(w),
    "AMSGrad": lambda w: Adam(w, amsgrad=True),
}


@dataclass
class Result:
    size: dict[str, int]  # bytes per weight
    milliseconds: Array  # [GPU, method]


def bytes_per_weight(make: Make) -> int:
    """Counted on the states that the optimizer really has after a step."""
    weight = nn.Parameter(torch.zeros(1000))
    weight.grad = torch.ones_like(weight)
    optimizer = make([weight])
    optimizer.step()
    states = [s for s in optimizer.state[weight].values() if isinstance(s, torch.Tensor) and s.shape == weight.shape]
    return weight.element_size() * 3 + sum(2 * s.element_size() for s in states)


def compute(quick: bool) -> Result:
    size = {name: bytes_per_weight(make) for name, make in METHODS.items()}
    return Result(size, WEIGHTS * np.array([*size.values()]) / np.array([[1e6 * rate] for rate in GPUS.values()]))


def check(result: Result) -> None:
    assert result.size == {"SGD": 12, "momentum": 20, "Adagrad": 20, "RMSprop": 20, "Adam": 28, "AMSGrad": 36}
    ratio = result.milliseconds[0] / result.milliseconds[-1]
    assert np.allclose(ratio, GPUS["H200"] / GPUS["T4"])
    assert abs(result.milliseconds[-1, 4] - 8.75) < 1e-9  # Adam: 42 GB at 4800 GB/s


def draw(result: Result, figure: Figure) -> None:
    axes = figure.subplots()
    axes.imshow(np.log(result.milliseconds), cmap="cividis_r", aspect="auto", alpha=0.6)
    for (row, column), value in np.ndenumerate(result.milliseconds):
        axes.text(column, row, f"{value:.1f}" if value < 100 else f"{value:.0f}", ha="center", va="center")
    axes.set_xticks(range(len(METHODS)), [f"{name}\n{size} bytes" for name, size in result.size.items()])
    axes.set_yticks(range(len(GPUS)), [f"{name}, {rate} GB/s" for name, rate in GPUS.items()])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("Milliseconds per step of 1.5 billion weights: computed")


if __name__ == "__main__":
    main(__doc__, compute, check, draw)
