"""The documentation is true: its snippets run, its links lead somewhere, its pictures are there, the site has every page.

Every ```python block of README.md, CONTRIBUTING.md and docs/ is a test. The title, which readers see, says how it runs:

    ```python                                                in this process, after the blocks before it on the page
    ```python title="torchrun --nproc-per-node 2 ddp.py"      a script, run by this command in an empty folder
    ```python title="python hogwild.py"
    ```python title="not run: needs a GPU"                    not at all, and why

Blocks in this process begin with the names of `usual_names`; a page that uses them says so in a sentence that begins with
"In the snippets". A page defines others, or replaces these, in a comment before the block, which readers do not see:

    <!-- test
    model = torch.nn.Linear(4, 4)
    -->

A block that imports a package which is not installed here is skipped, if the package is in OPTIONAL.
"""

import ast
import importlib
import importlib.util
import inspect
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import onepass
import pytest
import torch

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
OPTIONAL = {"accelerate", "lightning", "timm", "transformers"}
OLD_TORCH = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6)  # has no public FSDP2, for example

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch's and the frameworks' own
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# ---- snippets --------------------------------------------------------------------------------------------------------


@dataclass
class Block:
    page: str
    line: int  # of its first line
    code: str
    title: str = ""

    @property
    def id(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def not_run(self) -> bool:
        return self.title.startswith("not run: ")


BLOCK = re.compile(
    r'^```python(?: title="(?P<title>[^"]*)")?\n(?P<code>.*?)^```$|^<!-- test\n(?P<setup>.*?)^-->$', re.M | re.S
)


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    blocks, setup = [], ""
    for found in BLOCK.finditer(text):
        if found["setup"] is not None:
            setup += found["setup"]
            continue
        line = text.count("\n", 0, found.start("code")) + 1
        code = found["code"]
        if setup:
            line -= setup.count("\n")
            code, setup = setup + code, ""
        blocks.append(Block(name_of(page), line, code, found["title"] or ""))
    assert text.count("```python") == len(blocks), (
        f"{name_of(page)}: a ```python block is not of a form this test reads"
    )
    return blocks


BLOCKS = {block.id: block for page in PAGES for block in blocks_of(page)}
TO_RUN = [block for block in BLOCKS.values() if not block.not_run]


def usual_names() -> dict[str, object]:
    """What every tutorial has: a small model, batches with their targets, a loss."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(16, 3)
    )
    batches = [(torch.randn(6, 8), torch.randint(3, (6,))) for _ in range(4)]
    return {
        "__name__": "docs",
        "torch": torch,
        "onepass": onepass,
        "device": "cpu",
        "model": model,
        "loader": torch.utils.data.DataLoader(batches, batch_size=None),  # any iterable will do: no loader[0]
        "loss_fn": torch.nn.functional.cross_entropy,
    }


def skip_if_not_installed(block: Block) -> None:
    for node in ast.walk(ast.parse(block.code)):
        modules = [node.module] if isinstance(node, ast.ImportFrom) else []
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else modules
        for module in modules:
            package = module.split(".")[0]
            try:
                imported = importlib.import_module(module)
                if isinstance(node, ast.ImportFrom):
                    [
                        getattr(imported, a.name, None) or importlib.import_module(f"{module}.{a.name}")
                        for a in node.names
                    ]
            except ImportError as error:
                if (package in OPTIONAL and error.name == package) or (package == "torch" and OLD_TORCH):
                    pytest.skip(f"{error}")
                raise


class Page:
    """The names that the blocks of a page have defined so far."""

    def __init__(self, name: str) -> None:
        self.names = usual_names()
        self.left = [block for block in TO_RUN if block.page == name and not block.title]

    def run_up_to(self, block: Block) -> None:
        while block in self.left:
            first = self.left.pop(0)
            try:
                skip_if_not_installed(first)
            except pytest.skip.Exception:
                if first is block:
                    raise
                continue
            code = compile("\n" * (first.line - 1) + first.code, ROOT / first.page, "exec")
            exec(code, self.names)


the_page = cache(Page)


def run_script(block: Block, folder: Path) -> None:
    program, *arguments = shlex.split(block.title)
    (folder / next(a for a in arguments if a.endswith(".py"))).write_text(block.code)
    start = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"]}
    path = os.pathsep.join([str(Path(onepass.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*start[program], *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, f"{block.id}: {block.title} failed:\n{run.stdout}\n{run.stderr}"
    assert "loss" in run.stdout, f"{block.id}: {block.title} prints no loss, so nobody sees what it did"


@pytest.mark.parametrize("block", TO_RUN, ids=lambda block: block.id)
def test_the_snippet_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if block.title:
        skip_if_not_installed(block)
        run_script(block, tmp_path)
        return
    try:
        the_page(block.page).run_up_to(block)
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def names_needed(code: str) -> set[str]:
    """The names that the code reads before it binds them."""
    bound: set[str] = set()
    needed: set[str] = set()

    def visit(node: ast.AST) -> None:
        first = node.value if isinstance(node, ast.Assign) else node.iter if isinstance(node, ast.For) else None
        if first is not None:
            visit(first)  # is evaluated before the targets are bound
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.Name):
            (bound if isinstance(node.ctx, ast.Store) or node.id in bound else needed).add(node.id)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(code))
    return needed


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_says_which_names_its_snippets_expect(page: Path) -> None:
    visible = [found["code"] for found in BLOCK.finditer(page.read_text()) if found["code"] and not found["title"]]
    expected = names_needed("\n".join(visible)) & usual_names().keys()
    said = " ".join(re.findall(r"^In the snippets?\b.*?(?=\n\n)", page.read_text(), re.M | re.S))
    missing = sorted(name for name in expected if f"`{name}`" not in said)
    assert not missing, (
        f"{name_of(page)}: its snippets use {missing}; no sentence 'In the snippets ...' says what they are"
    )


def test_few_snippets_are_not_run() -> None:
    """A reader trusts what runs; what cannot run here says why, in its title."""
    skipped = [block.id for block in BLOCKS.values() if block.not_run]
    assert len(skipped) <= len(BLOCKS) / 10, f"{len(skipped)} of {len(BLOCKS)} snippets are not run: {skipped}"
    titles = {block.title.split()[0] for block in TO_RUN if block.title}
    assert titles <= {"python", "torchrun"}, f"commands that this test does not know: {titles}"


# ---- links -----------------------------------------------------------------------------------------------------------

LINK = re.compile(r"!?\[(?:[^\]\[]|\[[^\]]*\])*\]\(([^)\s]+)\)|<img [^>]*src=\"([^\"]+)\"")
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.M | re.S)


def prose_of(page: Path) -> str:
    return CODE.sub("", page.read_text())


def links_of(page: Path) -> list[str]:
    return [target or source for target, source in LINK.findall(prose_of(page))]


@cache
def anchors_of(page: Path) -> set[str]:
    """The ids of a page's headings, as GitHub and the site make them."""
    without_code = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", without_code, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links_of(page):
        if re.match(r"[a-z]+:", link):
            continue  # another site: no network here
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name_of(page)} links to {link}, which does not exist"
        if anchor:
            assert anchor in anchors_of(target), (
                f"{name_of(page)} links to {link}, {name_of(target)} has no such heading"
            )


