"""Presents the JSON of benchmarks as markdown tables and plots.

python benchmarks/report.py benchmarks/results/optimizers-*.json             # markdown to the terminal
python benchmarks/report.py benchmarks/results/*.json --page docs/speed.md   # into the page, with plots beside it
python benchmarks/report.py benchmarks/results/*.json --headline README.md   # the few numbers that a reader sees first
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import report_formats
import report_headline
import report_memory
import report_rows
import report_training

# A result goes between two comments of the page that name its benchmark.
BEGIN, END = "<!-- {}: begin -->", "<!-- {}: end -->"


def insert(page: str, benchmark: str, text: str) -> str:
    """The page with ``text`` between the two markers of the benchmark."""
    begin, end = BEGIN.format(benchmark), END.format(benchmark)
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"the page needs one line {begin} and, after it, one line {end}")
    between = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    return between.sub(lambda _: f"{begin}\n{text}\n{end}", page)


def load(path: Path) -> dict[str, Any]:
    result = json.loads(path.read_text())
    if not isinstance(result, dict) or not {"benchmark", "environment", "rows"} <= result.keys():
        raise ValueError("not the result of a benchmark")
    if not all("busy" in row for row in result["rows"]):
        raise ValueError("of an older form: run the benchmark again")
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, help="JSON files saved by benchmarks")
    parser.add_argument(
        "--page", type=Path, help="write the tables that the page has markers for between them, the plots beside it"
    )
    parser.add_argument(
        "--headline", type=Path, metavar="PAGE", help="write the first numbers between the page's markers"
    )
    args = parser.parse_args(argv)
    results = []
    for path in args.results:
        if path.name.startswith("gpu-variants-"):  # tune.py reads those
            continue
        try:
            results.append(load(path))
        except (OSError, ValueError) as error:
            parser.error(f"{path}: {error}")
    by_benchmark = {result["benchmark"]: result for result in results}
    try:
        if args.headline:
            missing = sorted(set(report_headline.needed()) - by_benchmark.keys())
            if missing:
                raise ValueError(f"results of {', '.join(missing)} are needed")
            text = report_headline.markdown(by_benchmark)
            args.headline.write_text(insert(args.headline.read_text(), "headline", text))
        if args.page:
            page = args.page.read_text()
            shown = {name: result for name, result in by_benchmark.items() if BEGIN.format(name) in page}
            if not shown:
                raise ValueError(
                    f"the page has no markers for {', '.join(by_benchmark)}, such as {BEGIN.format('layers')}"
                )
            for name, result in shown.items():
                page = insert(page, name, module(result).markdown(result))
            args.page.write_text(page)
            for name, result in shown.items():
                module(result).plot(result, args.page.with_name(f"{args.page.stem}-{name}.png"))
    except (OSError, ValueError) as error:
        parser.error(f"{args.headline if args.headline and not args.page else args.page}: {error}")
    if not args.page and not args.headline:
        print("\n\n".join(module(result).markdown(result) for result in results))
    return 0


def module(result: dict[str, Any]) -> Any:
    """The module that presents the result."""
    return {"training": report_training, "formats": report_formats, "memory": report_memory}.get(
        result["benchmark"], report_rows
    )


if __name__ == "__main__":
    sys.exit(main())
