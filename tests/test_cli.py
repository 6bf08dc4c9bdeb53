"""`python -m onepass`: what the commands print and write, and that a command line that cannot be obeyed leaves nothing behind."""

import errno
import importlib.util
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from onepass import _native, optim
from onepass._cli import bench, check, demo, memory, output, timing, workload
from onepass._cli.main import main

MODEL = """
import torch
def model():
    network = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2).bfloat16())
    network[0].bias.requires_grad_(False)
    return network
def sizes(): return [(3, 2), torch.Size([5]), []]
def tensors(): return [torch.zeros(7, dtype=torch.float64)]
def number(): return 3
def nothing(): return []
def empty(): return [(0, 4)]
def integers(): return [(2,), torch.zeros(3, dtype=torch.int64)]
def negative(): return [(2, -1)]
def fails(): raise ValueError("two\\nlines")
def leaves(): raise SystemExit("gone")
text = "not callable"
"""


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "model.py"
    path.write_text(MODEL)
    return path


def run(*arguments: object) -> int:
    """The exit code of a command in this process."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as error:
        return int(error.code or 0)


def process(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "onepass", *arguments], capture_output=True, text=True, check=False)


# ------------------------------------------------------------------------------------------------ report and self-test


def test_the_report_as_text() -> None:
    done = process()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("onepass ")
    assert done.stdout.endswith("\nall kernels agree with torch\n")
    assert done.stdout.count("\nok     ") == len(list(_engines())) * (len(check._OPTIMIZERS) + len(check._LAYERS))
    assert not done.stderr


def _engines() -> list[str]:
    return [*_native.isas(), *(["cuda"] if _native.has_cuda and torch.cuda.is_available() else [])]


def test_the_report_as_json() -> None:
    done = process("--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0
    assert report["ok"] is True
    assert report["environment"]["torch"] == torch.__version__
    assert {result["isa"] for result in report["self_test"] if result["device"] == "cpu"} == set(_native.isas())
    assert {result["kernel"] for result in report["self_test"]} == {*check._OPTIMIZERS, *check._LAYERS}
    for result in report["self_test"]:
        assert result["ok"] is True
        assert 0 <= result["largest_difference"]["float32"] <= 1e-5


@pytest.mark.parametrize("error", [1.0, math.nan, math.inf])
def test_a_wrong_kernel(error: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = check.Result("Adam", "cpu", "v3", {torch.float32: error})
    right = check.Result("SGD", "cpu", "v3", {torch.float32: 0.0})
    monkeypatch.setattr(check, "self_test", lambda: iter([wrong, right]))
    assert run() == 1
    assert re.search("^WRONG  Adam .*float32", capsys.readouterr().out, re.MULTILINE)
    assert run("--json") == 1
    report = json.loads(capsys.readouterr().out, parse_constant=lambda constant: pytest.fail(f"JSON has no {constant}"))
    assert report["ok"] is False
    assert [result["ok"] for result in report["self_test"]] == [False, True]
    assert report["self_test"][0]["largest_difference"]["float32"] == (1.0 if error == 1.0 else None)


# ------------------------------------------------------------------------------------------------------------ bad input

BAD = {
    "--foo": "unrecognized arguments: --foo",
    "foo": "argument COMMAND: invalid choice: 'foo' \\(choose from .*demo.*bench.*report",
    "--json bench": "--json before bench: it belongs to the report",
    "demo --quik": "unrecognized arguments: --quik",
    "demo --qui": "unrecognized arguments: --qui",
    "demo --plot {tmp}/a.doc": "argument --plot: .*/a.doc does not end in a format of matplotlib: .*png",
    "demo --plot {tmp}/no/a.png": "argument --plot: cannot write .*/no/a.png: No such file or directory",
    "bench --like": "argument --like: expected one argument",
    "bench --like resnet51": "argument --like: 'resnet51' is not resnet50, gpt2 or FILE:CALLABLE, such as",
    "bench --like {tmp}/none.py:f": "argument --like: there is no file .*/none.py",
    "bench --like {tmp}/text:f": "argument --like: .*/text does not end in .py",
    "bench --like {tmp}/broken.py:f": "argument --like: .*/broken.py cannot be imported: SyntaxError: .*line 1",
    "bench --like {tmp}/model.py:none": "argument --like: .*/model.py has no callable 'none'",
    "bench --like {tmp}/model.py:text": "argument --like: .*/model.py has no callable 'text'",
    "bench --like {tmp}/model.py:number": "returned int: expected a torch.nn.Module or a list of floating-point",
    "bench --like {tmp}/model.py:nothing": "model.py:nothing has no parameters",
    "bench --like {tmp}/model.py:empty": "model.py:empty has no parameters",
    "bench --like {tmp}/model.py:integers": "entry 1 is a tensor of torch.int64: expected",
    "bench --like {tmp}/model.py:negative": "entry 0 is \\(2, -1\\): expected",
    "bench --like {tmp}/model.py:fails": "fails\\(\\) of .*/model.py failed: ValueError: two lines",
    "bench --like {tmp}/model.py:leaves": "leaves\\(\\) of .*/model.py failed: SystemExit: gone",
    "bench --json {tmp}": "argument --json: .* is a folder: name a file",
    "bench --json {tmp}/pipe": "argument --json: .*/pipe is not a regular file: name a file",
    "bench --json {tmp}/a --html {tmp}/x/../a": "two outputs are to be written to .*/a: name two files",
    "bench --html {tmp}/{long}": "argument --html: cannot write .*: File name too long",
    "report": "the following arguments are required: RESULTS.json, --html",
    "report {tmp}/good.json": "the following arguments are required: --html",
    "report {tmp}/none.json --html {tmp}/a": "cannot read .*/none.json: No such file or directory",
    "report {tmp} --html {tmp}/a": "cannot read .*: Is a directory",
    "report {tmp}/text --html {tmp}/a": "argument RESULTS.json: .*/text is not JSON",
    "report {tmp}/bytes --html {tmp}/a": "argument RESULTS.json: .*/bytes is not JSON",
    "report {tmp}/list.json --html {tmp}/a": "is not a result of onepass's benchmarks: it names no benchmark",
    "report {tmp}/later.json --html {tmp}/a": "has format 2, this onepass reads format 1: use the onepass that wrote it",
    "report {tmp}/rows.json --html {tmp}/a": "its rows should have a name and variants",
    "report {tmp}/empty.json --html {tmp}/a": "its rows should have a name and variants",
    "report {tmp}/good.json --html {tmp}/no/a": "argument --html: cannot write .*/no/a: No such file or directory",
}


@pytest.fixture
def files(tmp_path: Path, model_file: Path) -> Path:
    """A folder with files of every kind."""
    row = {"name": "a", "variants": {"onepass": {"median_ms": 1}}}
    contents = {
        "good.json": {"benchmark": "bench", "rows": [row]},
        "later.json": {"benchmark": "bench", "format": 2, "rows": [row]},
        "list.json": [row],
        "rows.json": {"benchmark": "bench", "rows": [row, {"name": "a"}]},
        "empty.json": {"benchmark": "bench", "rows": []},
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "text").write_text("text")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "broken.py").write_text("def f(:")
    (tmp_path / "x").mkdir()
    os.mkfifo(tmp_path / "pipe")
    return tmp_path


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line(line: str, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in files.rglob("*") if path.is_file()}
    assert run(*(word.format(tmp=files, long=300 * "a") for word in line.split())) == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert re.fullmatch(f"python -m onepass[^\n]*{BAD[line]}[^\n]*\n", printed.err), printed.err
    after = {p: p.read_bytes() for p in files.rglob("*") if p.is_file() and p.parent.name != "__pycache__"}
    assert after == before


def test_bad_input_of_a_process() -> None:
    done = process("bench", "--no-such-option")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "python -m onepass: unrecognized arguments: --no-such-option (see --help)\n"


def test_no_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    assert run("bench", "--plot", tmp_path / "a.png") == 2
    assert capsys.readouterr().err == (
        "python -m onepass bench: argument --plot: needs matplotlib, which is not installed: pip install matplotlib\n"
    )


def test_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run("bench", "--device", "cuda") == 2
    assert capsys.readouterr().err == "python -m onepass bench: --device cuda: torch sees no GPU here\n"


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "_free_memory", lambda device: 2**30)
    assert run("bench", "--like", "gpt2") == 2
    assert re.fullmatch(
        r".*: GPT-2 small sgd needs \d\.\d GiB of memory, 1\.0 GiB are free: use .*\n", capsys.readouterr().err
    )


@pytest.mark.parametrize("failing", ["write_bytes", "replace"])
def test_a_disk_that_fills_up(
    failing: str, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the end of the work, when the file was writable at its beginning: the old file stays."""
    page = files / "page.html"
    page.write_text("old")
    write_bytes = Path.write_bytes

    def fail(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def write_some(path: Path, content: bytes) -> int:
        write_bytes(path, content[:10])
        return fail() if content else 0

    if failing == "replace":
        monkeypatch.setattr(os, "replace", fail)
    else:
        monkeypatch.setattr(Path, "write_bytes", write_some)
    assert run("report", files / "good.json", "--html", page) == 2
    assert capsys.readouterr().err == f"python -m onepass report: cannot write {page}: No space left on device\n"
    assert page.read_text() == "old"
    assert not list(files.glob(".*"))


def test_a_link_stays(files: Path) -> None:
    (files / "link").symlink_to(files / "page.html")
    assert run("report", files / "good.json", "--html", files / "link") == 0
    assert (files / "link").is_symlink()
    assert (files / "page.html").read_text().startswith("<!doctype html>")


def test_interrupted(monkeypatch: pytest.MonkeyPatch, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "_measure_row", interrupt)
    assert run("bench", "--json", files / "new.json") == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert not (files / "new.json").exists()


# ------------------------------------------------------------------------------------------------------------- progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((60, 20)))
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(output.progress(iter("ab"), 2, lambda item: 100 * item)) == ["a", "b"]
    shown = sys.stderr.getvalue()
    assert shown.startswith("\r\x1b[K[........................] 0/2  aaaa")
    assert shown.endswith("\r\x1b[K")
    assert all(len(line) < 60 for line in shown.split("\r\x1b[K"))
    for silent in (io.StringIO(), None):
        monkeypatch.setattr(sys, "stderr", silent)
        assert list(output.progress(iter("ab"), 2, str)) == ["a", "b"]
        assert silent is None or not silent.getvalue()


# ---------------------------------------------------------------------------------------------------------------- bench


def test_bench_on_a_users_model(model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [model_file.with_name(name) for name in ("out.json", "out.html", "out.svg")]
    outputs = [word for pair in zip(("--json", "--html", "--plot"), names, strict=True) for word in pair]
    assert run("bench", "--quick", "--like", f"{model_file}:model", *outputs) == 0
    result = json.loads(names[0].read_text())
    assert [row["rule"] for row in result["rows"]] == ["SGD", "AdamW"]
    for row in result["rows"]:
        assert (row["tensors"], row["elements"], row["dtype"]) == (3, 32 + 8 + 2, "bfloat16, float32")
        assert row["rounds"] >= 3
        assert list(row["variants"]) == ["onepass", "fused", "foreach", "loop"]
        assert all(variant["median_ms"] > 0 for variant in row["variants"].values())
        assert all(low <= median <= high for low, median, high in row["ratios"].values())
    printed = capsys.readouterr()
    assert re.search(r"^model.py:model adamw .*x  [\d.]+ to [\d.]+$", printed.out, re.MULTILINE)
    assert not printed.err
    said = [f"file: {names[0]}", f"file: {names[1]}", f"picture: {names[2]}"]
    assert printed.out.splitlines()[-3:] == said
    assert "model.py:model sgd" in names[1].read_text()
    assert "<svg" in names[2].read_text()


@pytest.mark.parametrize(("name", "tensors", "elements"), [("resnet50", 161, 25_557_032), ("gpt2", 148, 124_439_808)])
def test_known_networks(name: str, tensors: int, elements: int) -> None:
    known = workload.like(name)
    assert (len(known.tensors), known.elements) == (tensors, elements)


def test_a_users_lists(model_file: Path) -> None:
    shapes = workload.like(f"{model_file}:sizes")
    assert shapes.tensors == [((3, 2), torch.float32), ((5,), torch.float32), ((), torch.float32)]
    params = workload.like(f"{model_file}:tensors").parameters(torch.device("cpu"))
    assert [(p.shape, p.dtype, p.requires_grad) for p in params] == [((7,), torch.float64, True)]
    assert torch.equal(params[0], params[0].grad)


def test_variants_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each round starts with another one, after two rounds that are not timed."""
    calls: list[str] = []
    steps = {name: lambda name=name: calls.append(name) for name in "abc"}
    samples = timing.measure(steps, torch.device("cpu"), 0.0, min_rounds=4)
    assert "".join(calls) == "abcabc" + "abcbcacababc"
    assert [len(sample.seconds) for sample in samples.values()] == [4, 4, 4]


def test_quartiles_are_of_the_ratios_of_rounds() -> None:
    # A slow second round affects both: the ratio of the means would be 3.8.
    ours = timing.Samples([1.0, 10.0, 1.0], [False] * 3)
    assert timing.Samples([2.0, 40.0, 4.0], [False] * 3).times(ours) == ([3.0, 4.0, 4.0], True)


def test_disturbed_rounds_count_only_where_too_few_others_do() -> None:
    ours = timing.Samples([1.0] * 5, [False] * 5)
    theirs = timing.Samples([2.0, 2.0, 9.0, 9.0, 2.0], [False, False, True, True, False])
    assert theirs.times(ours) == ([2.0, 2.0, 2.0], True)
    assert theirs.median() == 2.0
    ours.disturbed[0] = True
    assert theirs.times(ours) == ([2.0, 2.0, 9.0], False)


def test_waiting_for_a_core_disturbs(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = iter([0.0, 0.0, 0.0, 60.0])
    monkeypatch.setattr(timing, "_waited", lambda: next(waited))
    samples = timing.measure({"a": lambda: None}, torch.device("cpu"), 0.0, min_rounds=2)
    assert samples["a"].disturbed == [False, True]


def test_unreliable_rows_are_marked() -> None:
    def row(name: str, low: float, high: float, busy: tuple[str, ...] = ()) -> dict[str, object]:
        times = {variant: {"median_ms": 1.0} for variant in ("onepass", "fused", "foreach", "loop")}
        ratios = {path: [low, 1.0, high] for path in ("fused", "foreach", "loop")}
        return {"name": name, "variants": times, "ratios": ratios, "busy": busy}

    rows = [row("calm", 0.9, 1.1), row("wild", 0.5, 1.5), row("busy", 0.9, 1.1, ("fused",))]
    text = bench._table({"rows": rows})
    assert re.findall(r"^(\w+) \*", text, re.MULTILINE) == ["wild", "busy"]
    assert text.endswith("\n* unreliable: other processes took a core, or the ratio varied much")
    assert "unreliable" not in bench._table({"rows": rows[:1]})


# ----------------------------------------------------------------------------------------------------------------- demo


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without scikit-learn, as in a new environment: the networks on text, with the same losses."""
    monkeypatch.setattr(demo, "digits", lambda: None)
    assert run("demo", "--quick", "--plot", tmp_path / "demo.svg") == 0
    printed = capsys.readouterr()
    row = re.search(r"^MLP .* (\d\.\d{6})  +(\d\.\d{6}) ", printed.out, re.MULTILINE)
    assert row is not None, printed.out
    assert float(row[1]) == pytest.approx(float(row[2]), abs=demo.LOSS_TOLERANCE)
    assert printed.out.count("are the same") == 2
    assert re.fullmatch(r"scikit-learn is not installed: .*left out \(pip install scikit-learn\)\n", printed.err)
    assert printed.out.endswith(f"\npicture: {tmp_path / 'demo.svg'}\n")
    assert "<svg" in (tmp_path / "demo.svg").read_text()


def test_the_digits_are_learnt() -> None:
    data = pytest.importorskip("sklearn") and demo.digits()
    images, labels = data.test()
    assert (images.shape, images.dtype, set(labels.tolist())) == ((359, 64), torch.float32, set(range(10)))
    assert len(list(data.batches(True))) == data.steps(True)


def test_demo_with_different_losses(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def two() -> list[demo.Comparison]:
        text = demo.HelpText(context=4, batch=8, last_only=True)
        torch.manual_seed(0)
        runs = []
        for make_step in (demo.sgd_torch, demo.adamw_onepass):  # two rules: they cannot agree
            network = demo.character_mlp(text.characters, text.context, width=8)
            runs.append(demo.Run(network, make_step(network)))
        return [demo.Comparison("MLP", "SGD", text, *runs)]

    monkeypatch.setattr(demo, "comparisons", two)
    assert run("demo", "--quick") == 1
    assert "MLP: losses of torch and onepass are NOT the same" in capsys.readouterr().out


@pytest.mark.parametrize(("optimizer", "rows"), [("AdamW", 9), ("SGD", 9), ("Rprop", 4), ("Lion", 9)])
def test_memory_is_what_a_step_keeps(optimizer: str, rows: int, model_file: Path, tmp_path: Path) -> None:
    shapes = [(3, 2), (5,), (), (100, 7), (64,)]
    model_file.write_text(f"def sizes(): return {shapes}")
    assert run("memory", "--like", f"{model_file}:sizes", "--optimizer", optimizer, "--json", tmp_path / "m.json") == 0
    result = json.loads((tmp_path / "m.json").read_text())
    assert len(result["rows"]) == rows
    for row in result["rows"]:
        options = {**memory._OPTIONS[row["states"]], **({"momentum": 0.9} if optimizer == "SGD" else {})}
        dtype = getattr(torch, row["parameters"])
        params = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]
        ours = getattr(optim, optimizer)(params, **options)
        for p in params:
            p.grad = torch.ones_like(p)
        ours.step()
        kept = sum(
            state.numel() * state.element_size()
            for states in ours.state.values()
            for name, state in states.items()
            if name != "step"
        )
        assert row["states_bytes"] == kept, row
        assert row["all_bytes"] == kept + 2 * result["parameters"] * dtype.itemsize


def test_memory_of_a_known_network(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("memory", "--like", "resnet50") == 0
    out = capsys.readouterr().out
    assert "ResNet-50: 25.6 million parameters, AdamW" in out
    assert "float32, 8-bit states" in out
    assert run("memory", "--optimizer", "SparseAdam") == 2
    assert run("memory", "--optimizer", "ASGD") == 0
