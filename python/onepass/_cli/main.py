"""Which commands there are and what they accept.

The exit code is 0 if all is well, 1 if onepass and torch disagree, 2 if the command line cannot be obeyed; then one line on
standard error says why, and no file was written.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from . import bench, check, demo, memory, report
from .output import UsageError


class _Parser(argparse.ArgumentParser):
    """argparse, with errors of one line and without abbreviated options, which a later version could make ambiguous."""

    def __init__(self, **options: object) -> None:
        super().__init__(allow_abbrev=False, **options)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        # Errors of one argument say what it may be; the others ("unrecognized arguments: --foo") do not.
        hint = "" if message.startswith("argument ") else " (see --help)"
        self.exit(2, f"{self.prog}: {' '.join(message.split())}{hint}\n")


def _parser() -> _Parser:
    parser = _Parser(prog="python -m onepass", description="Report this installation and test its kernels.")
    parser.add_argument(
        "--json", action="store_true", dest="report_json", help="print the report as one JSON object and nothing else"
    )
    parser.set_defaults(run=check.run)
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for command in (demo, bench, memory, report):
        name = command.__name__.rpartition(".")[2]
        summary = (command.__doc__ or "").splitlines()[0]
        subparser = commands.add_parser(name, help=summary, description=summary)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(arguments)
    if args.command and args.report_json:
        parser.error(f"--json before {args.command}: it belongs to the report, which is made without a command")
    try:
        code: int = args.run(args)
    except UsageError as error:
        print(f"{parser.prog} {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return code