def test_the_pictures_of_rules_are_those_of_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/paths.py draws them with the shipped optimizers. A new rule may have one."""
    monkeypatch.syspath_prepend(DOCS)
    pictures = importlib.import_module("paths").pictures()
    assert pictures.keys() >= {path.stem for path in (DOCS / "rules").glob("*.svg")}, "a picture that the script lacks"
    for rule, text in pictures.items():
        assert f"({rule}.svg)" in (DOCS / "rules" / f"{rule}.md").read_text(), f"docs/rules/{rule}.md shows no picture"
        message = f"docs/rules/{rule}.svg is not what docs/paths.py draws: run it"
        assert (DOCS / "rules" / f"{rule}.svg").read_text() == text, message


# ---- what the pages say ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CONTRIBUTING.md"], ids=name_of)
def test_the_names_exist(page: Path) -> None:
    """onepass.optim.AdamW and the like, in prose, tables and code; X and f stand for any. CONTRIBUTING.md has an example."""
    for name in re.findall(r"(?<![\w./])onepass(?:\.(?![Xf]\b)[A-Za-z]\w*)+", page.read_text()):
        if name.startswith("onepass.integrations"):  # imported by users only, and needs the other package
            assert importlib.util.find_spec(name), f"{name_of(page)} names {name}, which does not exist"
            continue
        found = onepass
        for part in name.split(".")[1:]:
            assert hasattr(found, part), f"{name_of(page)} names {name}, which does not exist"
            found = getattr(found, part)


@pytest.mark.parametrize("name", [name for name in onepass.nn.__all__ if name != "functional"])
def test_every_layer_has_a_page(name: str) -> None:
    """With each of its own arguments, and with torch's, as the signature or `...` on the page says."""
    family = re.sub(r"[123]d$", "1d", name)
    text = "\n".join(page.read_text() for page in sorted((DOCS / "layers").glob("*.md")))
    assert re.search(rf"`(?:onepass\.nn\.)?{family}\b", text), f"docs/layers has no page with {name}"
    own = inspect.signature(getattr(onepass.nn, name)).parameters.keys() - {"args", "kwargs", "arguments", "options"}
    missing = [argument for argument in own - {"process_group"} if argument not in text]
    assert not missing, f"docs/layers lacks the arguments {missing} of {name}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "examples" / "README.md"], ids=name_of)
