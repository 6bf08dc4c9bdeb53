"""Every example runs in its quick mode and finds what it claims; wrong options and missing packages end with one line."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PICTURES = ("char_gpt", "digits_cnn")
PLAIN = ("ddp_resume", "fsdp2_resume", "hogwild", "hf_trainer", "lightning_module")
NEEDS = {"hf_trainer": ("transformers", "accelerate"), "lightning_module": ("lightning",)}


def run(name: str, *arguments: object, python_path: str = "") -> subprocess.CompletedProcess:
    path = os.pathsep.join(filter(None, (python_path, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})


@pytest.mark.parametrize("name", [*PICTURES, *PLAIN])
def test_example(name, tmp_path):
    for package in NEEDS.get(name, ()):
        pytest.importorskip(package)
    if name == "fsdp2_resume" and not hasattr(importlib.import_module("torch.distributed.fsdp"), "fully_shard"):
        pytest.skip("FSDP2 is public since torch 2.6")
    out = tmp_path / "picture.png"
    done = run(name, "--quick", *(["--out", out] if name in PICTURES else []))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same" in done.stdout
    assert "NOT" not in done.stdout
    assert torch.__version__ in done.stdout
    assert "step/s" not in done.stderr, "a progress bar, although this is no terminal"
    if name in PICTURES:
        assert out.read_bytes().startswith(b"\x89PNG")
        assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


def assert_refused(done: subprocess.CompletedProcess, *words: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(("--fast",), "--fast"), (("--out", "no/such/folder/a.png"), "no/such/folder"), (("--out", "a.txt"), ".png file")],
)
def test_wrong_option(arguments, word):
    assert_refused(run("digits_cnn", *arguments), word)


def test_missing_package(tmp_path):
    """A stand-in for a package that is not installed: importing it fails as it does then."""
    for name, package in (("lightning_module", "lightning"), ("digits_cnn", "tqdm")):
        error = f"raise ModuleNotFoundError('No module named {package}', name='{package}')"
        (tmp_path / f"{package}.py").write_text(error)
        assert_refused(run(name, "--quick", python_path=str(tmp_path)), f"pip install {package}")


def test_every_example_is_listed():
    page = (EXAMPLES / "README.md").read_text()
    scripts = {path.name for path in EXAMPLES.glob("*.py")} - {"helpers.py"}
    assert scripts == {f"{name}.py" for name in (*PICTURES, *PLAIN, "demo")}
    missing = [script for script in scripts if f"({script})" not in page]
    assert not missing, f"examples/README.md lacks {missing}"
