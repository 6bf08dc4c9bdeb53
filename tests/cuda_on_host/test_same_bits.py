"""Element-wise results have the same bits from the CPU kernels and from the CUDA kernels on the host."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_on_host import backend, element_wise

DEVICE = backend.kernel_device()
if DEVICE is None or DEVICE.type != "cpu":
    pytest.skip("for the backend cuda-on-host; test_gpu.py has it for a GPU", allow_module_level=True)


def on_the_cpu() -> dict[str, str]:
    """The digests from a separate process, which loads the installed extension."""
    tests = Path(__file__).parent.parent
    env = {key: value for key, value in os.environ.items() if key != "ONEPASS_TEST_BACKEND"}
    env["PYTHONPATH"] = os.pathsep.join([str(tests), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "cuda_on_host.element_wise"]
    done = subprocess.run(command, env=env, cwd=tests, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_same_bits_as_the_cpu_kernels():
    """Every rule, case and dtype, aligned and not, many tensors, special values."""
    expected, came = on_the_cpu(), element_wise.digests(DEVICE)
    assert came.keys() == expected.keys()
    different = [case for case in expected if came[case] != expected[case]]
    assert not different, f"{len(different)} of {len(expected)} cases have other bits: {different[:5]}"
