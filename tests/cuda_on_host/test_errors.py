"""What the user reads when the CUDA runtime refuses a call: csrc/cuda/errors.hpp."""

import subprocess

import pytest
from host_compiler import compile_program, cuda_include

INCLUDE = cuda_include()
pytestmark = pytest.mark.skipif(INCLUDE is None, reason="CUDA's headers: neither CUDA_HOME, /usr/local/cuda nor wheels")

PROGRAM = """
#include "cuda/errors.hpp"
#include <cstdio>
#include <cstdlib>
int main(int, char** of) {
  const auto error = static_cast<cudaError_t>(std::atoi(of[1]));
  std::puts(onepass::cuda::error_text("row_norm", error, "the cause", {std::atoi(of[2]), std::atoi(of[3])}).c_str());
}
"""
# Numbers of cudaError_t and what their text has to name.
REMEDIES = {
    209: "ONEPASS_CUDA_ARCHS=native",  # no kernel image
    98: "ONEPASS_CUDA_ARCHS=native",  # not compiled for the GPU
    222: "newer driver",  # PTX of a newer CUDA
    35: "newer driver",
    100: "CUDA_VISIBLE_DEVICES",  # no device
    2: "torch.cuda.empty_cache()",
    700: "restart the process",  # illegal address
    716: "restart the process",  # misaligned address
    719: "restart the process",  # launch failure
    710: "restart the process",  # assert
    1: "CUDA_LAUNCH_BLOCKING=1",  # invalid value
}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("errors")
    (folder / "errors.cpp").write_text(PROGRAM)
    compile_program(folder / "errors.cpp", folder / "errors", INCLUDE, [])
    return folder / "errors"


def text_of(program, code: int, device: int, capability: int) -> str:
    command = [str(program), str(code), str(device), str(capability)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("code", REMEDIES)
def test_kernel_device_cause_and_remedy_are_named(program, code):
    text = text_of(program, code, 1, 90)
    assert text.startswith("onepass: row_norm failed on cuda:1 (sm_90): the cause. ")
    assert REMEDIES[code] in text


def test_without_a_device(program):
    assert text_of(program, 35, -1, 0).startswith("onepass: row_norm failed: the cause. ")