def test_files_that_commands_name_exist(page: Path) -> None:
    for command in re.findall(r"^```(?:bash|console)?\n(.*?)^```$", page.read_text(), re.M | re.S):
        for path in re.findall(r"(?<![\w./-])(?:benchmarks|docs|examples|tests)/[\w./*-]+", command):
            assert any(ROOT.glob(path)), f"{name_of(page)}: a command names {path}, which does not exist"


def test_pip_is_never_told_to_look_for_onepass() -> None:
    """The project owns no name on an index: what is there under that name is someone else's."""
    files = [*PAGES, *ROOT.glob("examples/**/*.*"), *ROOT.glob("python/**/*.py"), *ROOT.glob("benchmarks/*.py")]
    for path in files:
        text = path.read_text() if path.suffix in (".py", ".md") else ""
        for command in re.findall(r"pip install[^\n`]*", text):
            assert not re.search(r"(?<![\w./])onepass\b", command), f"{name_of(path)}: {command}"


def normalised(text: str) -> str:
    return " ".join(text.split())


def source_messages() -> list[str]:
    """Every text in the sources that may be a message: literals, with what is inserted left out."""
    found = []
    for path in (ROOT / "python").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) for v in node.values if isinstance(v, ast.Constant)))
    for path in (ROOT / "cmake").glob("*.cmake"):
        found += re.findall(r'FATAL_ERROR "([^)]*)"\)', re.sub(r'"\s+"', "", path.read_text()))
    for path in (ROOT / "csrc").rglob("*.?pp"):
        for literals in re.findall(r'"(?:[^"\\\n]|\\.)*"(?:\s+"(?:[^"\\\n]|\\.)*")*', path.read_text()):
            found.append(re.sub(r'"\s+"', "", literals)[1:-1])
    return [normalised(text) for text in found]


def test_troubleshooting_has_the_real_texts() -> None:
    """Every quoted message of ours is in the sources; `...` stands for what differs. Those of others are ```console."""
    page = (DOCS / "troubleshooting.md").read_text()
    quoted = re.findall(r"^```text\n(.*?)^```$", page, re.M | re.S)
    assert len(quoted) >= 10, "troubleshooting.md quotes too few messages"
    messages = source_messages()
    for message in quoted:
        text = normalised(re.sub(r"^\w+(Error|Warning): ", "", message))
        pattern = re.compile(".*?".join(re.escape(part.strip()) for part in text.split("...")))
        assert any(map(pattern.search, messages)), (
            f"troubleshooting.md quotes a message that onepass does not have: {text}"
        )
