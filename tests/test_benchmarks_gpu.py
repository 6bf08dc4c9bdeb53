"""What `make gpu` runs, as far as it can be tried without a GPU: rows, bytes, the choice of constants, what is printed."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
# tests/ has a layers.py of its own: the benchmarks' one is found for these imports only.
tests_layers = sys.modules.pop("layers", None)
sys.path.insert(0, str(BENCHMARKS))
import gpu  # noqa: E402
import gpu_variants  # noqa: E402
import optimizers  # noqa: E402
import tune  # noqa: E402
from optimizers import Row  # noqa: E402

sys.path.remove(str(BENCHMARKS))
layers = sys.modules.pop("layers")
if tests_layers is not None:
    sys.modules["layers"] = tests_layers

HEADER = tune.HEADER.read_text()
PRESENT = tune.present(HEADER)


# ---- the rows


@pytest.mark.parametrize("quick", [False, True])
def test_rows_have_names_of_their_own(quick):
    names = [job.name for job in gpu.jobs(quick)]
    assert len(names) == len(set(names)) >= (6 if quick else 80)


def test_the_rows_are_what_people_have():
    names = " ".join(job.name for job in gpu.jobs(False))
    for part in ("1 x 25M adamw bf16", "1000 x 256 adamw", "LayerNorm 8192x4096 bf16 backward", "8194x4095", "fp16"):
        assert part in names
    for channels, width in gpu.STAGES:
        assert f"128x{channels}x{width}x{width} bf16" in names
    for rule in optimizers.RULES:
        assert rule.lower() in names


@pytest.mark.parametrize(
    ("row", "bytes_per_element"),
    [
        (Row("", [(10,)], "AdamW"), 28),  # gradient 4, parameter and two states 8 each
        (Row("", [(10,)], "AdamW", clip=True), 32),
        (Row("", [(10,)], "AdamW", torch.bfloat16), 22),
        (Row("", [(10,)], "AdamW", format="8-bit states"), 16),
        (Row("", [(10,)], "AdamW", format="bfloat16 states"), 20),
        (Row("", [(10,)], "AdamW", torch.bfloat16, format="8-bit states, 32-bit master"), 14),
        (Row("", [(10,)], "AdamW", torch.float16), 22),
        (Row("", [(10,)], "SGD"), 20),
    ],
)
def test_bytes_of_a_step(row, bytes_per_element):
    assert row.bytes_moved == 10 * bytes_per_element


@pytest.mark.parametrize("key", optimizers.FORMATS)
def test_formats_are_options_of_the_optimizer(key):
    """On the CPU, with few elements: the row's step runs, and its states are in that format."""
    row = Row("", [(100,)], "AdamW", torch.bfloat16, format=key)
    params = optimizers.make_params(row, torch.device("cpu"))
    optimizer, step = optimizers.make_optimizer(row, "onepass", params)
    step()
    states = optimizer.state[params[0]]
    assert ("exp_avg_codes" in states) == ("8-bit" in key)
    assert ("param_remainder" in states) == ("master" in key)


def test_the_limit_of_batch_norm_on_a_gpu_reads_twice():
    case = layers.batch_norm_case((8, 4, 7, 7), False, torch.bfloat16)
    assert case.reads_twice_on_gpu
    assert not layers.norm_case(8, 8, torch.bfloat16, False).reads_twice_on_gpu
    assert case.operands(torch.device("cpu"))[0].dtype == torch.bfloat16


def test_summary_lists_what_is_slow():
    def row(name, share, ratio, **more):
        return {"name": name, "of_limit": [share] * 3, "ratios": {"fused": [ratio] * 3}, **more}

    text = gpu.summary(
        {
            "rows": [
                row("fast", 0.95, 1.2),
                row("slow", 0.5, 0.8, kernels={"onepass": 2, "fused": 12}),
                row("even", 0.9, 1),
            ]
        }
    )
    assert "Under 90 % of the copy, 1 of 3 rows:\n  slow: 50 %" in text
    assert "Slower than torch, 1:\n  slow: 1.25 times the time of fused" in text
    assert "Kernels of a step, slow: onepass 2, fused 12." in text


