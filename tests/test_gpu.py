"""What only a GPU shows: its arithmetic, streams, graphs, several devices, 64-bit offsets and its memory checker.

`make gpu` runs this together with the rest of the suite on the device "cuda".
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import onepass
import pytest
import torch
from cuda_on_host import element_wise
from rules import RULES, BesideReference
from support import assert_close, assert_same, parameter, snapshot

if not (onepass.has_cuda and torch.cuda.is_available()):
    pytest.skip("needs a GPU, and onepass and torch built for it", allow_module_level=True)

pytestmark = pytest.mark.cuda_kernels
GPU = torch.device("cuda")
EVERY_RULE = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
LONG = 500_000_000  # cycles for which the GPU is kept busy: a quarter of a second or more


def usual(rule, **more) -> dict:
    """The rule's usual arguments for a step that never synchronises with the host."""
    return {**rule.usual, **({"capturable": True} if "capturable" in rule.options else {}), **more}


def params_with_grads(sizes=(5, 1000, 20_000), device=GPU) -> list[torch.nn.Parameter]:
    params = [parameter(torch.randn(n, device=device)) for n in sizes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_same_bits_as_the_cpu():
    """Every rule, case and dtype, aligned and not, many tensors, special values."""
    expected, came = (element_wise.digests(torch.device(name)) for name in ("cpu", "cuda"))
    different = [case for case in expected if came[case] != expected[case]]
    assert not different, f"{len(different)} of {len(expected)} cases have other bits on the GPU: {different[:5]}"


@pytest.mark.parametrize("path", [{"fused": True}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("max_norm", [None, 0.5])
@EVERY_RULE
def test_like_torch_on_the_gpu(rule, max_norm, path):
    """Compared with torch's kernels, on more elements than a block's chunk."""
    sizes = (1, 300, 1_000_003)
    params = [parameter(torch.randn(n, device=GPU)) for n in sizes]
    twins = [parameter(p.detach().clone()) for p in params]
    ours, theirs = rule.ours(params, **rule.usual, max_norm=max_norm), rule.theirs(twins, **rule.usual, **path)
    for _ in range(5):
        for p, twin in zip(params, twins, strict=True):
            p.grad = torch.randn_like(p)
            twin.grad = p.grad.clone()
        if max_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(twins, max_norm)
        ours.step()
        theirs.step()
        if max_norm is not None:
            assert_close(ours.grad_norm / norm, torch.tensor(1.0), 1e-5, "norm")
    for i, (p, twin) in enumerate(zip(params, twins, strict=True)):
        assert_close(p, twin, 2e-5, f"parameter {i}")
        for key, value in theirs.state[twin].items():
            assert_close(ours.state[p][key], value, 2e-5, f"{key} of parameter {i}")


def test_more_elements_than_32_bits_count():
    n = 2**31 + 9
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GB of free memory")
    p = parameter(torch.zeros(n, dtype=torch.bfloat16, device=GPU))
    p.grad = torch.ones_like(p)
    p.grad[-1] = 2
    optimizer = RULES["SGD"].ours([p], lr=0.5, max_norm=2.0**20)  # far above the norm: nothing is clipped
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx((n + 3) ** 0.5, rel=1e-6)
    with torch.no_grad():
        ends = p[-1].item(), p[:-1].min().item(), p[:-1].max().item()
    assert ends == (-1.0, -0.5, -0.5), f"last, smallest and largest other element: {ends}"


# ---- streams ---------------------------------------------------------------------------------------------------------


@EVERY_RULE
def test_runs_on_the_current_stream(rule):
    """A busy side stream has yet to write the gradients: only a step on that stream sees them."""
    params = params_with_grads()
    both = BesideReference(rule, usual(rule, max_norm=0.5), params)
    both.step([p.grad for p in params])
    late = [torch.randn_like(p) for p in params]
    grads = [torch.zeros_like(p) for p in params]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(LONG)
        for p, g, value in zip(params, grads, late, strict=True):
            g.copy_(value)
            p.grad = g
        both.optimizer.step()
    side.synchronize()
    both.steps += 1
    both.reference.step(both.expected, [value.double().cpu().numpy() for value in late])
    both.compare()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize(
    "options",
    [{}, {"max_norm": 0.5}, {"normalize_grads": True}, {"fused_unscale": True}, {"lr": "tensor"}],
    ids=str,
)
@EVERY_RULE
def test_never_waits_for_the_gpu(rule, options):
    """The step returns while earlier work still runs, and calls nothing in torch that would wait."""
    params = params_with_grads()
    if options.get("lr") == "tensor":
        options = {"lr": torch.tensor(0.1, device=GPU)}
    optimizer = rule.ours(params, **usual(rule, **options))

    def step() -> None:
        if options.get("fused_unscale"):
            optimizer.grad_scale, optimizer.found_inf = torch.ones((), device=GPU), torch.zeros((), device=GPU)
        optimizer.step()

    step()  # creates the states
    torch.cuda.synchronize()
    busy = torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(LONG)
        busy.record()
        step()
        waited = busy.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert not waited, "the step waited for the work before it"


# ---- graphs ----------------------------------------------------------------------------------------------------------


def new_model() -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(16, 33), torch.nn.Tanh(), torch.nn.Linear(33, 4)).to(GPU, torch.float64)


def train(model, optimizer, x: torch.Tensor, max_norm: float | None = None) -> torch.Tensor | None:
    """One step, clipped before it if max_norm is given; returns the norm in that case."""
    optimizer.zero_grad(set_to_none=True)
    (model(x) - x[:, :4].sin()).square().mean().backward()
    norm = None if max_norm is None else torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    return norm


@pytest.mark.parametrize("max_norm", [None, 0.1])
@EVERY_RULE
def test_graph_of_a_training_step(rule, max_norm):
    """Forward, backward and step are captured once; replays follow data and lr, as torch.optim does without a graph."""
    model, twin = new_model(), new_model()
    lr = torch.tensor(0.1, dtype=torch.float64, device=GPU)
    ours = rule.ours(model.parameters(), **usual(rule, lr=lr, max_norm=max_norm))
    theirs = rule.theirs(twin.parameters(), **rule.usual)
    x = torch.zeros(8, 16, dtype=torch.float64, device=GPU)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    for _ in range(3):  # the states and cuBLAS's workspace must exist
        x.normal_()
        with torch.cuda.stream(side):
            side.wait_stream(torch.cuda.default_stream())
            train(model, ours, x)
        torch.cuda.current_stream().wait_stream(side)
        train(twin, theirs, x, max_norm)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train(model, ours, x)
    for t in range(6):
        x.normal_()
        lr.fill_(0.1 / (t + 1))
        theirs.param_groups[0]["lr"] = 0.1 / (t + 1)
        graph.replay()
        norm = train(twin, theirs, x, max_norm)
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert_close(p, q, 1e-11, f"{name} after replay {t + 1}")
        if max_norm is not None:
            assert_close(ours.grad_norm, norm, 1e-11, f"norm of replay {t + 1}")
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        for key, value in theirs.state[q].items():
            assert_close(ours.state[p][key], value, 1e-11, f"{key} after the replays")


@EVERY_RULE
def test_graph_decides_on_skipping(rule):
    """found_inf and grad_scale may change between replays."""
    params = params_with_grads()
    grads = [p.grad for p in params]
    both = BesideReference(rule, usual(rule, fused_unscale=True), params)
    both.step(grads, grad_scale=4.0)
    optimizer = both.optimizer
    scale, found_inf = optimizer.grad_scale, optimizer.found_inf
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for bad, factor in ((0, 2.0), (1, 8.0), (1, 2.0), (0, 16.0)):
        for g in grads:
            g.normal_()
        scale.fill_(factor)
        found_inf.fill_(bad)
        before = snapshot(optimizer)
        graph.replay()
        if bad:
            assert_same(snapshot(optimizer), before, "after a skipped replay")
        else:
            both.steps += 1
            values = [g.double().cpu().numpy() for g in grads]
            both.reference.step(both.expected, values, grad_scale=factor)
            both.compare()


FIRST_LAUNCH = """
import torch, onepass
from torch import nn
p = nn.Parameter(torch.ones(1000, device="cuda"))
p.grad = torch.ones_like(p)
optimizer = onepass.optim.AdamW([p], capturable=True, max_norm=1.0)
norm = onepass.nn.LayerNorm(1000, device="cuda")
x = torch.randn(8, 1000, device="cuda")
{warm_up}
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph), torch.no_grad():
    y = norm(x)
    optimizer.step()
before = p.detach().clone()
graph.replay()
torch.cuda.synchronize()
assert (p != before).all(), "the replay changed nothing"
assert torch.allclose(y, torch.nn.functional.layer_norm(x, (1000,)), atol=1e-5)
"""


@pytest.mark.parametrize("loading", ["LAZY", "EAGER"])
@pytest.mark.parametrize("warm_up", ["optimizer.step(); norm(x)", "optimizer.step()"])
def test_first_launch_inside_a_graph(loading, warm_up):
    """A kernel that was not launched before is loaded while a stream is captured, which the driver allows or not.

    With the layer warmed up it has to work; without, it is what the documentation asks users to avoid: either the result is
    right or capture fails with an error, and the test says which.
    """
    env = {**os.environ, "CUDA_MODULE_LOADING": loading}
    command = [sys.executable, "-c", FIRST_LAUNCH.format(warm_up=warm_up)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode != 0 and "norm" not in warm_up:
        assert "the replay changed nothing" not in done.stderr, done.stderr
        pytest.skip(f"a first launch cannot be captured here: {done.stderr.strip().splitlines()[-1][:200]}")
    assert done.returncode == 0, done.stderr[-3000:]


# ---- devices ---------------------------------------------------------------------------------------------------------


def beside_reference_on(rule, devices: list[str]) -> None:
    """One optimizer over parameters on several devices, one norm over all."""
    sizes = (7, 8193, 100, 0)
    params = [parameter(torch.randn(n, device=d)) for d in devices for n in sizes]
    both = BesideReference(rule, {**rule.usual, "max_norm": 0.5}, params)
    for _ in range(3):
        both.step([torch.randn_like(p) for p in params])


@EVERY_RULE
def test_cpu_and_gpu_in_one_optimizer(rule):
    beside_reference_on(rule, ["cuda", "cpu"])


@EVERY_RULE
def test_lr_tensor_on_the_cpu(rule):
    lr = torch.tensor(0.125, dtype=torch.float64)
    both = BesideReference(rule, {**rule.usual, "lr": lr}, [parameter(torch.randn(50, device=GPU))])
    both.reference.options["lr"] = 0.125
    for _ in range(2):
        both.step([torch.randn(50, device=GPU)])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@EVERY_RULE
def test_two_devices(rule):
    """Whichever device is current, and it stays current."""
    for current in (0, 1):
        with torch.cuda.device(current):
            beside_reference_on(rule, ["cuda:0", "cuda:1"])
            beside_reference_on(rule, ["cuda:1"])
            assert torch.cuda.current_device() == current


# ---- the memory checker ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not on PATH")
@pytest.mark.parametrize(
    ("tool", "file", "chosen"),
    [
        # Every tensor has its own allocation.
        ("memcheck", "test_kernels.py", "test_chunks_and_alignment and (float32 or bfloat16) and (sgd or adam)"),
        # Races for shared memory; only what is reduced uses any.
        ("racecheck", "test_layer_kernels.py", "test_only_what_is_wanted and (float32 or bfloat16)"),
        ("racecheck", "test_batch_norm_kernels.py", "test_odd_addresses and float32"),
    ],
)
def test_compute_sanitizer(tool, file, chosen):
    """Tails, unaligned tensors and reductions under NVIDIA's checkers."""
    tests = Path(__file__).parent / "cuda_on_host" / file
    checker = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "99", "--report-api-errors", "no"]
    command = [sys.executable, "-m", "pytest", "-q", str(tests), "-k", chosen]
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run([*checker, *command], env=env, capture_output=True, text=True, check=False, timeout=60)
    except subprocess.TimeoutExpired:
        pytest.skip("did not end within 60 s")
    output = done.stdout + done.stderr
    if "SUMMARY" not in output:
        pytest.skip(f"compute-sanitizer does not run here: {output[-300:]}")
    assert done.returncode == 0, output[-5000:]
