"""Two processes: in step with each other, or Hogwild.

Synchronous training (DDP over gloo) averages the gradients of two halves of each batch: it is the training of one process with whole
batches, to rounding. Hogwild lets both processes step shared weights without waiting or locking. Each then works with gradients that
are a little old, twice as many small steps are taken, and no two runs are the same; it learns all the same.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import BLUE, GREY, ORANGE, Array, Figure, batches, digits, evaluate, main, mlp, smooth, train
from onepass.optim import SGD
from torch import nn

WORLD, SIZE, LR = 2, 64, 0.1
Batches = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass
class Result:
    losses: dict[str, Array]  # of every batch of 64 images, or of both halves of one
    error: dict[str, float]
    difference: float  # of weights, between one process and two in step; the largest


def process(rank: int, folder: str, shared: nn.Module, data: Batches) -> None:
    """Train in step with the other process, then Hogwild on the shared weights."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    mine = [(x.chunk(WORLD)[rank], y.chunk(WORLD)[rank]) for x, y in data]
    model = nn.parallel.DistributedDataParallel(mlp(64, 64, 10))
    in_step = train(model, SGD(model.parameters(), lr=LR), mine)
    dist.barrier()
    hogwild = train(shared, SGD(shared.parameters(), lr=LR), mine)
    torch.save((in_step, hogwild, model.module.state_dict()), f"{folder}/{rank}")
    dist.barrier()
    os._exit(0)  # an ordinary exit while gloo's threads are ending occasionally aborts


def compute(quick: bool) -> Result:
    images = digits()
    data = [*batches(images, SIZE, 5 if quick else 25)]
    one, in_step, shared = mlp(64, 64, 10), mlp(64, 64, 10), mlp(64, 64, 10).share_memory()
    losses = {"one process": np.array(train(one, SGD(one.parameters(), lr=LR), data))}
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(process, (folder, shared, data), nprocs=WORLD)  # type: ignore[attr-defined, no-untyped-call]
        found = [torch.load(f"{folder}/{rank}") for rank in range(WORLD)]
    losses["two, in step"], losses["two, Hogwild"] = (np.mean([f[i] for f in found], axis=0) for i in (0, 1))
    in_step.load_state_dict(found[0][2])
    models = dict(zip(losses, (one, in_step, shared), strict=True))
    error = {name: evaluate(model, images.test_x, images.test_y)[1] for name, model in models.items()}
    difference = max(float((p - found[0][2][key]).abs().max()) for key, p in one.state_dict().items())
    return Result(losses, error, difference)


def check(result: Result) -> None:
    assert result.difference < 1e-4
    assert np.abs(result.losses["one process"] - result.losses["two, in step"]).max() < 1e-4
    assert result.losses["two, Hogwild"][-10:].mean() < 0.6 * result.losses["two, Hogwild"][:10].mean()
    assert result.error["two, Hogwild"] < 0.3


def draw(result: Result, figure: Figure) -> None:
    axes = figure.subplots()
    looks = ((GREY, "-", 5.0), (BLUE, "--", 1.8), (ORANGE, "-", 1.8))
    for (name, losses), (color, style, width) in zip(result.losses.items(), looks, strict=True):
        axes.semilogy(smooth(losses, 10), style, color=color, linewidth=width, label=name)
    axes.set(title="Training loss by images seen", xlabel="batches of 64 images, or both halves of one")
    axes.legend()


if __name__ == "__main__":
    main(__doc__, compute, check, draw)
