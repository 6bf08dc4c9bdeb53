"""The compile gate passes good kernels and finds each way to break its rules."""

import re
import shutil
import subprocess

import compile_gate
import pytest
import sass
from host_compiler import CSRC, HERE

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH"),
    pytest.mark.skipif(
        not (sass.find_tool("cuobjdump") and sass.find_tool("nvdisasm")),
        reason="pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm",
    ),
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    target = tmp_path_factory.mktemp("gate") / "gate_kernels.o"
    flags = ["-std=c++17", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra", "-gencode=arch=compute_90,code=sm_90"]
    command = ["nvcc", *flags, "-I", str(CSRC), "-c", str(HERE / "gate_kernels.cu"), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


def verdicts(compiled, capsys, *options):
    code = compile_gate.main([str(compiled), *options])
    lines = capsys.readouterr().out.splitlines()
    words = {line.split("<")[0].split()[0]: line for line in lines[1:-1]}
    return code, words


def test_each_rule_is_enforced(compiled, capsys):
    code, lines = verdicts(compiled, capsys, "--narrow", "histogram")
    assert code == 1
    assert lines["copy"].endswith("ok")
    assert lines["scale_all"].endswith("ok")
    assert lines["histogram"].endswith("ok, narrow")
    assert lines["narrow"].endswith("BROKEN: sm_90: no 16-byte load; sm_90: no 16-byte store")
    assert "BROKEN: sm_90: local memory" in lines["local_array"]
    assert "BROKEN: sm_90: local memory" in lines["spills"]


def test_budgets(compiled, capsys):
    _, lines = verdicts(compiled, capsys, "--registers", "4", "--budget", "scale_all=100")
    assert re.search(r"BROKEN: .*\d+ registers", lines["narrow"])
    assert lines["scale_all"].endswith("ok")


def test_nothing_to_check_is_an_error(tmp_path, capsys):
    empty = tmp_path / "empty.o"
    subprocess.run(["g++", "-x", "c++", "-c", "-", "-o", str(empty)], input="int x;", text=True, check=True)
    assert compile_gate.main([str(empty)]) == 2
