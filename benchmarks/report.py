"""Presents the JSON of a benchmark as text, a markdown table and a plot.

python benchmarks/report.py benchmarks/results/optimizers-*.json             # markdown to the terminal
python benchmarks/report.py benchmarks/results/*.json --page docs/speed.md   # into the page, with plots beside it
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report_training

Json = Mapping[str, Any]

# A result goes between two comments of the page that name its benchmark.
BEGIN, END = "<!-- {}: begin -->", "<!-- {}: end -->"
OURS = "onepass"
# Colour-blind safe (Okabe and Ito).
BLUE, ORANGE, GREY = "#0072b2", "#e69f00", "#999999"


@dataclass(frozen=True)
class Summary:
    """The numbers of a row: milliseconds per step (20th percentile); None if not measured."""

    name: str
    ours: float | None
    torch: float
    torch_path: str
    gigabytes: float | None  # per second, moved by onepass
    of_limit: float | None  # onepass's share of the measured limit
    torch_of_limit: float | None
    ours_cpu: float | None  # on a GPU: time until step() returns
    torch_cpu: float | None

    @property
    def ratio(self) -> float | None:
        return self.torch / self.ours if self.ours else None


def summarise(row: Json) -> Summary:
    variants: Mapping[str, Json] = row["variants"]
    peers = {name: variant["p20_ms"] for name, variant in variants.items() if name != OURS}
    best = min(peers, key=peers.__getitem__)
    ours = variants[OURS]["p20_ms"] if OURS in variants else None
    ceiling = row["limit"]["p20_ms"] if row["limit"] else None
    # torch keeps 16-bit states for 16-bit parameters: it moves fewer bytes, so this limit does not apply to it.
    same_bytes = row["dtype"] == "float32"
    return Summary(
        name=row["name"],
        ours=ours,
        torch=peers[best],
        torch_path=best,
        gigabytes=row["bytes_moved"] / ours * 1e-6 if ours else None,
        of_limit=ceiling / ours if ours and ceiling else None,
        torch_of_limit=ceiling / peers[best] if ceiling and same_bytes else None,
        ours_cpu=variants.get(OURS, {}).get("cpu_p20_ms"),
        torch_cpu=variants[best].get("cpu_p20_ms"),
    )


def cells(summary: Summary, cuda: bool) -> list[str]:
    result = [
        summary.name,
        milliseconds(summary.ours),
        f"{milliseconds(summary.torch)} ({summary.torch_path})",
        f"{summary.ratio:.2f}x" if summary.ratio else "-",
        f"{summary.gigabytes:.0f}" if summary.gigabytes else "-",
        f"{100 * summary.of_limit:.0f} %" if summary.of_limit else "-",
    ]
    if cuda:
        result += [milliseconds(summary.ours_cpu), milliseconds(summary.torch_cpu)]
    return result


def headers(cuda: bool) -> list[str]:
    return ["step", "onepass ms", "best torch ms", "ratio", "GB/s", "of limit"] + ["CPU ms", "torch CPU ms"] * cuda


def milliseconds(value: float | None) -> str:
    """Three significant digits, never an exponent."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def is_cuda(result: Json) -> bool:
    return bool(result["environment"]["device"] == "cuda")


def heading(result: Json) -> str:
    return describe(result) + "\n" + _text_line(headers(is_cuda(result)))


def line(row: Json) -> str:
    """One row as text of fixed width, printed as soon as it is measured."""
    cuda = any("cpu_p20_ms" in variant for variant in row["variants"].values())
    return _text_line(cells(summarise(row), cuda))


def _text_line(columns: Sequence[str]) -> str:
    widths = [44, 11, 18, 8, 6, 9, 8, 13]
    first, *others = (column.rjust(width) for column, width in zip(columns, widths, strict=False))
    return " ".join([columns[0].ljust(len(first)), *others])


def describe(result: Json) -> str:
    """The machine and the versions, in one line."""
    environment = result["environment"]
    machine, versions = environment["machine"], environment["versions"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['isa']}, {environment['threads']} threads"
    software = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{where}; {software}; {environment['date'][:10]}"


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
        for name, variant in row["variants"].items():
            extra = variant.get("first_step_extra_bytes"), variant.get("step_extra_bytes")
            if None not in extra:
                old = peaks.get(name, (0.0, 0.0))
                peaks[name] = max(old[0], extra[0] * 1e-6), max(old[1], extra[1] * 1e-6)
    return peaks