# ---- command lines


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", [["gpu.py"], ["gpu_variants.py", "nowhere"]])
def test_without_a_gpu(command):
    done = run(command)
    assert done.returncode == 2
    assert "torch sees no GPU here" in done.stderr


def test_list_needs_no_gpu():
    done = run(["gpu.py", "--list"])
    assert done.returncode == 0
    assert "1 x 25M adamw\n" in done.stdout


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    script, *options = command
    full = [sys.executable, str(BENCHMARKS / script), *options]
    return subprocess.run(full, capture_output=True, text=True, check=False)


def quick_run(rows: str, folder: Path) -> int:
    """The exit status of the rows whose names match, few runs of each, on the CPU."""
    options = ["--device", "cpu", "--quick", "--no-compile", "--seconds", "0"]
    return gpu.main([*options, "--filter", rows, "--out", str(folder)])


def test_quick_rows_run_on_the_cpu(tmp_path, capsys):
    """The rows, but for the GPU: every step and layer works, and the file can be read."""
    assert quick_run("1M|LayerNorm", tmp_path) == 0
    (path,) = tmp_path.glob("gpu-quick-*.json")
    rows = json.loads(path.read_text())["rows"]
    assert {"1 x 1M adamw", "clip_grad_norm_ of 1M bf16"} <= {row["name"] for row in rows}
    assert "Slower than torch" in capsys.readouterr().out


def test_a_row_that_fails_is_left_out(monkeypatch, tmp_path, capsys):
    def fail(*_):
        raise RuntimeError("out of something")

    monkeypatch.setattr(gpu, "measure_norm", fail)
    assert quick_run("1M.*bf16", tmp_path) == 1
    output = capsys.readouterr()
    assert "clip_grad_norm_ of 1M bf16: failed, RuntimeError: out of something" in output.err
    assert "1 x 1M adamw bf16" in output.out


# ---- the constants


def times(*ratios_of_builds: float) -> dict[str, list[list[float]]]:
    """Seconds of one row of each kind: the present values take 1."""
    each = [[1.0] * 5, *([ratio] * 5 for ratio in ratios_of_builds)]
    return {"update": each, "clipped": each, "layer": each}


KINDS = {"update": tune.UPDATES, "clipped": tune.CLIPPED, "layer": tune.LAYERS}


def test_every_constant_is_tried_and_every_kind_of_row_is_there():
    tried = {name for values in gpu_variants.BUILDS for name in values}
    assert tried == set(PRESENT) == set(tune.CONCERNS)
    assert {kind for kind, _ in gpu_variants.rows().values()} == set(KINDS.values())
    for values in gpu_variants.BUILDS:
        kinds = [kind for name in values for kind in tune.CONCERNS[name]]
        assert len(kinds) == len(set(kinds)), f"{values} changes two constants of the same rows"
        assert all(PRESENT[name] != value for name, value in values.items())


def test_the_fastest_value_is_chosen():
    builds = [{"ONEPASS_CHUNK_BYTES": 65536}, {"ONEPASS_CHUNK_BYTES": 262144}, {"ONEPASS_STATE_STORE": 1}]
    result = gpu_variants.results(builds, times(0.97, 0.95, 0.995), KINDS)
    chosen = tune.chosen(result)
    assert chosen == {**PRESENT, "ONEPASS_CHUNK_BYTES": 262144}, "0.995 is within the noise"


def test_a_value_that_slows_one_row_down_is_not_chosen():
    seconds = times(0.9)
    seconds["clipped"] = [[1.0] * 5, [1.02] * 5]
    assert tune.chosen(gpu_variants.results([{"ONEPASS_STATE_STORE": 1}], seconds, KINDS)) == PRESENT


def test_rows_that_a_constant_does_not_concern_do_not_count():
    seconds = times(0.9)
    seconds["update"] = [[1.0] * 5, [2.0] * 5]
    result = gpu_variants.results([{"ONEPASS_OUTPUT_STORE": 1}], seconds, KINDS)
    assert tune.chosen(result) == {**PRESENT, "ONEPASS_OUTPUT_STORE": 1}


