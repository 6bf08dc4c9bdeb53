"""How long the passes of Lookahead and SAM take: onepass against torch's foreach functions and the memory's limit.

    python benchmarks/wrappers.py --filter sam

Rows: Lookahead's synchronisation, SAM's perturbation (with the norm before it) and its restoring of the weights. The
columns and the lists of tensors are those of optimizers.py; saves <out>/wrappers-<date>-<machine>.json.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import limit
import optimizers
import runner
import torch
from harness import OURS, Json, Variant
from machine import onepass

RHO, ALPHA = 0.05, 0.5
PATTERNS = {
    "lookahead sync": [limit.SYNCHRONISE],
    "sam perturb": [limit.NORM, limit.PERTURB],
    "sam restore": [limit.RESTORE],
}


@dataclass(frozen=True)
class Pass:
    """One row of the table: a list of tensors and the pass over it."""

    case: str
    what: str
    row: optimizers.Row

    @property
    def name(self) -> str:
        return f"{self.case} {self.what}"

    @property
    def bytes_moved(self) -> int:
        return self.row.elements * sum(pattern.bytes_per_element for pattern in PATTERNS[self.what])


def ours(what: str, params: list[torch.Tensor]) -> Variant:
    if what == "lookahead sync":
        optimizer = onepass.optim.Lookahead(onepass.optim.SGD(params), alpha=ALPHA)
        optimizer._begin_new()
        return Variant(OURS, lambda: optimizer._synchronise(ALPHA))
    optimizer = onepass.optim.SAM(params, onepass.optim.SGD, rho=RHO)

    def perturb() -> None:
        if not optimizer.is_perturbed:
            optimizer.first_step()

    def restore() -> None:
        if optimizer.is_perturbed:
            optimizer._restore()

    run, prepare = (optimizer.first_step, restore) if what == "sam perturb" else (optimizer._restore, perturb)
    return Variant(OURS, run, prepare)


def theirs(what: str, params: list[torch.Tensor]) -> Variant:
    """What a careful user writes with torch alone; the copies are allocated once."""
    kept = [param.detach().clone() for param in params]
    weights = [param.detach() for param in params]

    def synchronise() -> None:
        torch._foreach_lerp_(kept, weights, ALPHA)
        torch._foreach_copy_(weights, kept)

    def perturb() -> None:
        grads = [param.grad for param in params if param.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        torch._foreach_copy_(kept, weights)
        torch._foreach_add_(weights, grads, alpha=RHO / (norm.item() + 1e-12))

    def restore() -> None:
        torch._foreach_copy_(weights, kept)

    steps: dict[str, Callable[[], None]] = {
        "lookahead sync": synchronise,
        "sam perturb": perturb,
        "sam restore": restore,
    }
    return Variant("foreach", steps[what])


def measure(line: Pass, settings: runner.Settings) -> Json:
    params = optimizers.make_params(line.row, settings.device)
    variants = [ours(line.what, params)] if onepass is not None else []
    variants.append(theirs(line.what, optimizers.copies(params)))
    bound = line.bytes_moved >= optimizers.MEMORY_BOUND_BYTES
    limits = limit.variants(PATTERNS[line.what], line.row.elements, settings.device) if bound else []
    description = {
        "case": line.case,
        "name": line.name,
        "rule": line.what,
        "dtype": "float32",
        "clip": False,
        "tensors": len(line.row.shapes),
        "elements": line.row.elements,
        "bytes_moved": line.bytes_moved,
    }
    return runner.row(description, variants, limits, {}, settings)


def jobs(quick: bool) -> Iterator[runner.Job]:
    lists = {row.case: row for row in optimizers.rows(quick) if row.rule == "SGD" and row.dtype == torch.float32}
    for line in (Pass(case, what, row) for case, row in lists.items() for what in PATTERNS):
        yield runner.Job(line.name, functools.partial(measure, line))


if __name__ == "__main__":
    sys.exit(runner.main("wrappers", __doc__, jobs, compiles=False))
