"""Dropout needs compensation, in training or in evaluation.

Dropping with probability p leaves a sum with only 1 - p of its mean. The inverted form, the usual one, multiplies what it keeps by 1 / (1 - p) in
training and does nothing in evaluation. The original form leaves training alone and multiplies by 1 - p in evaluation
(`inverted=False`). Either way the next layer sees the same mean in both. Without it the mean changes when training ends.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from common import BLACK, BLUE, GREEN, RED, Array, Figure, main
from onepass.nn.functional import dropout

RATES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
UNITS = 100


@dataclass
class Result:
    """Sums of 100 units, relative to the sum without dropout."""

    inverted: Array  # in training [rates, masks]
    original: Array  # in training
    original_in_evaluation: Array  # [rates]


def compute(quick: bool) -> Result:
    masks = 500 if quick else 5000
    x = torch.rand(UNITS, generator=torch.Generator().manual_seed(0)).expand(masks, UNITS).contiguous()

    def sums(p: float, inverted: bool, training: bool = True) -> Array:
        result: Array = (dropout(x, p, training, seed=1, inverted=inverted).sum(1) / x[0].sum()).double().numpy()
        return result

    return Result(
        np.stack([sums(p, True) for p in RATES]),
        np.stack([sums(p, False) for p in RATES]),
        np.array([sums(p, False, training=False)[0] for p in RATES]),
    )


def check(result: Result) -> None:
    kept = 1 - np.array(RATES)
    error = 4 * result.inverted.std(1) / np.sqrt(result.inverted.shape[1]) + 1e-6
    assert (np.abs(result.inverted.mean(1) - 1) < error).all()
    assert (np.abs(result.original.mean(1) - kept) < error).all()
    assert np.abs(result.original_in_evaluation - kept).max() < 1e-5
    assert (np.diff(result.inverted.std(1)) > 0).all()


def draw(result: Result, figure: Figure) -> None:
    axes = figure.subplots()
    for sums, color, name in (
        (result.inverted, BLUE, "inverted: kept units times 1 / (1 - p)"),
        (result.original, GREEN, "original: kept units as they are"),
    ):
        mean, deviation = sums.mean(1), sums.std(1)
        axes.plot(RATES, mean, "o-", color=color, label=f"training, {name}")
        axes.fill_between(RATES, mean - deviation, mean + deviation, color=color, alpha=0.2, linewidth=0)
    axes.axhline(1, color=BLACK, linestyle="--", linewidth=1.2, label="evaluation, inverted (and none)")
    axes.plot(
        RATES, result.original_in_evaluation, "x", color=RED, markersize=9, label="evaluation, original: times 1 - p"
    )
    axes.set(title="Mean and deviation of a sum under dropout", xlabel="probability of dropping, p", ylim=(0, 1.9))
    axes.legend(loc="upper left", fontsize=9.5)


if __name__ == "__main__":
    main(__doc__, compute, check, draw)
