"""The structure of the repository: what may include or import what, and that a rule is four files and one word."""

import ast
import importlib
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import onepass
import pytest
import torch
from onepass import _native
from onepass.optim._base import FusedOptimizer
from onepass.optim._interchange import fused_optimizers
from rules import RULES

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "python" / "onepass"

# Folder -> folders of csrc whose headers its files may include.
MAY_INCLUDE = {
    "core": {"core"},
    "rules": {"core"},
    "rows": {"rows", "core"},
    "cpu": {"cpu", "rows", "core"},
    "cuda": {"cuda", "rows", "core"},
}
# Only the binding may include these.
PYTHON_HEADERS = re.compile(r"pybind11|Python\.h|torch/|ATen|c10")


def native_sources() -> list[Path]:
    return sorted(path for path in CSRC.rglob("*") if path.suffix in (".hpp", ".cpp", ".cu", ".cuh"))


def rules_in_cmake(variable: str) -> set[str]:
    text = (ROOT / "CMakeLists.txt").read_text()
    found = re.search(rf"set\({variable} ([^)]*)\)", text)
    assert found is not None, f"CMakeLists.txt has no list {variable}"
    return set(found[1].split())


@pytest.mark.parametrize("path", native_sources(), ids=lambda path: str(path.relative_to(CSRC)))
def test_native_includes_go_one_way(path: Path) -> None:
    folder = path.relative_to(CSRC).parts[0]
    quoted = re.findall(r'#include "([^"]+)"', path.read_text())
    brackets = re.findall(r"#include <([^>]+)>", path.read_text())
    if folder.startswith("bind"):
        return
    wrong = [h for h in quoted + brackets if PYTHON_HEADERS.search(h)]
    wrong += [h for h in quoted if "/" in h and h.split("/")[0] not in MAY_INCLUDE[folder]]
    assert not wrong, f"{path.relative_to(ROOT)} may include {sorted(MAY_INCLUDE[folder])} only, but has {wrong}"


def test_dtypes_are_dispatched_in_one_place_per_device() -> None:
    homes = {path.relative_to(CSRC).as_posix() for path in native_sources() if "case DType::" in path.read_text()}
    assert homes == {"cpu/pack.hpp", "cuda/vector_io.cuh"}, "with_dtype() has the list; call it"


def python_sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", native_sources() + python_sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_can_be_read_in_one_sitting(path: Path) -> None:
    lines = path.read_text().count("\n")
    assert lines <= 350, f"{path.name} has {lines} lines: it holds more than one thing"


@pytest.mark.parametrize("path", sorted((CSRC / "rules").glob("*.hpp")), ids=lambda path: path.stem)
def test_rules_are_arithmetic_only(path: Path) -> None:
    brackets = re.findall(r"#include <([^>]+)>", path.read_text())
    assert not brackets, f"a rule needs core/rule.hpp and nothing else, {path.name} includes {brackets}"


