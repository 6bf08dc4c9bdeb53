"""Activations, and what they let through backwards.

What a layer passes back is multiplied by the derivative of its activation. Sigmoid's is at most a quarter, so ten of them leave at most
a millionth; tanh's reaches one, but only near zero. ReLU and those like it pass everything on the right side, and on the left they
differ: ReLU passes nothing, the others a little.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from common import BLUE, GREY, ORANGE, Array, Figure, main
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "ReLU": F.relu,
    "leaky ReLU": lambda x: F.leaky_relu(x, 0.1),
    "ELU": F.elu,
    "softplus": F.softplus,
    "GELU": F.gelu,
    "SiLU": F.silu,
}


@dataclass
class Result:
    x: Array
    values: dict[str, Array]
    derivatives: dict[str, Array]


def compute(quick: bool) -> Result:
    values, derivatives = {}, {}
    x = torch.linspace(-4, 4, 801, dtype=torch.float64, requires_grad=True)
    for name, activation in ACTIVATIONS.items():
        y = activation(x)
        (slope,) = torch.autograd.grad(y.sum(), x)
        values[name], derivatives[name] = y.detach().numpy(), slope.numpy()
    return Result(x.detach().numpy(), values, derivatives)


def check(result: Result) -> None:
    largest = {name: float(slope.max()) for name, slope in result.derivatives.items()}
    assert abs(largest["sigmoid"] - 0.25) < 1e-6
    assert largest["sigmoid"] ** 10 < 1e-6
    assert all(abs(largest[name] - 1) < 1e-6 for name in ("tanh", "ReLU", "leaky ReLU", "ELU"))
    assert 1 < largest["SiLU"] < largest["GELU"] < 1.2
    left = {name: slope[result.x < -0.1] for name, slope in result.derivatives.items()}
    assert (left["ReLU"] == 0).all()
    assert all((left[name] != 0).mean() > 0.99 for name in left if name != "ReLU")


def draw(result: Result, figure: Figure) -> None:
    for axes, name in zip(figure.subplots(2, 4, sharex=True, sharey=True).flat, ACTIVATIONS, strict=True):
        axes.axhline(0, color=GREY, linewidth=0.6)
        axes.axvline(0, color=GREY, linewidth=0.6)
        axes.plot(result.x, result.values[name], color=BLUE, label="activation")
        axes.plot(result.x, result.derivatives[name], "--", color=ORANGE, label="derivative")
        axes.set_title(f"{name}: at most {result.derivatives[name].max():.3g}", fontsize=9.5)
        axes.set(ylim=(-1.2, 2.2))
    figure.axes[0].legend(loc="upper left", fontsize=8.5)


if __name__ == "__main__":
    main(__doc__, compute, check, draw)
