"""docs/architecture.md names files and functions; they have to exist, or the page misleads a newcomer."""

import re
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text()
CODE = re.compile(r"`([^`]+)`")


def named_in_tables() -> list[tuple[str, str]]:
    """(file, name) of every table row: the first path in backticks, and the names in the column after it."""
    found = []
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        for path, names in pairwise(cells):
            if re.fullmatch(r"`[\w/]+\.\w+`", path):
                found += [(path.strip("`"), name) for name in CODE.findall(names)]
                break
    return found


def defines(text: str, name: str) -> bool:
    """Whether Python or C++ source defines a function, a type or a constant of this name."""
    patterns = (
        rf"\b(?:def|class|struct)\s+{name}\b",
        rf"^{name}\b.* = ",  # a Python constant
        rf"^\s*(?!return\b|throw\b)[\w:<>&*, \[\]()]*[\w>&*]\s+[&*]?(?:\w+::)*{name}\(",  # a C++ function
        rf"\b__global__ [^;{{]*\b{name}\(",
        rf"\benum class {name}\b",
        rf"\bconstexpr \w+ {name}\b",
    )
    return any(re.search(pattern, text, re.MULTILINE) for pattern in patterns)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`([\w./]+/[\w./]+\.\w+)`", PAGE))))
def test_the_files_of_the_page_exist(path: str) -> None:
    assert (ROOT / path).is_file(), f"docs/architecture.md names {path}, which does not exist"


@pytest.mark.parametrize(("path", "name"), named_in_tables())
def test_the_names_of_the_page_are_defined_there(path: str, name: str) -> None:
    assert defines((ROOT / path).read_text(), name), f"docs/architecture.md: {path} does not define {name}"


@pytest.mark.parametrize("title", ["A LayerNorm call", "An AdamW step"])
def test_a_walk_has_at_most_six_stops(title: str) -> None:
    walk = PAGE.partition(f"## {title}\n")[2].partition("\n## ")[0]
    stops = re.findall(r"^\| (\d) \| `", walk, re.MULTILINE)
    assert stops == [str(i + 1) for i in range(len(stops))]
    assert 1 < len(stops) <= 6


def test_the_tables_are_read() -> None:
    assert len(named_in_tables()) >= 30
