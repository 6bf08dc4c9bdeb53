"""Memory of weights, gradients and states under each option of an optimizer."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

import torch

from .. import optim
from ..optim._formats import bytes_of_entries
from ..optim._interchange import fused_optimizers
from .output import OutputFile, UsageError, text_table
from .workload import Workload, like

# The options that decide how much is kept; what a bfloat16 parameter can have, a float32 one may refuse.
_OPTIONS: dict[str, dict[str, Any]] = {
    "float32 states": {},
    "bfloat16 states": {"state_dtype": torch.bfloat16},
    "8-bit states": {"state_dtype": "8bit"},
    "8-bit states, stochastic rounding": {"state_dtype": "8bit", "stochastic_rounding": True},
    "8-bit states, 24-bit master": {"state_dtype": "8bit", "master_bits": 24},
    "8-bit states, 32-bit master": {"state_dtype": "8bit", "master_bits": 32},
}
_FLOAT32 = ("float32 states", "bfloat16 states", "8-bit states")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--like",
        type=like,
        metavar="WHAT",
        help="the parameters of resnet50, of gpt2 (the default), or of what a callable of yours returns: FILE:CALLABLE",
    )
    names = sorted(name for name in fused_optimizers() if name != "SparseAdam")
    parser.add_argument(
        "--optimizer", choices=names, default="AdamW", metavar="NAME", help="one of " + ", ".join(names)
    )
    parser.add_argument("--json", type=OutputFile, metavar="FILE", help="save the numbers")


def run(args: argparse.Namespace) -> int:
    workload: Workload = args.like or like("gpt2")
    rows = [
        row
        for dtype, names in ((torch.float32, _FLOAT32), (torch.bfloat16, tuple(_OPTIONS)))
        for row in (_row(workload, args.optimizer, dtype, name) for name in names)
        if row is not None
    ]
    if not rows:
        raise UsageError(f"{args.optimizer} has none of these options")
    print(f"{workload.name}: {workload.elements / 1e6:.1f} million parameters, {args.optimizer}\n")
    per_parameter = ("weights", "gradients", "states", "all")
    header = ["parameters, states", *per_parameter, "all\nGB", "in backward\nGB"]
    header[1] = "bytes per parameter\nweights"
    print(text_table(header, [_cells(row) for row in rows]))
    print(
        "\nin backward: with onepass.optim.step_in_backward, where the gradients of one tensor at a time exist. Activations, and "
        "what torch itself needs, are not counted."
    )
    if args.json:
        result = {"workload": workload.name, "parameters": workload.elements, "optimizer": args.optimizer, "rows": rows}
        args.json.write((json.dumps(result, indent=1) + "\n").encode())
    return 0


def _row(workload: Workload, optimizer: str, dtype: torch.dtype, name: str) -> dict[str, Any] | None:
    """Bytes of each part; None if the optimizer refuses the option."""
    param = torch.nn.Parameter(torch.empty(0, dtype=dtype))
    usual = {"momentum": 0.9} if optimizer == "SGD" else {}
    try:
        made = getattr(optim, optimizer)([param], **usual, **_OPTIONS[name])
    except ValueError:
        return None
    formats = made._formats(made.param_groups[0])
    sizes = [math.prod(shape) for shape, _ in workload.tensors]
    weights = sum(sizes) * dtype.itemsize
    states = sum(bytes_of_entries(formats, size) for size in sizes)
    largest = max(sizes) * dtype.itemsize
    return {
        "parameters": str(dtype).removeprefix("torch."),
        "states": name,
        "elements": sum(sizes),
        "weights_bytes": weights,
        "gradients_bytes": weights,
        "states_bytes": states,
        "all_bytes": 2 * weights + states,
        "in_backward_bytes": weights + largest + states,
    }


def _cells(row: dict[str, Any]) -> list[str]:
    parts = [row[f"{part}_bytes"] / row["elements"] for part in ("weights", "gradients", "states", "all")]
    totals = [row[f"{part}_bytes"] / 1e9 for part in ("all", "in_backward")]
    return [f"{row['parameters']}, {row['states']}", *(f"{x:.2f}" for x in parts), *(f"{x:.3f}" for x in totals)]
