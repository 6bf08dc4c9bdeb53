"""DistributedDataParallel in two processes: a run that is stopped and resumed equals one that is not, bit for bit.

    python examples/ddp_resume.py [--quick]

Each process sees its half of every batch. One of them writes the checkpoint, and both read it.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import onepass
import torch
from helpers import compare_runs, in_group, mlp, options
from onepass._cli.demo_data import Digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def train(rank: int, library: str, first: int, last: int, checkpoint: Path) -> None:
    """Steps first to last of a training; steps after the first one continue from the checkpoint."""
    torch.manual_seed(0)
    model = DistributedDataParallel(mlp())
    optimizer: torch.optim.Optimizer
    if library == "onepass":
        optimizer = onepass.optim.AdamW(model.parameters(), lr=1e-3)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    losses = []
    if first > 0:
        saved = torch.load(checkpoint, weights_only=True)
        model.module.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        losses = saved["losses"]

    begin = time.perf_counter()
    for step, (inputs, targets) in enumerate(Digits().batches(quick=False)):
        if first <= step < last:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs[rank::2]), targets[rank::2])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
    if rank == 0:
        ms = 1e3 * (time.perf_counter() - begin) / (last - first)
        states = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**states, "losses": losses, "ms": ms}, checkpoint)


def main() -> int:
    steps = 20 if options(__doc__).quick else 400
    with tempfile.TemporaryDirectory() as folder:
        files = {run: Path(folder, f"{run}.pt") for run in ("torch", "onepass", "resumed")}
        whole = [("torch", 0, steps, files["torch"]), ("onepass", 0, steps, files["onepass"])]
        in_group(train, *whole, ("onepass", 0, steps // 2, files["resumed"]))
        in_group(train, ("onepass", steps // 2, steps, files["resumed"]))  # these processes have only the checkpoint
        results = {run: torch.load(file, weights_only=True) for run, file in files.items()}
    return 0 if compare_runs(results, steps) else 1


if __name__ == "__main__":
    sys.exit(main())
