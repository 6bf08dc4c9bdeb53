"""Fixtures: the device, dtype and native backend of a test, and a clean process state around each test."""

import os

# torch.compile caches graphs between runs, under keys that do not change with an operator's fake implementation.
os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] = os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"

from cuda_on_host import backend

BACKEND = backend.choose()  # before anything imports onepass

import pytest  # noqa: E402
import torch  # noqa: E402
from support import DTYPES  # noqa: E402

ON_HOST = BACKEND == "cuda-on-host"
DEVICES = {BACKEND: "cpu"} if ON_HOST else {"cpu": "cpu", "cuda": "cuda"} if backend.kernel_device() else {"cpu": "cpu"}

# Tests that make no sense when the CUDA kernels run on the host, by name, and why.
NOT_ON_HOST = {
    "test_the_baseline_is_always_there": "about the CPU kernels",
    "test_same_bits_on_every_isa": "about the CPU kernels",
    "test_same_bits_for_any_thread_count": "about the CPU kernels",
    "test_same_bits_from_run_to_run": "about the CPU kernels",
    "test_dropout_has_the_same_bits_on_every_isa": "about the CPU kernels",
    "test_every_isa_is_close_to_the_baseline": "about the CPU kernels",
    "test_large": "seconds of single threads",
    "test_large_mask": "seconds of single threads",
    "test_compiled_network": "compilers see the same operators as everywhere",
    "test_inductor_calls_the_operators": "compilers see the same operators as everywhere",
    "test_aot_inductor": "the program that it compiles has none of our operators",
    "test_two_processes": "its processes load the installed extension",
    "test_one_two_and_four_processes": "its processes load the installed extension",
    "test_every_cell": "its processes load the installed extension",
    "test_four_processes": "its processes load the installed extension",
    "test_a_real_run": "its processes load the installed extension",
    "test_example": "its processes load the installed extension",
    "test_hogwild": "its processes load the installed extension",
    "test_every_combination_of_arguments": "a minute; test_every_pair_of_arguments runs",
    "test_same_bits_for_any_thread_count_and_isa": "threads and instruction sets of the CPU kernels",
    "test_states_in_other_formats": "its processes load the installed extension",
    "test_a_slow_average_follows_its_gradient": "as many launches; the bits are those of the CPU kernels, which it tests",
    "test_no_drift_in_ten_thousand_steps": "as many launches; the bits are those of the CPU kernels, which it tests",
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda_kernels: runs the CUDA kernels, on a GPU or on the host")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if params.get("device", "cpu") != "cpu":
            item.add_marker("cuda_kernels")
        if not ON_HOST:
            continue
        reason = NOT_ON_HOST.get(getattr(item, "originalname", item.name))
        if reason is None and params.get("isa", "baseline") != "baseline":
            reason = "an instruction set of the CPU kernels"
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """With ONEPASS_TEST_EVERY_KERNEL a run fails if it did not launch every kernel."""
    if ON_HOST and os.environ.get("ONEPASS_TEST_EVERY_KERNEL") and not all(backend.kernels().values()):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter) -> None:
    if not ON_HOST:
        return
    done, kernels = backend.counters(), backend.kernels()
    missed = [name for name, launched in kernels.items() if not launched]
    terminalreporter.write_line(
        f"cuda-on-host: {len(kernels) - len(missed)} of {len(kernels)} kernels, {done['launches']} launches, "
        f"{done['blocks']} blocks, {done['threads']} threads"
    )
    if os.environ.get("ONEPASS_TEST_EVERY_KERNEL"):
        terminalreporter.write("".join(f"never launched: {name}\n" for name in missed))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(DEVICES[request.param])


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def clean_process():
    """Set the seed before every test, restore the thread count after it, and enable denormals whatever ran before.

    Older torch compiles with -ffast-math: loading inductor's output makes the processor flush denormals to zero from then on.
    """
    torch.manual_seed(0)
    torch.set_flush_denormal(False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
