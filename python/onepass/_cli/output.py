"""What commands write: files, whole or not at all; text tables; a progress bar."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

_Item = TypeVar("_Item")


class UsageError(argparse.ArgumentTypeError):
    """The command line cannot be obeyed; the message is one line."""


class OutputFile:
    """A file to write at the end of a command. Whether it can be written is known before the work starts."""

    kind = "file"

    def __init__(self, path: str) -> None:
        self._name = path
        self.path = Path(os.path.realpath(path))  # a link stays, the file that it points to is replaced
        self._unfinished = self.path.with_name(f".{self.path.name}.{os.getpid()}.unfinished")
        if os.path.exists(self.path) and not self.path.is_file():
            kind = "a folder" if self.path.is_dir() else "not a regular file"
            raise UsageError(f"{path} is {kind}: name a file")
        self._write_beside(b"")
        self._unfinished.unlink()

    def write(self, content: bytes) -> None:
        """Replace the file by one with this content, and say so."""
        self._write_beside(content)
        try:
            os.replace(self._unfinished, self.path)
        except OSError as error:
            self._unfinished.unlink()
            raise self._refusal(error) from None
        print(f"{self.kind}: {self._name}")

    def _write_beside(self, content: bytes) -> None:
        try:
            self._unfinished.write_bytes(content)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._unfinished.unlink()
            raise self._refusal(error) from None

    def _refusal(self, error: OSError) -> UsageError:
        return UsageError(f"cannot write {self.path}: {error.strerror or error}")


class PictureFile(OutputFile):
    """A picture in a format that matplotlib writes."""

    kind = "picture"

    def __init__(self, path: str) -> None:
        if importlib.util.find_spec("matplotlib") is None:
            raise UsageError("needs matplotlib, which is not installed: pip install matplotlib")
        from matplotlib.figure import Figure

        formats = Figure().canvas.get_supported_filetypes()
        self.format = Path(path).suffix.removeprefix(".").lower()
        if self.format not in formats:
            raise UsageError(f"{path} does not end in a format of matplotlib: {', '.join(sorted(formats))}")
        super().__init__(path)


def distinct_files(*files: OutputFile | None) -> None:
    """Refuse two outputs into one file."""
    paths = [file.path for file in files if file]
    for path in paths:
        if paths.count(path) > 1:
            raise UsageError(f"two outputs are to be written to {path}: name two files")


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as their longest cell; the first is flush left, the others, numbers, flush right.

    A header may have two lines, "above\nbelow".
    """
    cells = [cell.rpartition("\n") for cell in header]
    lines: list[Sequence[str]] = [[above for above, _, _ in cells]] if any(above for above, _, _ in cells) else []
    lines.append([below for _, _, below in cells])
    body = list(rows)
    widths = [max(len(line[i]) for line in [*lines, *body]) for i in range(len(header))]
    lines += [["-" * width for width in widths], *body]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in lines
    )


def milliseconds(value: float) -> str:
    """Three significant digits, never an exponent."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:#.3g}" if value >= 1e-3 else f"{value:.5f}"


def progress(items: Iterable[_Item], total: int, text: Callable[[_Item], str]) -> Iterator[_Item]:
    """The items, with a bar on standard error if that is a terminal, and nothing otherwise."""
    if not (sys.stderr and sys.stderr.isatty()):
        yield from items
        return
    shown = 0.0
    try:
        for done, item in enumerate(items):
            if time.monotonic() - shown > 0.1:
                filled = round(24 * done / total)
                line = f"[{'#' * filled}{'.' * (24 - filled)}] {done}/{total}  {text(item)}"
                print(f"\r\033[K{line[: shutil.get_terminal_size().columns - 1]}", end="", file=sys.stderr, flush=True)
                shown = time.monotonic()
            yield item
    finally:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