def imports_of(path: Path) -> list[str]:
    """Modules and names that a file imports, those of the package without its name."""
    imported = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            imported += [node.module or "", *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
    return imported


@pytest.mark.parametrize("path", python_sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_python_imports_go_one_way(path: Path) -> None:
    """Only _native imports the extension, and it imports neither optim nor nn."""
    imported = {name.split(".")[0] for name in imports_of(path)} | {name.split(".")[-1] for name in imports_of(path)}
    wrong = {"optim", "nn"} if path.parent.name == "_native" else {"_C"}
    assert not imported & wrong, f"{path.name} imports {sorted(imported & wrong)}"


def test_only_the_command_line_imports_its_commands() -> None:
    """And nothing imports the integrations: each is a user's own import."""
    importers = {path.relative_to(PACKAGE).as_posix() for path in python_sources() if "_cli" in _parts(path)}
    assert importers == {"__main__.py"}
    assert not [path for path in python_sources() if "integrations" in _parts(path)]


def _parts(path: Path) -> set[str]:
    return {part for name in imports_of(path) for part in name.split(".")}


def test_importing_onepass_imports_neither_commands_nor_integrations() -> None:
    script = "import onepass, sys; print(*(name for name in sys.modules if name.startswith('onepass.')))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[1] for name in run.stdout.split()}
    assert {"nn", "optim"} <= loaded
    assert not loaded & {"_cli", "integrations"}


WRAPPERS = {"lookahead", "sam"}  # the passes that have a class


@pytest.mark.parametrize("rule", sorted(rules_in_cmake("ONEPASS_RULES") | WRAPPERS))
def test_every_rule_has_its_four_files(rule: str) -> None:
    files = [
        CSRC / "rules" / f"{rule}.hpp",
        PACKAGE / "optim" / f"{rule}.py",
        ROOT / "tests" / "reference" / f"{rule}.py",
        ROOT / "docs" / "rules" / f"{rule}.md",
    ]
    missing = [str(file.relative_to(ROOT)) for file in files if not file.exists()]
    assert not missing, f"the rule {rule} lacks {missing}"


def test_every_optimizer_is_exported() -> None:
    """Type checkers and editors read the import in onepass/optim/__init__.py; the message is the missing line."""
    for path in (PACKAGE / "optim").glob("[!_]*.py"):
        module = importlib.import_module(f"onepass.optim.{path.stem}")
        for name, cls in vars(module).items():
            if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls.__module__ == module.__name__:
                line = f"from .{path.stem} import {name} as {name}"
                assert getattr(onepass.optim, name, None) is cls, f"python/onepass/optim/__init__.py lacks: {line}"
                assert name in onepass.optim.__all__


@pytest.mark.parametrize(("name", "cls"), fused_optimizers().items(), ids=fused_optimizers())
def test_every_optimizer_has_a_page_and_a_reference(name: str, cls: type[FusedOptimizer]) -> None:
    page = ROOT / "docs" / "rules" / f"{inspect.getmodule(cls).__name__.rpartition('.')[2]}.md"
    text = page.read_text()
    parameters = inspect.signature(cls).parameters
    has_call = f"`onepass.optim.{name}(params" in text or f"`onepass.optim.{name}`: the same" in text
    assert has_call, f"{page.name} does not show how {name} is called"
    own = parameters.keys() - {"params", "foreach", "fused", "differentiable"}
    missing = [argument for argument in own if argument not in text]
    assert not missing, f"{page.name} lacks the arguments {missing}"
    states = {*cls([torch.zeros(1)])._all_state_names(), *cls.scalar_states}
    missing = [state for state in states if f"`{state}`" not in text]
    assert not missing, f"{page.name} lacks the states {missing}"
    for needed in ("Memory traffic of a step", "Source", f"csrc/rules/{cls.rule}.hpp"):
        assert needed in text, f"{page.name} has no {needed!r}"
    if name != "SparseAdam":  # it takes no dense gradients: tests/test_optim_sparse.py
        assert name in RULES, f"tests/reference has no Rule of {name}"


def test_the_build_has_the_listed_rules() -> None:
    assert set(_native.rules()) == rules_in_cmake("ONEPASS_RULES") | rules_in_cmake("ONEPASS_PASSES")


def test_every_optimizer_names_a_rule_of_the_build() -> None:
    assert {cls.rule for cls in fused_optimizers().values()} == rules_in_cmake("ONEPASS_RULES")
    assert rules_in_cmake("ONEPASS_PASSES") >= WRAPPERS


def test_the_rule_in_contributing_is_the_file() -> None:
    """Newcomers copy the code block."""
    blocks = re.findall(r"```cpp\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert blocks == [(CSRC / "rules" / "adadelta.hpp").read_text()]


def test_the_demo_of_a_newcomer_installs_no_tools(tmp_path: Path) -> None:
    """`make demo` in a new environment; in a developer's, it takes what is there."""

    def commands(goal: str) -> str:
        run = subprocess.run(["make", "-n", goal, f"VENV={tmp_path}"], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return run.stdout

    assert shutil.which("make") or pytest.skip("no make here")
    assert f" demo > {tmp_path}/requirements.txt" in commands("demo")
    assert f" demo bench test lint > {tmp_path}/requirements.txt" in commands("test")
    (tmp_path / ".onepass-installed").touch()
    assert f" demo bench test lint > {tmp_path}/requirements.txt" in commands("demo")
