"""The benchmarks measure what they say: rounds, ratios, limits, memory; their reports show it. Nothing here is a time limit."""

import copy
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
CPU = torch.device("cpu")

sys.path.append(str(BENCHMARKS))  # at the end: tests/ has a layers.py of its own
import compiled  # noqa: E402
import harness  # noqa: E402
import limit  # noqa: E402
import phrases  # noqa: E402
import report  # noqa: E402
import report_headline  # noqa: E402
import report_rows  # noqa: E402
import report_training  # noqa: E402
import training  # noqa: E402
from harness import Samples, Timed, Variant  # noqa: E402


def test_a_ratio_is_taken_within_a_round() -> None:
    """A machine that becomes slower and slower changes the times, not their ratio."""
    slower = itertools.count(1.0)
    round_ = [1.0]

    def ours() -> Timed:
        round_[0] = next(slower)
        return Timed(round_[0])

    variants = [Variant("onepass", ours), Variant("torch", lambda: Timed(3 * round_[0]))]
    samples = harness.measure(variants, CPU, seconds=0, min_rounds=9, warm_up=1)
    # Every second round begins with torch, which then sees the round before.
    first = samples["torch"].seconds[0::2], samples["onepass"].seconds[0::2]
    assert [theirs / ours for theirs, ours in zip(*first, strict=True)] == [3.0] * 5
    assert len(samples["torch"].seconds) == len(samples["onepass"].seconds) == 9


def test_each_variant_begins_as_often_as_the_others() -> None:
    order: list[str] = []
    variants = [Variant(name, lambda name=name: order.append(name)) for name in "abc"]
    harness.measure(variants, CPU, seconds=0, min_rounds=6, max_rounds=6, warm_up=0)
    assert order == list("abc" + "bca" + "cab") * 2


def test_quartiles_are_of_the_ratios() -> None:
    ours = Samples([1.0, 2.0, 1.0, 1.0, 4.0], [0.0] * 5)
    theirs = Samples([1.0, 4.0, 3.0, 4.0, 20.0], [0.0] * 5)
    assert theirs.times(ours).quartiles == [2.0, 3.0, 4.0]


def test_rounds_in_which_a_thread_waited_for_a_core_do_not_count() -> None:
    ours = Samples([1.0] * 7, [0.0] * 5 + [0.5, 0.0])
    theirs = Samples([2.0] * 5 + [90.0, 80.0], [0.0] * 6 + [60.0])
    ratio = theirs.times(ours)
    assert ratio.quiet
    assert ratio.quartiles == [2.0, 2.0, 2.0]


def test_without_quiet_rounds_the_least_disturbed_count_and_the_result_says_so() -> None:
    ours = Samples([1.0] * 7, [0.1, 0.2, 0.3, 0.4, 0.5, 0.9, 0.9])
    theirs = Samples([2.0] * 5 + [90.0, 80.0], [0.0] * 7)
    limits = Samples([0.5] * 7, [0.0] * 7)
    result = harness.results({"onepass": ours, "torch": theirs, "limit": limits})
    assert result["ratios"]["torch"] == [2.0, 2.0, 2.0]
    assert result["busy"] == ["torch", "limit"]
    assert result["of_limit"] is None


def test_the_limit_of_a_round_is_its_fastest_way() -> None:
    quiet = [0.0] * 5
    samples = {
        "onepass": Samples([1.0] * 5, quiet),
        "limit, blocks": Samples([0.5, 0.9, 0.5, 0.9, 0.5], quiet),
        "limit, around": Samples([0.9, 0.5, 0.9, 0.5, 0.9], quiet),
    }
    result = harness.results(samples)
    assert result["of_limit"] == [0.5, 0.5, 0.5]
    assert list(result["variants"]) == ["onepass"]


