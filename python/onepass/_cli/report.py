"""Make one self-contained HTML page of a benchmark's results, to sort and filter."""

from __future__ import annotations

import argparse

from .output import OutputFile
from .results import load, page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=load, metavar="RESULTS.json", help="saved by `bench --json` or by benchmarks/")
    parser.add_argument("--html", type=OutputFile, metavar="FILE", required=True, help="the page")


def run(args: argparse.Namespace) -> int:
    args.html.write(page(args.results).encode())
    return 0