def saved(folder: Path, **more) -> Path:
    result = gpu_variants.results([{"ONEPASS_STATE_STORE": 1}], times(0.9), KINDS)
    result["environment"] = {"date": "2030-01-02T03:04:05Z", "machine": {"gpu": "NVIDIA Example"}}
    path = folder / "results.json"
    path.write_text(json.dumps({**result, **more}))
    return path


def test_the_header_is_rewritten_once(tmp_path, capsys):
    header = tmp_path / "tuned.hpp"
    header.write_text(HEADER)
    path = saved(tmp_path)
    assert tune.main([str(path)], header) == 0
    text = header.read_text()
    assert tune.present(text) == {**PRESENT, "ONEPASS_STATE_STORE": 1}
    assert "// Chosen on NVIDIA Example, 2030-01-02, by benchmarks/tune.py.\n" in text
    assert "No GPU has chosen" not in text
    assert re.sub(r"Chosen on .*|No GPU.*", "", text) == re.sub(
        r"Chosen on .*|No GPU.*", "", HEADER.replace("STATE_STORE 0", "STATE_STORE 1")
    )
    assert "ONEPASS_STATE_STORE: 1, was 0" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:  # these results compare with other values than the header has now
        tune.main([str(path)], header)
    assert stopped.value.code == 2
    assert header.read_text() == text


@pytest.mark.parametrize("more", [{"benchmark": "optimizers"}, {"present": {"ONEPASS_STATE_STORE": 7}}])
def test_results_of_something_else_are_refused(tmp_path, more):
    header = tmp_path / "tuned.hpp"
    header.write_text(HEADER)
    with pytest.raises(SystemExit) as stopped:
        tune.main([str(saved(tmp_path, **more))], header)
    assert stopped.value.code == 2
    assert header.read_text() == HEADER


class Steady:
    """In place of gpu_variants.Worker: every row takes the same time; `ends_after` rows the process ends."""

    def __init__(self, seconds: float, ends_after: int = 10**6) -> None:
        self.time, self.left = seconds, ends_after

    def seconds(self, row: str) -> float:
        self.left -= 1
        return self.time if self.left >= 0 else float(json.loads(""))


def test_rounds_interleave_and_what_was_measured_is_kept():
    workers = [Steady(1.0), Steady(2.0, ends_after=gpu_variants.ROUNDS)]
    found = gpu_variants.measure(workers, ["first", "second"], 1000)
    assert found == {"first": [[1.0] * gpu_variants.ROUNDS, [2.0] * gpu_variants.ROUNDS]}
    assert gpu_variants.measure([Steady(1.0)], ["first"], -1) == {}


def test_table_of_variants():
    result = gpu_variants.results([{"ONEPASS_STATE_STORE": 1}, {"ONEPASS_CHUNK_BYTES": 65536}], times(0.9, 1.1), KINDS)
    lines = gpu_variants.text_of(result).splitlines()
    assert "build 1: STATE_STORE=1" in lines[1]
    assert lines[-1].split() == ["layer", "1000.000", "0.900", "1.100"]


# ---- make gpu


def test_make_gpu_ends_within_eight_minutes():
    recipe = re.search(r"(?ms)^GPU_SITE.*?(?=^# -)", (ROOT / "Makefile").read_text())[0]
    values = {name: int(value) for name, value in re.findall(r"(?m)^(GPU_\w+) \?= (\d+)$", recipe)}
    recipe = re.sub(r"\$\$\(\((.*?)\)\)", r"\1", recipe)  # arithmetic of the shell
    recipe = re.sub(r"\$\((\w+)\)", lambda found: str(values.get(found[1], found[0])), recipe)
    parts = re.findall(r"\t(?:part|timeout --kill-after=5) (\d+)(?: \+ (\d+))? [^&\n]*$", recipe, re.MULTILINE)
    assert len(parts) == 6
    assert sum(5 + int(seconds) + int(more or 0) for seconds, more in parts) <= 480
