"""Layers on two devices: the same training, and who waits for whom.

The second half of a network lives on a GPU, or on the processor again where there is none. One optimizer steps all weights, and the
losses are those of one device. Whole batches leave each device idle half of the time; micro-batches fill the gap (the schedule is
computed, not measured).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from common import BLUE, GREY, ORANGE, SKY, Array, Figure, batches, digits, main, mlp
from onepass.optim import Adam
from torch import nn

DEVICES = ("cpu", "cuda" if torch.cuda.is_available() else "cpu")
MICRO, BATCH, LR = (1, 4), 64, 3e-3


@dataclass
class Result:
    one: Array  # losses on one device
    two: dict[int, Array]  # number of micro-batches -> losses on two devices
    idle: dict[int, float]  # share of the time in which a device waits


def training(devices: tuple[str, str], micro: int, epochs: int) -> Array:
    """Each batch in `micro` parts, whose gradients add up to that of the batch."""
    model, losses = mlp(64, 64, 64, 10), []
    first, second = model[:2].to(devices[0]), model[2:].to(devices[1])
    optimizer = Adam(model.parameters(), lr=LR)
    for x, y in batches(digits(), BATCH, epochs):
        optimizer.zero_grad()
        losses.append(0.0)
        for part, label in zip(x.chunk(micro), y.chunk(micro), strict=True):
            out = second(first(part.to(devices[0])).to(devices[1]))
            loss = nn.functional.cross_entropy(out, label.to(devices[1])) / micro
            loss.backward()  # type: ignore[no-untyped-call]
            losses[-1] += float(loss.detach())
        optimizer.step()
    return np.array(losses)


def schedule(micro: int) -> list[tuple[int, int, int, bool]]:
    """(device, start, part, forward) of every unit of work, each started as soon as its input is there."""
    forward = [(device, part + device, part, True) for part in range(micro) for device in (0, 1)]
    return forward + [(1 - k, micro + 1 + part + k, part, False) for part in range(micro) for k in (0, 1)]


def compute(quick: bool) -> Result:
    idle = {m: 1 - 4 * m / (2 + 2 * max(start for _, start, _, _ in schedule(m))) for m in MICRO}  # 4 m units of work
    two = {micro: training(DEVICES, micro, 1 if quick else 4) for micro in MICRO}
    return Result(training(("cpu", "cpu"), 1, 1 if quick else 4), two, idle)


def check(result: Result) -> None:
    assert all(np.abs(losses - result.one).max() < 1e-3 for losses in result.two.values())
    assert all(abs(idle - 1 / (micro + 1)) < 1e-12 for micro, idle in result.idle.items())


def draw(result: Result, figure: Figure) -> None:
    left, *rows = figure.subplot_mosaic("ab;ac").values()
    left.plot(result.one, color=GREY, linewidth=5, label="one device")
    for (micro, losses), color in zip(result.two.items(), (ORANGE, BLUE), strict=True):
        left.plot(losses, "--", color=color, label=f"two, micro-batches: {micro}")
    left.set(title="Training loss: the same", xlabel="step", ylim=(0, None))
    left.legend(fontsize=9)
    for axes, micro in zip(rows, MICRO, strict=True):
        for device, start, part, forward in schedule(micro):
            axes.barh(1 - device, 0.94, left=start, height=0.8, color=SKY if forward else ORANGE)
            axes.text(start + 0.47, 1 - device, str(part + 1), ha="center", va="center", fontsize=9)
        axes.set(title=f"Micro-batches: {micro}, idle {result.idle[micro]:.0%}", xlim=(0, 10.2))
        axes.set_yticks([1, 0], ["first half", "second half"])
    axes.set_xlabel("time (blue: forward, orange: backward)")


if __name__ == "__main__":
    main(__doc__, compute, check, draw)
