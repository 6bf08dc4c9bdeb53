"""Hogwild: several processes train one network in shared memory at once, without locks (Niu et al. 2011).

    python examples/hogwild.py [--quick]

Each process has an optimizer of its own over the shared parameters. Their updates interleave and some are lost, and
still the network learns: SGD forgives noise.
"""

from __future__ import annotations

import sys
import time

import onepass
import torch
from helpers import mlp, options, progress
from onepass._cli.demo_data import Digits
from torch import nn
from torch.multiprocessing.spawn import spawn

PROCESSES = 2


def train(rank: int, workers: int, model: nn.Module, library: str, epochs: int) -> None:
    """One worker: every workers-th batch of each epoch."""
    torch.set_num_threads(1)
    digits = Digits()
    optim = onepass.optim if library == "onepass" else torch.optim
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    steps = digits.steps(quick=False) * epochs // 40
    batches = (batch for _, batch in zip(range(steps), digits.batches(quick=False), strict=False))
    for step, (inputs, targets) in enumerate(
        progress(batches, f"{workers} of {library}", steps) if rank == 0 else batches
    ):
        if step % workers == rank:
            # Gradients are the worker's own, only the parameters are shared.
            gradients = torch.autograd.grad(
                nn.functional.cross_entropy(model(inputs), targets), list(model.parameters())
            )
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()


def run(workers: int, library: str, epochs: int) -> nn.Module:
    torch.manual_seed(0)
    model = mlp().share_memory()
    begin = time.perf_counter()
    if workers == 1:
        train(0, 1, model, library, epochs)
    else:
        spawn(train, (workers, model, library, epochs), nprocs=workers)  # type: ignore[no-untyped-call]
    seconds = time.perf_counter() - begin
    digits = Digits()
    with torch.no_grad():
        right = (model(digits.test_images).argmax(1) == digits.test_labels).double().mean().item()
    start = " with their start" if workers > 1 else ""
    print(
        f"{library:<8} {workers} process{'es' * (workers > 1)}: {right:.1%} of the test read right, {seconds:.1f} s{start}"
    )
    return model


def main() -> int:
    epochs = 12 if options(__doc__).quick else 40
    train(0, 1, mlp(), "torch", 1)  # a process's first steps are slow, whatever the library
    theirs, ours = run(1, "torch", epochs), run(1, "onepass", epochs)
    pairs = zip(theirs.parameters(), ours.parameters(), strict=True)
    largest = max((a - b).abs().max().item() for a, b in pairs)
    same = largest <= 1e-3
    print(f"one process: the parameters of torch and onepass are {'' if same else 'NOT '}the same (to {largest:.1e})")
    together = run(PROCESSES, "onepass", epochs)
    learnt = all(parameter.isfinite().all() for parameter in together.parameters())
    return 0 if same and learnt else 1


if __name__ == "__main__":
    sys.exit(main())
