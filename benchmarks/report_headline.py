"""The few numbers at the top of the README, from the results of all benchmarks."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from phrases import Quartiles, describe, spread, times
from report_rows import COMPILED, OURS

Json = Mapping[str, Any]

# What a reader asks first: (benchmark, row, how the README calls it).
ROWS = [
    ("optimizers", "1 x 25M adamw", "AdamW step, one tensor of 25M"),
    ("optimizers", "1 x 25M adamw clip", "AdamW step with clipping, one tensor of 25M"),
    ("optimizers", "1000 x 256 adamw", "AdamW step, 1000 small tensors"),
    ("optimizers", "1 x 25M nadam", "NAdam step, one tensor of 25M"),
    ("layers", "LayerNorm 4096x1024 forward", "LayerNorm 4096 x 1024, forward"),
    ("layers", "LayerNorm 4096x1024 backward", "LayerNorm 4096 x 1024, backward"),
    ("layers", "Dropout 4096x1024 forward", "dropout 4096 x 1024, forward"),
    ("layers", "dropout_add_layer_norm 4096x1024 forward", "dropout + add + LayerNorm 4096 x 1024, forward"),
]


def markdown(results: Mapping[str, Json]) -> str:
    """results: by benchmark; "training", "optimizers" and "layers" are needed."""
    models = results["training"]["rows"]
    ratios = [row["ratios"]["torch"] for row in models]
    mean = statistics.geometric_mean(ratio[1] for ratio in ratios)
    lines = ["| | times faster than torch eager | quartiles |", "| --- | ---: | :---: |"]
    for row, ratio in zip(models, ratios, strict=True):
        lines.append(_line(f"training step of {row['name']}", ratio, "torch" in row["busy"]))
    lines.append(f"| **geometric mean of these {len(models)} training steps** | **{mean:.2f}x** | |")
    for benchmark, name, text in ROWS:
        row = next(row for row in results[benchmark]["rows"] if row["name"] == name)
        eager = {peer: ratio for peer, ratio in row["ratios"].items() if peer != COMPILED and not peer.startswith(OURS)}
        best = min(eager, key=lambda peer, eager=eager: eager[peer][1])  # type: ignore[misc]
        lines.append(_line(text, eager[best], best in row["busy"]))
    where = describe(results["training"])
    return "\n".join([*lines, "", f"{where}. Training steps include clipping; against torch's fastest eager path."])


def _line(text: str, ratio: Quartiles, busy: bool) -> str:
    return f"| {text} | {times(ratio)} | {spread(ratio, busy)} |"


def needed() -> Sequence[str]:
    return ("training", "optimizers", "layers")
