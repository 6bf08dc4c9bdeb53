"""What mkdocs does beyond its configuration: patterns in `nav`, pages made of files outside docs/, every public name."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
OUTSIDE = {"changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}  # page -> file


def on_config(config: Any) -> Any:
    config.nav = expand(config.nav)
    return config


def expand(nav: list[Any]) -> list[Any]:
    """nav with every pattern replaced by its pages, in alphabetical order: a new rule's page needs no line there.

    Sections without a page are left out.
    """
    expanded: list[Any] = []
    for entry in nav:
        if isinstance(entry, dict):
            title, target = next(iter(entry.items()))
            target = expand(target) if isinstance(target, list) else target
            expanded += [{title: target}] if target else []
        elif "*" in entry:
            expanded += sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").glob(entry))
        else:
            expanded.append(entry)
    return expanded


def on_files(files: Files, config: Any) -> Files:
    for page, source in OUTSIDE.items():
        text = (ROOT / source).read_text().replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to those files lead to their pages; `::: module.*` is replaced by a line for each public name."""
    up = "../" * page.file.src_uri.count("/")
    for target, source in OUTSIDE.items():
        markdown = markdown.replace(f"]({up}../{source}", f"]({up}{target}")
    return re.sub(
        r"^::: ([\w.]+)\.\*$",
        lambda found: "\n\n".join(f"::: {found[1]}.{name}" for name in public_names(found[1])),
        markdown,
        flags=re.MULTILINE,
    )


def public_names(module: str) -> list[str]:
    """What a module of the package imports from its private files, which is all that it exports."""
    path = ROOT / "python" / module.replace(".", "/")
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    imports = [node for node in ast.parse(source.read_text()).body if isinstance(node, ast.ImportFrom)]
    return sorted(
        alias.asname or alias.name
        for node in imports
        if node.level and node.module
        for alias in node.names
        if not alias.name.startswith("__")
    )
