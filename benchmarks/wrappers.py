"""How long the passes of Lookahead and SAM take: onepass against torch's foreach functions and the memory's limit.

    python benchmarks/wrappers.py --filter sam

Rows: Lookahead's synchronisation, SAM's perturbation (with the norm before it) and its restoring of the weights. The
columns and the lists of tensors are those of optimizers.py; saves <out>/wrappers-<date>-<machine>.json.
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import harness
import limit
import optimizers
import report
import torch
from harness import Json, Variant, onepass

RHO, ALPHA = 0.05, 0.5
PATTERNS = {
    "lookahead sync": [limit.SYNCHRONISE],
    "sam perturb": [limit.READ, limit.PERTURB],
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
        return Variant("onepass", lambda: optimizer._synchronise(ALPHA))
    optimizer = onepass.optim.SAM(params, onepass.optim.SGD, rho=RHO)

    def perturb() -> None:
        if not optimizer.is_perturbed:
            optimizer.first_step()

    def restore() -> None:
        if optimizer.is_perturbed:
            optimizer._restore()

    run, prepare = (optimizer.first_step, restore) if what == "sam perturb" else (optimizer._restore, perturb)
    return Variant("onepass", run, prepare)


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


def measure(line: Pass, device: torch.device, seconds: float, rounds: int) -> Json:
    torch.manual_seed(0)
    params = optimizers.make_params(line.row, device)
    variants = [ours(line.what, params)] if onepass is not None else []
    variants.append(theirs(line.what, optimizers.copies(params)))
    for variant in variants:
        variant.prepare()
        variant.run()
    bound = line.bytes_moved >= optimizers.MEMORY_BOUND_BYTES
    ceiling: list[Variant] = []
    if bound and device.type == "cuda":
        ceiling = [Variant("limit", limit.CopyLimit(PATTERNS[line.what], line.row.elements, device).seconds)]
    elif bound and limit.available():
        ceiling = [Variant("limit", limit.StreamLimit(PATTERNS[line.what], line.row.elements).seconds)]
    samples = harness.measure(variants + ceiling, device, seconds=seconds, min_rounds=rounds, warm_up=1)
    summaries = {name: sample.summary() for name, sample in samples.items()}
    return {
        "case": line.case,
        "name": line.name,
        "rule": line.what,
        "dtype": "float32",
        "clip": False,
        "tensors": len(line.row.shapes),
        "elements": line.row.elements,
        "bytes_moved": line.bytes_moved,
        "limit": summaries.pop("limit", None),
        "variants": summaries,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="small lists and few samples, to show that it works")
    parser.add_argument(
        "--filter", default="", metavar="REGEX", help="only rows whose name matches, such as 'x 25M sam'"
    )
    parser.add_argument("--seconds", type=float, help="time per row (default 4, quick 0.1)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"), help="folder of the results")
    args = parser.parse_args()
    device = torch.device(args.device)
    result: Json = {
        "benchmark": "wrappers",
        "environment": harness.environment(device),
        "quick": args.quick,
        "rows": [],
    }

    print(report.heading(result))
    lists = {row.case: row for row in optimizers.rows(args.quick) if row.rule == "SGD" and row.dtype == torch.float32}
    for line in (Pass(case, what, row) for case, row in lists.items() for what in PATTERNS):
        if not re.search(args.filter, line.name, re.IGNORECASE):
            continue
        seconds = args.seconds or (0.1 if args.quick else 4.0)
        result["rows"].append(measure(line, device, seconds, 3 if args.quick else 5))
        gc.collect()
        print(report.line(result["rows"][-1]), flush=True)
        path = harness.save(result, args.out, "wrappers-quick" if args.quick else "wrappers")
    if not result["rows"]:
        print("no row matches", file=sys.stderr)
        return 1
    print(f"saved {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
