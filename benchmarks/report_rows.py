"""Presents the JSON of a benchmark with rows (optimizers, layers, wrappers) as text, a markdown table and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plots
from phrases import Quartiles, describe, left_out, milliseconds, spread, times

Json = Mapping[str, Any]

OURS, COMPILED, LIMIT = "onepass", "compile", "limit"
TITLES = {
    "optimizers": "An optimizer step, times faster than torch",
    "layers": "A layer, times faster than torch",
    "wrappers": "A pass of Lookahead or SAM, times faster than torch",
    "gpu": "Updates and layers on a GPU, times faster than torch",
}


@dataclass(frozen=True)
class Summary:
    """The numbers of a row: milliseconds (20th percentile) and quartiles over the rounds; None if not measured."""

    name: str
    ours: float | None
    eager: float
    eager_path: str  # the fastest that needs no compiler
    ratio: Quartiles | None  # to that
    busy: bool  # other processes took a core in the rounds of that ratio
    compiled: float | None
    compile_seconds: float | None
    compiled_ratio: Quartiles | None
    gigabytes: float | None  # per second, moved by onepass
    of_limit: Quartiles | None  # onepass's share of the measured limit
    ours_cpu: float | None  # on a GPU: time until step() returns
    eager_cpu: float | None


def summarise(row: Json) -> Summary:
    variants: Mapping[str, Json] = row["variants"]
    ratios: Mapping[str, Quartiles] = row["ratios"]
    peers = [name for name in variants if name not in (OURS, COMPILED)]
    best = min(peers, key=lambda name: ratios[name][1] if ratios else variants[name]["p20_ms"])
    ours = variants.get(OURS, {})
    compiled = variants.get(COMPILED, {})
    return Summary(
        name=row["name"],
        ours=ours.get("p20_ms"),
        eager=variants[best]["p20_ms"],
        eager_path=best,
        ratio=ratios.get(best),
        busy=best in row["busy"],
        compiled=compiled.get("p20_ms"),
        compile_seconds=row["compile"].get("seconds"),
        compiled_ratio=ratios.get(COMPILED),
        gigabytes=row["bytes_moved"] / ours["p20_ms"] * 1e-6 if ours else None,
        of_limit=row["of_limit"],
        ours_cpu=ours.get("cpu_p20_ms"),
        eager_cpu=variants[best].get("cpu_p20_ms"),
    )


def cells(summary: Summary, cuda: bool, compiled: bool) -> list[str]:
    result = [
        summary.name,
        milliseconds(summary.ours),
        f"{milliseconds(summary.eager)} ({summary.eager_path})",
        times(summary.ratio),
        spread(summary.ratio, summary.busy),
    ]
    if compiled:
        seconds = "" if summary.compile_seconds is None else f" ({summary.compile_seconds:.0f})"
        result += [milliseconds(summary.compiled) + seconds, times(summary.compiled_ratio)]
    result += [
        f"{summary.gigabytes:.0f}" if summary.gigabytes else "-",
        f"{100 * summary.of_limit[1]:.0f} %" if summary.of_limit else "-",
    ]
    if cuda:
        result += [milliseconds(summary.ours_cpu), milliseconds(summary.eager_cpu)]
    return result


def headers(cuda: bool, compiled: bool) -> list[str]:
    result = ["step", "onepass ms", "best eager ms", "ratio", "quartiles"]
    result += ["compiled ms (s to compile)", "ratio to compiled"] * compiled
    return [*result, "GB/s", "of limit"] + ["CPU ms", "eager CPU ms"] * cuda


def is_cuda(result: Json) -> bool:
    return bool(result["environment"]["device"] == "cuda")


def heading(result: Json) -> str:
    return describe(result) + "\n" + _text_line(headers(is_cuda(result), result["compile"]))


def line(row: Json, result: Json) -> str:
    """One row as text of fixed width, printed as soon as it is measured."""
    return _text_line(cells(summarise(row), is_cuda(result), result["compile"]))


def _text_line(columns: Sequence[str]) -> str:
    first, *others = columns
    return " ".join([first.ljust(44), *(column.rjust(max(9, 22 * (i in (1, 3)))) for i, column in enumerate(others))])


def tensor_costs(result: Json) -> dict[str, dict[str, float]]:
    """Microseconds per additional tiny tensor: {rule: {variant: slope between 1000 and 2000 tensors}}.

    On a GPU the time until step() returns is used, because it is what grows with the number of tensors.
    """

    def cost(variant: Json) -> float:
        return float(variant.get("cpu_p20_ms", variant["p20_ms"]))

    costs = {}
    plain = {(row["case"], row["rule"]): row for row in result["rows"] if not row["clip"] and row["dtype"] == "float32"}
    for (case, rule), few in plain.items():
        many = plain.get(("2000 x 256", rule))
        if case == "1000 x 256" and many:
            further = many["tensors"] - few["tensors"]
            costs[rule] = {
                name: 1e3 * (cost(variant) - cost(few["variants"][name])) / further
                for name, variant in many["variants"].items()
                if name in few["variants"]
            }
    return costs


def peak_memory(result: Json) -> dict[str, tuple[float, float]]:
    """Peak MB of a step beyond its states, over all rows: {variant: (first step, later steps)}."""
    peaks: dict[str, tuple[float, float]] = {}
    for row in result["rows"]:
        for name, memory in row.get("memory", {}).items():
            first, later = peaks.get(name, (0.0, 0.0))
            peaks[name] = (
                max(first, memory["first_step_extra_bytes"] * 1e-6),
                max(later, memory["step_extra_bytes"] * 1e-6),
            )
    return peaks


def footnotes(result: Json) -> str:
    """What the table does not show: cost per tensor, memory, why something is missing."""
    lines = []
    for rule, costs in tensor_costs(result).items():
        each = ", ".join(f"{name} {value:.2f}" for name, value in costs.items())
        lines.append(f"Microseconds per additional tiny tensor of {rule}: {each}.")
    peaks = peak_memory(result)
    if peaks:
        each = ", ".join(f"{name} {first:.1f} and {later:.1f}" for name, (first, later) in peaks.items())
        lines.append(
            f"Peak memory of a step beyond the states in the worst row, MB, first step and later ones: {each}."
        )
    kept = {
        row["case"]: row["kept_bytes"] for row in result["rows"] if row["rule"] == "Dropout" and "kept_bytes" in row
    }
    for case, by_variant in kept.items():
        each = ", ".join(f"{name} {bytes_ / 1e6:.2f}" for name, bytes_ in by_variant.items())
        lines.append(f"MB saved for the backward of {case}: {each}.")
    for reason, where in left_out(result["rows"]).items():
        lines.append(f"torch.compile is left out of {where}: {reason}.")
    unlimited = [row["name"] for row in result["rows"] if LIMIT in row["busy"]]
    if unlimited:
        where = ", ".join(unlimited)
        lines.append(f"The limit is left out of {where}: other processes took a core in nearly all rounds.")
    return "\n".join(lines)


def markdown(result: Json) -> str:
    """The table of a page with its footnotes."""
    cuda, compiled = is_cuda(result), result["compile"]
    columns = headers(cuda, compiled)
    table = [columns, ["---", *["---:"] * (len(columns) - 1)]]
    table += [cells(summarise(row), cuda, compiled) for row in result["rows"]]
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([describe(result) + ".", "", *lines, "", footnotes(result)])


def plot(result: Json, path: Path) -> None:
    summaries = [summarise(row) for row in result["rows"] if row["case"] != "2000 x 256"]
    series = {
        "eager": [summary.ratio for summary in summaries],
        "compiled": [summary.compiled_ratio for summary in summaries],
    }
    names = [summary.name for summary in summaries]
    plots.plot_ratios(names, series, TITLES[result["benchmark"]], describe(result), path)