def _disturbed(row: Json) -> bool:
    """Whether the numbers that the table shows for a row come from disturbed samples."""
    variants: Mapping[str, Json] = row["variants"]
    shown = [row["limit"] or {}, variants.get(OURS, {}), variants[summarise(row).torch_path]]
    return any(variant.get("disturbed", False) for variant in shown)


def footnotes(result: Json) -> str:
    """What the table does not show: cost per tensor, memory, disturbed samples."""
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
    disturbed = [row["name"] for row in result["rows"] if _disturbed(row)]
    if disturbed:
        lines.append(f"Unreliable, because other processes took a core in most samples: {', '.join(disturbed)}.")
    return "\n".join(lines)


def markdown(result: Json) -> str:
    """The table of a page with its footnotes."""
    cuda = is_cuda(result)
    columns = headers(cuda)
    table = [columns, ["---", *["---:"] * (len(columns) - 1)]]
    table += [cells(summarise(row), cuda) for row in result["rows"]]
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([describe(result) + ".", "", *lines, "", footnotes(result)])


def plot(result: Json, path: Path) -> None:
    """Two panels, one bar per row: the ratio to the best torch path, and the share of the limit."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    summaries = [summarise(row) for row in result["rows"] if row["case"] != "2000 x 256"]
    names = [summary.name for summary in summaries]
    places = range(len(summaries))
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 1.6 + 0.3 * len(summaries)), sharey=True, layout="constrained", width_ratios=(3, 2)
    )
    ratios = [summary.ratio or 1.0 for summary in summaries]
    # On the logarithmic axis a bar starts at 1: to the right is faster, to the left slower.
    colours = [BLUE if ratio >= 1 else ORANGE for ratio in ratios]
    left.barh(places, [ratio - 1 for ratio in ratios], left=1, color=colours)
    left.axvline(1, color="black", linewidth=1)
    left.set_xscale("log")
    left.set_xlim(min(0.8, 0.7 * min(ratios)), max(2.0, 1.6 * max(ratios)))
    low, high = left.get_xlim()
    left.set_xticks([tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= tick <= high])
    left.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    left.minorticks_off()
    left.set_yticks(places, names)
    left.set_ylim(len(summaries) - 0.5, -0.5)
    left.set_title("Times faster than the best of the others", loc="left", fontsize=11)
    for place, ratio in zip(places, ratios, strict=True):
        shift, side = (4, "left") if ratio >= 1 else (-4, "right")
        text, where = f"{ratio:.2f}x", (ratio, place)
        left.annotate(text, where, (shift, 0), textcoords="offset points", va="center", ha=side, size=8)

    for offset, label, colour, parts in (
        (-0.2, "onepass", BLUE, [summary.of_limit for summary in summaries]),
        (0.2, "best torch", GREY, [summary.torch_of_limit for summary in summaries]),
    ):
        bars = [(place + offset, 100 * part) for place, part in zip(places, parts, strict=True) if part]
        right.barh([y for y, _ in bars], [x for _, x in bars], height=0.38, color=colour, label=label)
    right.axvline(100, color="black", linewidth=1, linestyle=":")
    right.set_title("Percent of the memory's limit", loc="left", fontsize=11)
    right.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    figure.suptitle(describe(result), fontsize=8, color="#555555", x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def insert(page: str, benchmark: str, text: str) -> str:
    """The page with ``text`` between the two markers of the benchmark."""
    begin, end = BEGIN.format(benchmark), END.format(benchmark)
    if page.count(begin) != 1 or page.count(end) != 1:
        raise SystemExit(f"the page needs one line {begin} and, after it, one line {end}")
    between = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    return between.sub(lambda _: f"{begin}\n{text}\n{end}", page)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, help="JSON files saved by benchmarks")
    parser.add_argument("--page", type=Path, help="write the tables between their markers, the plots beside the page")
    args = parser.parse_args()
    for result in (json.loads(path.read_text()) for path in args.results):
        is_training = result["benchmark"] == "training"
        text = report_training.markdown(result, describe(result)) if is_training else markdown(result)
        if not args.page:
            print(text, end="\n\n")
            continue
        args.page.write_text(insert(args.page.read_text(), result["benchmark"], text))
        picture = args.page.with_name(f"{args.page.stem}-{result['benchmark']}.png")
        if is_training:
            report_training.plot(result, describe(result), picture)
        else:
            plot(result, picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
