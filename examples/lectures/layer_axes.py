"""BatchNorm normalises columns, LayerNorm rows.

A batch of eight examples with twelve features. BatchNorm takes mean and deviation of a feature over the examples (a column);
LayerNorm those of an example over its features (a row). RMSNorm divides a row by its root mean square and leaves its mean. Cells
framed together share their statistics. Only BatchNorm makes an example depend on the others in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from common import Array, Figure, main
from matplotlib.patches import Rectangle
from onepass.nn import BatchNorm1d, LayerNorm, RMSNorm

EXAMPLES, FEATURES = 8, 12
NORMS = {"BatchNorm": BatchNorm1d(FEATURES), "LayerNorm": LayerNorm(FEATURES), "RMSNorm": RMSNorm(FEATURES)}


@dataclass
class Result:
    x: Array
    y: dict[str, Array]
    depends: dict[str, bool]  # the first example on the last


def compute(quick: bool) -> Result:
    torch.manual_seed(0)
    # Features of different mean, examples of different size.
    x = (torch.randn(EXAMPLES, FEATURES) + 2 * torch.randn(FEATURES)) * torch.linspace(0.5, 2, EXAMPLES).unsqueeze(1)
    other = x.clone()
    other[-1] += 3
    y = {name: norm(x).detach() for name, norm in NORMS.items()}
    depends = {name: not torch.equal(norm(other)[0], y[name][0]) for name, norm in NORMS.items()}
    return Result(x.double().numpy(), {name: value.double().numpy() for name, value in y.items()}, depends)


def check(result: Result) -> None:
    for name, axis in (("BatchNorm", 0), ("LayerNorm", 1)):
        assert np.abs(result.y[name].mean(axis)).max() < 1e-6
        assert np.abs(result.y[name].std(axis) - 1).max() < 1e-3
        assert np.abs(result.y[name].mean(1 - axis)).max() > 0.1
    assert np.abs((result.y["RMSNorm"] ** 2).mean(1) - 1).max() < 1e-5
    assert np.abs(result.y["RMSNorm"].mean(1)).max() > 0.1
    assert result.depends == {"BatchNorm": True, "LayerNorm": False, "RMSNorm": False}


def draw(result: Result, figure: Figure) -> None:
    for axes, (name, values) in zip(figure.subplots(2, 2).flat, {"Input": result.x, **result.y}.items(), strict=True):
        image = axes.imshow(values, cmap="PuOr", vmin=-3, vmax=3, aspect="auto")
        axes.set(xticks=[], yticks=[], title=name)
        if name == "BatchNorm":
            places = [((i - 0.5, -0.5), 1, EXAMPLES) for i in range(FEATURES)]
        else:
            places = [((-0.5, i - 0.5), FEATURES, 1) for i in range(EXAMPLES)] if name != "Input" else []
        for corner, width, height in places:
            axes.add_patch(
                Rectangle(corner, width, height, fill=False, edgecolor="black", linewidth=1.6, clip_on=False)
            )
    figure.axes[0].set(xlabel=f"{FEATURES} features", ylabel=f"{EXAMPLES} examples")
    figure.colorbar(image, ax=figure.axes, shrink=0.8)


if __name__ == "__main__":
    main(__doc__, compute, check, draw)
