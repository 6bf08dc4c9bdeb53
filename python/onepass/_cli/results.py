"""Results of benchmarks: which files are results, their rows as columns, and the page that shows them.

A result is `{"benchmark": ..., "environment": {...}, "rows": [...]}`; a row has a name and `variants`: the numbers of
onepass and of each peer. Whatever else a row has becomes a column, too, so that a benchmark may add numbers.
"""

from __future__ import annotations

import html
import json
import math
import string
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from .output import UsageError

Json = Mapping[str, Any]
OURS = "onepass"
FORMAT = 1  # of the file; results without one are as old as the first
_QUARTILES = ("lower quartile", "median", "upper quartile")
# Columns that are shown first. The page has a box to show all.
_MAIN = ("median ms", "p20 ms", "ratio")


def load(path: str) -> Json:
    """The result in a file; a UsageError if it is something else."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON: {error}") from None
    if not isinstance(result, dict) or not isinstance(result.get("benchmark"), str):
        raise UsageError(f"{path} is not a result of onepass's benchmarks: it names no benchmark")
    if result.get("format", FORMAT) != FORMAT:
        raise UsageError(
            f"{path} has format {result['format']}, this onepass reads format {FORMAT}: use the onepass that wrote it"
        )
    rows = result.get("rows")
    if not isinstance(rows, list) or not rows or not all(_is_row(row) for row in rows):
        raise UsageError(f"{path} is not a result that can be shown: its rows should have a name and variants")
    return result


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("variants"), dict):
        return False
    return name_of(row) is not None and all(isinstance(variant, dict) for variant in row["variants"].values())


def name_of(row: Json) -> str | None:
    name = row.get("name", row.get("row"))
    return name if isinstance(name, str) else None


def best_peer(row: Json) -> str:
    """The fastest variant beside onepass."""
    peers: list[str] = [name for name in row["variants"] if name != OURS]
    return min(peers, key=lambda name: float(row["variants"][name]["median_ms"]))


def columns(rows: list[Json]) -> dict[str, list[Any]]:
    """The rows as columns by title, in order of appearance; None where a row lacks the value."""
    cells = [dict(_cells(row)) for row in rows]
    titles = dict.fromkeys(title for row in cells for title in row)
    return {title: [row.get(title) for row in cells] for title in titles}


def _cells(row: Json) -> Iterator[tuple[str, Any]]:
    yield "name", name_of(row)
    ratios = row["ratios"] if isinstance(row.get("ratios"), dict) else _ratios_of_times(row)
    for peer, ratio in ratios.items():
        yield from _flat(f"{peer} / {OURS} ratio", ratio)
    for variant, numbers in row["variants"].items():
        yield from _flat(variant, numbers)
    for key, value in row.items():
        if key not in ("name", "row", "ratios", "variants"):
            yield from _flat(key, value)


def _ratios_of_times(row: Json) -> Json:
    """For a benchmark that saved times only: those of the others divided by ours."""
    ours = row["variants"].get(OURS, {}).get("p20_ms")
    if not _is_number(ours) or not ours:
        return {}
    times = {name: variant.get("p20_ms") for name, variant in row["variants"].items() if name != OURS}
    return {name: time / ours for name, time in times.items() if _is_number(time)}


def _flat(title: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A value as one cell or, if it has parts, as several. Three numbers are quartiles."""
    title = title.replace("_", " ")
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _flat(f"{title} {key}", part)
    elif isinstance(value, list) and len(value) == 3 and all(map(_is_number, value)):
        for name, part in zip(_QUARTILES, value, strict=True):
            yield title if name == "median" else f"{title}, {name}", part
    elif isinstance(value, list):
        yield title, ", ".join(map(str, value))
    elif value is not None:
        yield title, value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def page(result: Json) -> str:
    """One HTML page with the table, which needs nothing else: no network, no other file."""
    table = columns(result["rows"])
    details = {title for title in table if title != "name" and not title.endswith(_MAIN)}
    head = "".join(
        f'<th{_class(title in details)}><button type="button">{html.escape(title)}</button></th>' for title in table
    )
    body = []
    for i in range(len(result["rows"])):
        cells = (_cell(values[i], title in details) for title, values in table.items())
        body.append(f"<tr>{''.join(cells)}</tr>")
    template = string.Template((resources.files(__package__) / "page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=html.escape(f"onepass: {result['benchmark']}"),
        description=html.escape(describe(result)),
        config=html.escape(str((result.get("environment") or {}).get("onepass_config") or "")),
        head=head,
        body="\n".join(body),
    )


def _class(detail: bool) -> str:
    return ' class="detail"' if detail else ""


def _cell(value: Any, detail: bool) -> str:
    """A number keeps all its digits for sorting and shows four."""
    if _is_number(value):
        text = f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        return f'<td{_class(detail)} data-number="{value}">{text}</td>'
    return f"<td{_class(detail)}>{html.escape('' if value is None else str(value))}</td>"


def describe(result: Json) -> str:
    """The machine, the versions and the date, in one line; as much as the file says."""
    environment = result.get("environment") or {}
    machine = environment.get("machine") or {}
    threads = environment.get("threads")
    where = [machine.get("gpu") or machine.get("cpu"), machine.get("isa"), f"{threads} threads" if threads else None]
    versions = [f"{name} {version}" for name, version in (environment.get("versions") or {}).items()]
    parts = [", ".join(filter(None, where)), ", ".join(versions), str(environment.get("date", ""))[:10]]
    return "; ".join(filter(None, parts))
