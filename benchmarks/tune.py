"""Chooses the constants of csrc/cuda/tuned.hpp from what gpu_variants.py measured, and writes them there.

    python benchmarks/tune.py benchmarks/results/gpu-variants-2026-12-01-nvidia-h200.json

A value is taken if the geometric mean of its times over the rows that it concerns is at least 1 % below that of the present
value, and no such row takes more than 1 % longer; of several, the fastest. Otherwise the present value stays.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HEADER = Path(__file__).parent.parent / "csrc" / "cuda" / "tuned.hpp"
MARGIN = 0.01
UPDATES, CLIPPED, LAYERS = "updates", "clipped updates", "layers"
# The rows that a constant concerns.
CONCERNS = {
    "ONEPASS_STATE_STORE": (UPDATES, CLIPPED),
    "ONEPASS_OUTPUT_STORE": (LAYERS,),
    "ONEPASS_CHUNK_BYTES": (UPDATES, CLIPPED),
    "ONEPASS_REVERSE_AFTER_NORM": (CLIPPED,),
}
_DEFINITION = r"(?m)^(#define {} )(\d+)$"
_ORIGIN = r"(?m)^// (No GPU has chosen yet\.|Chosen on .*)$"

Values = dict[str, int]


def present(text: str) -> Values:
    """The constants of the header."""
    return {found[1].split()[1]: int(found[2]) for found in re.finditer(_DEFINITION.format(r"ONEPASS_\w+"), text)}


def chosen(result: Mapping[str, Any]) -> Values:
    """The best value of each constant."""
    values: Values = dict(result["present"])
    best = dict.fromkeys(values, 1 - MARGIN)
    for build in result["builds"]:
        for name, value in build["values"].items():
            medians = [row["ratio"][1] for row in build["rows"] if row["kind"] in CONCERNS[name]]
            if not medians or max(medians) > 1 + MARGIN:
                continue
            mean = math.exp(math.fsum(map(math.log, medians)) / len(medians))
            if mean <= best[name]:
                best[name], values[name] = mean, value
    return values


def written(text: str, values: Values, origin: str) -> str:
    """The header with these values, and who chose them."""
    for name, value in values.items():
        text = re.sub(_DEFINITION.format(name), rf"\g<1>{value}", text)
    return re.sub(_ORIGIN, f"// Chosen on {origin}, by benchmarks/tune.py.", text)


def main(argv: list[str], header: Path = HEADER) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a file of gpu_variants.py")
    args = parser.parse_args(argv)
    try:
        result = json.loads(args.results.read_text())
    except (OSError, ValueError) as error:
        parser.error(f"{args.results}: {error}")
    if result.get("benchmark") != "gpu-variants":
        parser.error(f"{args.results}: not a result of gpu_variants.py")
    text = header.read_text()
    before = present(text)
    if result["present"] != before:
        parser.error(
            f"{args.results} compares with {result['present']}, but {header.name} has {before}: run gpu_variants.py"
        )
    environment = result["environment"]
    after = chosen(result)
    header.write_text(written(text, after, f"{environment['machine']['gpu']}, {environment['date'][:10]}"))
    for name, value in after.items():
        print(f"{name}: {value}" + (f", was {before[name]}" if value != before[name] else ", as before"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
