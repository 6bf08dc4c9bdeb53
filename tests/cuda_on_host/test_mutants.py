"""Mistakes put into the project's own CUDA sources, one at a time; each is caught, and by the check that is there for it.

The kernels use no atomic operation yet; the mutants that miss one are in the self-test (test_tester.py).
"""

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from host_compiler import CSRC, HERE, SANITIZERS, compile_program, cuda_include, run_program, table, verdict

INCLUDE = cuda_include()
pytestmark = pytest.mark.skipif(INCLUDE is None, reason="CUDA's headers: neither CUDA_HOME, /usr/local/cuda nor wheels")


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str  # in csrc/cuda
    old: str  # stands there exactly once
    new: str
    check: str  # the sanitizer, or plain
    said: str  # see REPORTS in host_compiler.py
    order: str = "forward"


MUTANTS = [
    # reduce.cu: threads that work together
    Mutant("missing barrier", "reduce.cu", "  __syncthreads();\n", "", "tsan", "data race"),
    Mutant(
        "early return",
        "reduce.cu",
        "  total = block_total<tuning::reduce_threads>",
        "  if (int(threadIdx.x) >= n) return;\n  total = block_total<tuning::reduce_threads>",
        "plain",
        "early return",
    ),
    Mutant(
        "shared array too small",
        "reduce.cu",
        "ONEPASS_SHARED(double, of_warp, 32);",
        "ONEPASS_SHARED(double, of_warp, 8);",
        "plain",
        "shared overflow",
    ),
    Mutant(
        "every thread writes the chunk's total",
        "reduce.cu",
        "if (threadIdx.x == 0) table.partials",
        "table.partials",
        "tsan",
        "data race",
    ),
    Mutant(
        "bound off by one",
        "reduce.cu",
        "e[r] = Elements<T, w>::load(data + i + r * step, i + r * step < end)",
        "e[r] = Elements<T, w>::load(data + i + r * step)",
        "asan+ubsan",
        "heap overflow",
    ),
    Mutant(
        "overflow of squares not noticed",
        "../core/reduction.hpp",
        "sum >= smallest && sum <= most",
        "sum >= smallest",
        "plain",
        "wrong result",
    ),
    Mutant(
        "underflow of squares not noticed",
        "../core/reduction.hpp",
        "sum >= smallest && sum <= most",
        "sum <= most",
        "plain",
        "wrong result",
    ),
    Mutant(
        "alignment not tested",
        "reduce.cu",
        "is_aligned16(data) && is_aligned16(weight) ? n / w * w : 0",
        "n / w * w",
        "plain",
        "misaligned access",
    ),
    Mutant(
        "weights' alignment not tested",
        "reduce.cu",
        "is_aligned16(data) && is_aligned16(weight)",
        "is_aligned16(data)",
        "plain",
        "misaligned access",
    ),
    Mutant(
        "weights of the chunk's beginning",
        "reduce.cu",
        "static_cast<const T*>(table.weight[tensor]) + chunk.begin",
        "static_cast<const T*>(table.weight[tensor])",
        "plain",
        "wrong result",
    ),
    Mutant(
        "second launch writes over the first",
        "reduce.cu",
        "    table.partials += n_chunks;\n",
        "",
        "plain",
        "wrong result",
    ),
    Mutant(
        "table overfull",
        "reduce.cu",
        "table.n_tensors == ReduceTable::capacity || ",
        "",
        "asan+ubsan",
        "index out of bounds",
    ),
    # apply.cuh: bounds, alignment, launches
    Mutant(
        "bound off by one",
        "apply.cuh",
        "for (; i < end; i += step)",
        "for (; i <= end; i += step)",
        "asan+ubsan",
        "heap overflow",
    ),
    Mutant(
        "chunk runs into the next one",
        "vector_io.cuh",
        "chunk.size = left < chunk_size ? int(left) : chunk_size;",
        "chunk.size = int(left);",
        "plain",
        "wrong result",
    ),
    Mutant(
        "gradient's alignment not tested",
        "apply.cuh",
        "  if (is_aligned16(grad))\n",
        "  if (true)\n",
        "plain",
        "misaligned access",
    ),
    Mutant(
        "states' alignment not tested",
        "apply.cuh",
        "    aligned = aligned && is_aligned16(state[s]);\n",
        "",
        "plain",
        "misaligned access",
    ),
    Mutant(
        "wide states not stored",
        "apply.cuh",
        "s[j].template store<tuning::state_store>(state[j] + at);",
        ";",
        "plain",
        "wrong result",
    ),
    Mutant(
        "walk in reverse begins behind the end",
        "apply.cuh",
        "params.reversed ? gridDim.x - 1 - blockIdx.x",
        "params.reversed ? gridDim.x - blockIdx.x",
        "plain",
        "wrong result",
    ),
    Mutant(
        "parameters overfull",
        "apply.cuh",
        "params_.n_tensors == Params::capacity || ",
        "",
        "asan+ubsan",
        "index out of bounds",
    ),
    Mutant(
        "too many Steps",
        "apply.cuh",
        "    if (n_steps_ == tuning::max_steps) return -1;\n",
        "",
        "asan+ubsan",
        "fault",
    ),
    Mutant(
        "skipped step is made",
        "apply.cuh",
        "  if (found_inf != 0) return;\n",
        "",
        "plain",
        "wrong result",
    ),
    # prepare.cuh
    Mutant(
        "bound of the keys missing",
        "prepare.cuh",
        "  if (u >= from.n_keys) return;\n",
        "",
        "asan+ubsan",
        "heap overflow",
    ),
    Mutant(
        "second launch prepares over the first",
        "prepare.cuh",
        "(call) + first, prepared_t",
        "(call), prepared_t",
        "plain",
        "wrong result",
    ),
    Mutant(
        "skipped step is counted",
        "prepare.cuh",
        "if (!skip) *from.keys[u].device_step",
        "*from.keys[u].device_step",
        "plain",
        "wrong result",
    ),
    # vector_io.cuh
    Mutant(
        "block takes the tensor before its own",
        "vector_io.cuh",
        "first_chunk[middle] <= chunk",
        "first_chunk[middle] < chunk",
        "plain",
        "wrong result",
    ),
]


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory, request) -> dict[Mutant | str, str]:
    """What the check for each mutant said about it, and every check about the sources as they are."""
    folder = tmp_path_factory.mktemp("mutants")

    def run(number: int, mutant: Mutant | None, check: str, order: str) -> str:
        csrc = shutil.copytree(CSRC, folder / f"{number}")
        if mutant is not None:
            path = csrc / "cuda" / mutant.file
            text = path.read_text()
            if text.count(mutant.old) != 1:
                return f"{mutant.file} has {mutant.old!r} {text.count(mutant.old)} times: bring the mutant up to date"
            path.write_text(text.replace(mutant.old, mutant.new))
        program = folder / f"program{number}"
        # -w: a mutant may leave a variable unused.
        compile_program(HERE / "mutants.cpp", program, INCLUDE, [*SANITIZERS[check], "-w"], csrc)
        return verdict(run_program([str(program)], order))

    jobs = [(m, m.check, m.order) for m in MUTANTS] + [(None, check, "random:3") for check in SANITIZERS]
    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(lambda numbered: run(numbered[0], *numbered[1]), enumerate(jobs)))
    found = {mutant or check: verdict for (mutant, check, _), verdict in zip(jobs, said, strict=True)}
    rows = [("file", "mutant", "check", "said")]
    rows += [(m.file, m.name, m.check, found[m].partition("\n")[0][:80] or "-") for m in MUTANTS]
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("", *table(rows), sep="\n")
    return found


@pytest.mark.parametrize("check", SANITIZERS)
def test_the_sources_as_they_are_pass(verdicts, check):
    assert verdicts[check] == ""


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}: {mutant.name}")
def test_mutant_is_caught(verdicts, mutant):
    assert verdicts[mutant] == mutant.said