def test_waiting_for_a_core_is_noticed() -> None:
    """A process that wants this thread's only core makes it wait."""
    if not Path("/proc/self/schedstat").exists():
        pytest.skip("the system does not count it")
    cores = os.sched_getaffinity(0)
    core = min(cores)
    busy = f"import os, time; os.sched_setaffinity(0, {{{core}}}); print(flush=True); end = time.time() + 20\nwhile time.time() < end: pass"
    with subprocess.Popen([sys.executable, "-c", busy], stdout=subprocess.PIPE) as rival:
        try:
            assert rival.stdout is not None
            rival.stdout.readline()
            os.sched_setaffinity(0, {core})
            samples = harness.measure([Variant("onepass", lambda: sum(range(10**7)))], CPU, seconds=0, min_rounds=3)
        finally:
            os.sched_setaffinity(0, cores)
            rival.kill()
    assert max(samples["onepass"].disturbance) > harness.QUIET_SHARE


def test_peak_memory_is_exact() -> None:
    before = [torch.empty(1000, dtype=torch.uint8)]

    def run() -> None:
        before.clear()  # memory from before the run counts neither way
        first = torch.empty(3_000_000, dtype=torch.uint8)
        second = torch.empty(2_000_000, dtype=torch.uint8)
        del first
        third = torch.empty(1_500_000, dtype=torch.uint8)
        del second, third

    assert harness.peak_memory(run, CPU) == 5_000_000


def test_the_sweep_touches_each_stream_once() -> None:
    if not limit.variants([limit.NORM], 64, CPU):
        pytest.skip("no C compiler here")
    streams = limit.Streams(limit.passes(2, 2, clip=True), 100_000)
    assert streams.sweep(128, around=False).seconds > 0
    (pass_,) = streams._passes[1:]
    elements = 100_000 // limit.LINE * limit.LINE
    for i, width in enumerate((2, 2, 4, 4)):
        begin = pass_.streams[i].data - streams._memory[i].data_ptr()
        memory = streams._memory[i]
        touched = memory[begin : begin + elements * width].view(torch.int64)
        assert touched.unique().tolist() == ([0] if i == 0 else [1]), f"stream {i}"
        assert memory[begin + elements * width :].count_nonzero() == 0


def test_a_pattern_counts_updates_twice() -> None:
    adamw = limit.passes(4, 2, clip=True)
    assert [pattern.bytes_per_element for pattern in adamw] == [4, 28]
    assert limit.PERTURB.bytes_per_element == 16


def test_compilation_ends_when_nothing_new_is_compiled() -> None:
    torch.compiler.reset()
    x = torch.ones(3)
    function = torch.compile(lambda: x + 1, backend="eager")
    assert compiled.first_call(function)["seconds"] > 0
    graphs = compiled.graphs()
    function()
    assert compiled.graphs() == graphs


def test_what_compiles_in_every_call_is_left_out() -> None:
    torch.compiler.reset()
    sizes = itertools.count(1)
    function = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    assert compiled.first_call(lambda: function(torch.ones(next(sizes)))) == {"left_out": "every call compiles again"}
    assert compiled.first_call(lambda: 1 / 0) == {"left_out": "it fails with ZeroDivisionError"}


ENVIRONMENT = {
    "date": "2026-01-02T03:04:05Z",
    "device": "cpu",
    "threads": 2,
    "machine": {"cpu": "A CPU", "cores": 2, "isa": "AVX2"},
    "versions": {"torch": "2.13.0"},
}


def row(name: str, **other: object) -> dict[str, object]:
    return {
        "case": name,
        "name": name,
        "rule": "SGD",
        "dtype": "float32",
        "clip": False,
        "tensors": 1,
        "elements": 1000,
        "bytes_moved": 20_000_000,
        "rounds": 9,
        "variants": {n: {"p20_ms": ms, "median_ms": ms} for n, ms in (("onepass", 2.0), ("fused", 2.2), ("loop", 3.0))},
        "ratios": {"fused": [0.98, 1.1, 1.2], "loop": [1.4, 1.5, 1.6]},
        "busy": [],
        "of_limit": [0.8, 0.9, 1.0],
        "compile": {"left_out": "it is slow"},
        **other,
    }


def made_up() -> dict[str, object]:
    second = row("b", busy=["fused", "limit"], of_limit=None, compile={"seconds": 33.4})
    second["variants"]["compile"] = {"p20_ms": 5.0, "median_ms": 5.0}  # type: ignore[index]
    second["ratios"] = {"fused": [1.05, 1.1, 1.2], "loop": [1.4, 1.5, 1.6], "compile": [2.4, 2.5, 2.6]}
    return {"benchmark": "optimizers", "environment": ENVIRONMENT, "compile": True, "rows": [row("a"), second]}


