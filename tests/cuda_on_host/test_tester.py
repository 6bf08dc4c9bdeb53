"""Tests of the tester: correct kernels pass every check, and each seeded mistake is caught by at least one."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from host_compiler import HERE, SANITIZERS, compile_program, cuda_include, run_program, table, verdict

ORDERS = ("forward", "reverse", "random:1")
CASES = re.findall(r"^ +ONEPASS_CASE\((\w+), \w+, (\w+)\)", (HERE / "selftest.cpp").read_text(), re.MULTILINE)
CLEAN = [kernel for kernel, mutant in CASES if mutant == "none"] + ["features"]
MUTANTS = [(kernel, mutant) for kernel, mutant in CASES if mutant != "none"]
INCLUDE = cuda_include()

pytestmark = pytest.mark.skipif(INCLUDE is None, reason="CUDA's headers: neither CUDA_HOME, /usr/local/cuda nor wheels")


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> dict[str, Path]:
    """The self-test, compiled once per sanitizer; it contains every mutant."""
    folder = tmp_path_factory.mktemp("selftest")

    def build(sanitizer: str) -> Path:
        program = folder / sanitizer
        compile_program(HERE / "selftest.cpp", program, INCLUDE, SANITIZERS[sanitizer])
        return program

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(SANITIZERS, pool.map(build, SANITIZERS), strict=True))


@pytest.fixture(scope="module")
def verdicts(programs, request) -> dict[tuple[str, str], dict[str, str]]:
    """The verdicts of all checks on all cases: {(kernel, mutant): {check: verdict}}."""

    def check(job) -> tuple:
        kernel, mutant, sanitizer, order = job
        done = run_program([str(programs[sanitizer]), kernel, mutant], order)
        return (kernel, mutant), f"{sanitizer} {order.partition(':')[0]}", verdict(done)

    jobs = [(kernel, "none", sanitizer, order) for kernel in CLEAN for sanitizer in SANITIZERS for order in ORDERS]
    for kernel, mutant in MUTANTS:
        jobs += [(kernel, mutant, "plain", order) for order in ORDERS]
        jobs += [(kernel, mutant, sanitizer, "forward") for sanitizer in SANITIZERS if sanitizer != "plain"]
    found: dict[tuple[str, str], dict[str, str]] = {}
    with ThreadPoolExecutor(2) as pool:
        for case, name, said in pool.map(check, jobs):
            found.setdefault(case, {})[name] = said

    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("", *caught_by(found), sep="\n")
    return found


def caught_by(found) -> list[str]:
    """A table of the mutants and the checks' verdicts."""
    rows = [("mutant", *SANITIZERS)]
    for kernel, mutant in MUTANTS:
        cells = []
        for sanitizer in SANITIZERS:
            orders: dict[str, list[str]] = {}
            for name, said in found[kernel, mutant].items():
                if said and name.startswith(sanitizer):
                    orders.setdefault(said, []).append(name.split()[1])
            everywhere = sanitizer != "plain" or len(ORDERS) in map(len, orders.values())
            cells.append(", ".join(said if everywhere else f"{said} ({', '.join(o)})" for said, o in orders.items()))
        rows.append((f"{kernel}: {mutant}", *(cell or "-" for cell in cells)))
    return table(rows)


@pytest.mark.parametrize("kernel", CLEAN)
def test_right_kernels_pass_every_check(verdicts, kernel):
    assert verdicts[kernel, "none"] == dict.fromkeys(verdicts[kernel, "none"], "")


@pytest.mark.parametrize(("kernel", "mutant"), MUTANTS)
def test_mutant_is_caught(verdicts, kernel, mutant):
    assert any(verdicts[kernel, mutant].values()), f"no check noticed {mutant} in {kernel}"


# The check that is meant to catch a mistake; others may catch it too.
@pytest.mark.parametrize(
    ("kernel", "mutant", "check", "said"),
    [
        ("copy", "off_by_one_bound", "asan+ubsan forward", "heap overflow"),
        ("copy", "unchecked_misaligned_access", "asan+ubsan forward", "misaligned access"),
        ("copy", "misaligned_wide_access", "plain forward", "misaligned access"),
        ("row_sums", "missing_barrier", "tsan forward", "data race"),
        ("row_sums", "missing_second_barrier", "tsan forward", "data race"),
        ("row_sums", "divergent_barrier", "plain forward", "divergent barrier"),
        ("row_sums", "early_return", "plain forward", "early return"),
        ("row_sums", "shared_overrun", "plain forward", "shared overflow"),
        ("grid_sum", "missing_atomic", "tsan forward", "data race"),
        ("grid_sum", "missing_fence", "tsan forward", "data race"),
        ("histogram", "missing_global_atomic", "tsan forward", "data race"),
        ("transpose", "dynamic_shared_overrun", "asan+ubsan forward", "shared overflow"),
    ],
)
def test_the_right_check_catches_it(verdicts, kernel, mutant, check, said):
    assert verdicts[kernel, mutant][check] == said


@pytest.mark.parametrize("order", ["sideways", "forward:1", "random:", "random:x"])
def test_an_unknown_order_is_refused(programs, order):
    done = run_program([str(programs["plain"]), "copy", "none"], order)
    assert done.returncode == 1
    assert f"thread order '{order}'" in done.stdout


def test_fibers_without_assembly(tmp_path):
    """How stacks are switched on processors other than x86-64."""
    program = tmp_path / "ucontext"
    compile_program(HERE / "selftest.cpp", program, INCLUDE, ["-DONEPASS_HOST_UCONTEXT"])
    for kernel in CLEAN:
        assert not verdict(run_program([str(program), kernel, "none"], "random:2"))
