"""Layers on two devices: the same training, and who waits for whom.

The first half of a network lives on one device, the second on another: the GPU where there is one, else the processor
again, for which the code is the same. One optimizer steps all weights, and training gives the same losses as on one device. Whole batches leave one device
idle half of the time; micro-batches fill the gap (the schedule is computed, a forward counting as one unit of time).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from common import BLUE, GREY, ORANGE, SKY, Array, Figure, batches, digits, main, mlp
from onepass.optim import Adam
from torch import Tensor, nn

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
        total = 0.0
        for part, label in zip(x.chunk(micro), y.chunk(micro), strict=True):
            carried: Tensor = first(part.to(devices[0])).to(devices[1])  # all that moves between the devices
            loss = nn.functional.cross_entropy(second(carried), label.to(devices[1])) / micro
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        optimizer.step()
        losses.append(total)
    return np.array(losses)


def schedule(micro: int) -> list[tuple[int, int, int, bool]]:
    """(device, start, part, forward) of every unit of work, each started as soon as its input is there."""
    forward = [(device, part + device, part, True) for part in range(micro) for device in (0, 1)]
    backward = [(1 - k, micro + 1 + part + k, part, False) for part in range(micro) for k in (0, 1)]
    return forward + backward


def compute(quick: bool) -> Result:
    epochs, idle = 2 if quick else 4, {}
    for micro in MICRO:
        units = schedule(micro)
        idle[micro] = 1 - len(units) / (2 * (1 + max(start for _, start, _, _ in units)))
    two = {micro: training(DEVICES, micro, epochs) for micro in MICRO}
    return Result(training(("cpu", "cpu"), 1, epochs), two, idle)


def check(result: Result) -> None:
    for losses in result.two.values():
        assert np.abs(losses - result.one).max() < 1e-3
    assert result.one[-5:].mean() < 0.8 * result.one[:5].mean()
    assert all(abs(idle - 1 / (micro + 1)) < 1e-12 for micro, idle in result.idle.items())


def draw(result: Result, figure: Figure) -> None:
    left, *rows = (figure.add_subplot(place) for place in ((1, 2, 1), (2, 2, 2), (2, 2, 4)))
    left.plot(result.one, color=GREY, linewidth=5, label="one device")
    for (micro, losses), color in zip(result.two.items(), (ORANGE, BLUE), strict=True):
        left.plot(losses, "--", color=color, label=f"two devices, micro-batches: {micro}")
    left.set(title="Training loss: the same", xlabel="step", ylim=(0, None))
    left.legend(fontsize=9)
    for axes, micro in zip(rows, MICRO, strict=True):
        for device, start, part, forward in schedule(micro):
            axes.barh(1 - device, 0.94, left=start, height=0.8, color=SKY if forward else ORANGE)
            axes.text(start + 0.47, 1 - device, str(part + 1), ha="center", va="center", fontsize=9)
        axes.set(title=f"Micro-batches: {micro}, idle {result.idle[micro]:.0%}", xlim=(0, 10.2))
        axes.set_yticks([1, 0], ["first half", "second half"])
    rows[-1].set_xlabel("time (blue: forward, orange: backward)")


if __name__ == "__main__":
    main(__doc__, compute, check, draw)