def test_the_table_shows_ratios_quartiles_and_why_something_is_missing() -> None:
    text = report_rows.markdown(made_up())
    assert "| a | 2.00 | 2.20 (fused) | 1.10x | 0.98 to 1.20, straddles 1 | - | - | 10 | 90 % |" in text
    assert "| b | 2.00 | 2.20 (fused) | 1.10x | 1.05 to 1.20, busy machine | 5.00 (33) | 2.50x | 10 | - |" in text
    assert "torch.compile is left out of a: it is slow." in text
    assert "The limit is left out of b:" in text


def test_without_onepass_the_table_shows_torch_alone() -> None:
    alone = row("a", ratios={}, of_limit=None)
    del alone["variants"]["onepass"]  # type: ignore[attr-defined]
    text = report_rows.markdown({**made_up(), "rows": [alone]})
    assert "| a | - | 2.20 (fused) | - | - | - | - | - | - |" in text


def test_the_page_is_written_between_its_markers(tmp_path: Path) -> None:
    page, result = tmp_path / "speed.md", tmp_path / "result.json"
    result.write_text(json.dumps(made_up()))
    begin, end = (marker.format("optimizers") for marker in (report.BEGIN, report.END))
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    assert report.main([str(result), "--page", str(page)]) == 0
    text = page.read_text()
    assert text.startswith(f"before\n{begin}\nA CPU")
    assert text.endswith(f"\n{end}\nafter\n")
    assert "old" not in text
    assert (tmp_path / "speed-optimizers.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("case", ["no markers", "no file", "older form", "not json"])
def test_bad_results_change_nothing(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, result = tmp_path / "speed.md", tmp_path / "result.json"
    contents = copy.deepcopy(made_up())
    if case == "older form":
        del contents["rows"][0]["busy"]  # type: ignore[index]
    if case != "no file":
        result.write_text("{" if case == "not json" else json.dumps(contents))
    begin, end = (marker.format("optimizers") for marker in (report.BEGIN, report.END))
    page.write_text("nothing" if case == "no markers" else f"{begin}\n{end}")
    before = page.read_text()
    with pytest.raises(SystemExit) as error:
        report.main([str(result), "--page", str(page)])
    assert error.value.code == 2
    assert str(page if case == "no markers" else result) in capsys.readouterr().err
    assert page.read_text() == before
    assert not list(tmp_path.glob("*.png"))


def test_whole_steps_of_a_model() -> None:
    def make() -> torch.nn.Module:
        layers = [torch.nn.Linear(64, 64), torch.nn.LayerNorm(64), torch.nn.Dropout(0.1), torch.nn.Linear(64, 8)]
        return torch.nn.Sequential(torch.nn.Flatten(), *layers)

    model = training.Model("torch", make, batch=(16, 1, 8, 8))
    measured = training.measure("small", model, CPU, 0.0, "--no-compile")
    variants = measured["variants"]
    assert list(measured["ratios"]) == ["torch"]
    parameters = sum(parameter.nbytes for parameter in make().parameters())
    for numbers in variants.values():  # a step allocates at least the gradients
        assert numbers["peak_bytes"] >= parameters
        assert 0 < numbers["outside_ms"] <= numbers["median_ms"]
    result = {"benchmark": "training", "environment": ENVIRONMENT, "rows": [measured]}
    text = report_training.markdown(result)
    assert f"{variants['torch']['peak_bytes'] * 1e-6:.0f} / {variants['onepass']['peak_bytes'] * 1e-6:.0f}" in text
    assert "torch.compile is left out of all rows: --no-compile." in text


def benchmark(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{name}.py"), *arguments], capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(
    ("name", "only", "peers"),
    [
        ("optimizers", "25 x 160k adamw$", ["fused", "foreach", "loop"]),
        ("layers", "dropout_add", ["onepass, three calls", "torch"]),
        ("wrappers", "1000 x 256 sam perturb", ["foreach"]),
    ],
)
def test_a_real_run(name: str, only: str, peers: list[str], tmp_path: Path) -> None:
    options = [] if name == "wrappers" else ["--no-compile"]
    run = benchmark(name, "--quick", *options, "--filter", only, "--out", str(tmp_path))
    assert run.returncode == 0, run.stderr
    (saved,) = tmp_path.glob("*.json")
    for measured in json.loads(saved.read_text())["rows"]:
        assert sorted(measured["ratios"]) == sorted(peers)
        assert measured["rounds"] >= 3
        for low, median, high in measured["ratios"].values():
            assert 0 < low <= median <= high
    assert saved.with_suffix(".png").exists()


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        (["--filter", "no such row"], "no row matches", 1),
        (["--filter", "("], "--filter '(': not a regular expression", 2),
        (["--device", "tpu"], "argument --device", 2),
    ],
)
def test_bad_arguments_of_a_benchmark(options: list[str], message: str, code: int, tmp_path: Path) -> None:
    run = benchmark("optimizers", *options, "--out", str(tmp_path))
    assert run.returncode == code
    assert message in run.stderr
    assert not list(tmp_path.iterdir())


