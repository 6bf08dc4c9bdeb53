"""The page that `python -m onepass report` and `bench --html` write: every number of a result, sorted and filtered, no network."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from onepass._cli import results
from onepass._cli.main import main

RESULTS = sorted((Path(__file__).parent.parent / "benchmarks" / "results").glob("*.json"))
TIMED = [path for path in RESULTS if path.stem.split("-")[0] not in ("formats", "memory")]  # which have no variants


class Table(HTMLParser):
    """The texts of a page's table, and every attribute that could load something."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.numbers: list[list[str | None]] = []
        self.loads: list[tuple[str, str | None]] = []
        self._in_cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [pair for pair in attrs if pair[0] in ("src", "href", "action", "data", "srcset")]
        if tag == "tr":
            self.rows.append([])
            self.numbers.append([])
        self._in_cell = tag in ("td", "th", "button")
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.numbers[-1].append(dict(attrs).get("data-number"))

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.rows[-1][-1] += data


@pytest.mark.parametrize("path", TIMED, ids=lambda path: path.stem)
def test_every_committed_result_has_a_page(path: Path, tmp_path: Path) -> None:
    assert main(["report", str(path), "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    table, rows = Table(page), json.loads(path.read_text())["rows"]
    assert not table.loads
    assert not re.search(r"https?:|//|@import|url\(", re.sub(r"^\s*// .*$", "", page, flags=re.MULTILINE))
    header, *lines = table.rows
    assert len(lines) == len(rows)
    assert {len(line) for line in lines} == {len(header)}
    assert [line[0] for line in lines] == [row.get("name", row.get("row")) for row in rows]
    column = header.index("onepass median ms")
    medians = [row["variants"].get("onepass", {}).get("median_ms") for row in rows]
    assert [None if n[column] is None else float(n[column]) for n in table.numbers[1:]] == medians


def test_columns() -> None:
    rows = [
        {"name": "a", "variants": {"onepass": {"p20_ms": 2}, "loop": {"p20_ms": 5}}, "compile": {}, "limit": None},
        {
            "row": "b",
            "variants": {"onepass": {"p20_ms": 2}},
            "ratios": {"compile": [1.0, 1.5, 2.5]},
            "compile": {"seconds": 9.5, "graphs": 1},
            "busy": ["loop", "fused"],
            "clip": False,
        },
    ]
    assert results.columns(rows) == {
        "name": ["a", "b"],
        "loop / onepass ratio": [2.5, None],
        "onepass p20 ms": [2, 2],
        "loop p20 ms": [5, None],
        "compile / onepass ratio, lower quartile": [None, 1.0],
        "compile / onepass ratio": [None, 1.5],
        "compile / onepass ratio, upper quartile": [None, 2.5],
        "compile seconds": [None, 9.5],
        "compile graphs": [None, 1],
        "busy": [None, "loop, fused"],
        "clip": [None, False],
    }


def test_names_are_escaped() -> None:
    name = "<script>alert('$name')</script>"
    page = results.page({"benchmark": name, "rows": [{"name": name, "variants": {name: {"median_ms": 1}}}]})
    assert "<script>alert" not in page
    assert Table(page).rows[1][0] == name


CLICKS = """<script>
  headers[1].firstChild.click();
  const ascending = [...body.rows].map((row) => row.cells[0].textContent).join();
  headers[1].firstChild.click();
  const descending = [...body.rows].map((row) => row.cells[0].textContent).join();
  document.getElementById("filter").value = "TWO row";
  document.getElementById("filter").dispatchEvent(new Event("input"));
  const left = rows.filter((row) => !row.hidden).map((row) => row.cells[0].textContent).join();
  document.title = [ascending, descending, left, document.getElementById("count").textContent].join(" | ");
</script>"""


def test_sort_and_filter_in_a_browser(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome") or pytest.skip("no browser here")
    values = {"row one": 9.0, "row two": 10.0, "row three": None, "row four": -1.5}
    rows = [{"name": name, "variants": {"onepass": {"median_ms": value}}} for name, value in values.items()]
    page = tmp_path / "page.html"
    page.write_text(results.page({"benchmark": "bench", "rows": rows}).replace("</html>", CLICKS + "</html>"))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, check=False)
    title = re.search("<title>(.*)</title>", done.stdout) or pytest.skip(f"the browser does not start: {done.stderr}")
    assert title[1].split(" | ") == [
        "row four,row one,row two,row three",
        "row two,row one,row four,row three",
        "row two",
        "1 of 4 rows",
    ]
