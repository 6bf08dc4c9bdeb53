"""Fixtures: the device, the dtype and the native backend a test runs on, and a clean process state around each test."""

import os

import onepass
import pytest
import torch
from support import DTYPES

BACKENDS = ("native", "cuda-on-host")


@pytest.fixture(scope="session", autouse=True)
def backend() -> str:
    """The native code under test: the installed extension, or the CUDA sources built for the host.

    This is the only place that chooses; a test that makes no sense on a backend asks for the fixture and skips itself.
    """
    name = os.environ.get("ONEPASS_TEST_BACKEND", "native")
    assert name in BACKENDS, f"ONEPASS_TEST_BACKEND is {name!r}, expected one of {BACKENDS}"
    return name


@pytest.fixture(params=["cpu", "cuda"] if onepass.has_cuda and torch.cuda.is_available() else ["cpu"])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def clean_process():
    """The same seed before every test, the thread count as it was after it."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