def test_formats_run(tmp_path: Path) -> None:
    run = benchmark("formats", "--quick", "--out", str(tmp_path))
    assert run.returncode == 0, run.stderr
    (saved,) = tmp_path.glob("*.json")
    rows = json.loads(saved.read_text())["rows"]
    bytes_of_states = {(row["dtype"], row["name"]): row["bytes"] for row in rows if row["kind"] == "step"}
    assert bytes_of_states["float32", "float32 states"] == 8
    assert bytes_of_states["float32", "bfloat16 states"] == 4
    assert bytes_of_states["float32", "8-bit states"] < 2.2
    assert 4.1 < bytes_of_states["bfloat16", "8-bit states, 32-bit master"] < 4.2
    assert all(len(row["loss"]) == 2 for row in rows if row["kind"] == "loss")


def test_memory_runs(tmp_path: Path) -> None:
    run = benchmark("memory", "--quick", "--out", str(tmp_path))
    assert run.returncode == 0, run.stderr
    (saved,) = tmp_path.glob("*.json")
    peaks = {row["name"]: row["peak_bytes"] for row in json.loads(saved.read_text())["rows"]}
    assert peaks["8-bit states, inside backward"] < peaks["updates inside backward"] <= peaks["onepass"]
    assert peaks["bfloat16 weights, 32-bit master, 8-bit states"] < 0.7 * peaks["onepass"]


def test_the_headline_is_written_from_all_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def result(benchmark: str, names: list[str], peer: str) -> Path:
        rows = [row(name, ratios={peer: [1.1, 1.2, 1.3]}) for name in names]
        for made in rows:
            made["variants"][peer] = {"p20_ms": 2.2, "median_ms": 2.2}  # type: ignore[index]
            made["variants"] = {name: made["variants"][name] for name in ("onepass", peer)}  # type: ignore[index]
        path = tmp_path / f"{benchmark}.json"
        path.write_text(json.dumps({"benchmark": benchmark, "environment": ENVIRONMENT, "compile": True, "rows": rows}))
        return path

    names = {
        b: [name for benchmark, name, _ in report_headline.ROWS if benchmark == b] for b in ("optimizers", "layers")
    }
    paths = [result("training", ["BERT"], "torch"), result("optimizers", names["optimizers"], "fused")]
    readme = tmp_path / "README.md"
    readme.write_text("<!-- headline: begin -->\n<!-- headline: end -->\n")
    with pytest.raises(SystemExit):
        report.main([*map(str, paths), "--headline", str(readme)])
    assert "results of layers are needed" in capsys.readouterr().err
    paths.append(result("layers", names["layers"], "torch"))
    assert report.main([*map(str, paths), "--headline", str(readme)]) == 0
    assert "| training step of BERT | 1.20x | 1.10 to 1.30 |" in readme.read_text()
    assert "geometric mean of these 1 training steps** | **1.20x**" in readme.read_text()


def test_a_quartile_beside_one_shows_its_side() -> None:
    assert phrases.spread([1.004, 1.03, 1.0549], busy=False) == "1.004 to 1.055"
    assert phrases.spread([0.9962, 1.03, 1.05], busy=False) == "0.996 to 1.050, straddles 1"
    assert phrases.spread([1.01, 1.03, 1.05], busy=True) == "1.01 to 1.05, busy machine"
