"""Features of the CUDA kernels alone: scalars in device memory, launches of many tensors, chunks, alignment.

The tests run on a GPU, or on the host with backend "cuda-on-host" (see backend.py, run.py).
"""

import math
from itertools import combinations

import pytest
import torch
from cuda_on_host import backend
from onepass import _native
from onepass.optim import SGD, Lookahead, clip_grad_norm_, clip_grad_value_
from onepass.optim._staging import Staging
from reference import clip
from rules import RULES, BesideReference, Rule
from sparse import SPARSE, Beside, some_rows, sparse
from support import assert_close, assert_same, bits, parameter, rounding, snapshot, to_numpy
from wrappers import OURS, BesideLookahead, BesideSAM

DEVICE = backend.kernel_device()
if DEVICE is None:
    pytest.skip("no CUDA kernels here: neither a GPU nor the backend cuda-on-host", allow_module_level=True)
ON_HOST = DEVICE.type == "cpu"

pytestmark = pytest.mark.cuda_kernels
KERNELS = {rule.ours.rule: rule for rule in reversed(RULES.values())}  # classes that share a rule share its kernels


def forms(rule: Rule) -> list[dict]:
    """Arguments for each variant of the rule's states: the usual ones, and with some options left out."""
    cases = [{k: v for k, v in rule.usual.items() if k not in without} for without in combinations(rule.usual, 2)]
    found = {}
    for case in (rule.usual, *cases):
        optimizer = rule.ours([parameter(torch.zeros(1))], **case)
        found.setdefault(optimizer._state_names(optimizer.param_groups[0]), case)
    assert len(found) == len(_native.variants(rule.ours.rule)), f"of some kernels of {rule.ours.rule} no case is known"
    return list(found.values())


COUNTING = {key: rule for key, rule in KERNELS.items() if "capturable" in rule.options}
EVERY_KERNEL = pytest.mark.parametrize(
    ("rule", "case"),
    [pytest.param(rule, case, id=f"{key}-{i}") for key, rule in KERNELS.items() for i, case in enumerate(forms(rule))],
)
EVERY_RULE = pytest.mark.parametrize("rule", KERNELS.values(), ids=KERNELS)
COUNTING_RULE = pytest.mark.parametrize("rule", COUNTING.values(), ids=COUNTING)
EVERY_SPARSE = pytest.mark.parametrize("rule", SPARSE.values(), ids=SPARSE)

# Chunks of so few elements have 2048, those of the norm 8192 (csrc/cuda/tuning.hpp); some tensors are empty.
SIZES = [0, 1, 8191, 0, 8192, 8193, 7, 3 * 8192 + 5, 0]
MANY = [i % 5 for i in range(1875)]  # 1500 that are not empty: more than fit in one launch
FENCE = 7.0


def fenced(n: int, dtype: torch.dtype, offset: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A whole buffer and n random elements in it, `offset` elements after an aligned address."""
    whole = torch.full((n + 32,), FENCE, dtype=dtype, device=DEVICE)
    view = whole[16 + offset : 16 + offset + n]
    view.copy_(torch.randn(n))
    return whole, view


def assert_fences(wholes: list[torch.Tensor], sizes: list[int], offset: int) -> None:
    for whole, n in zip(wholes, sizes, strict=True):
        around = torch.cat([whole[: 16 + offset], whole[16 + offset + n :]])
        assert bool((around == FENCE).all()), f"memory around a tensor of {n} elements was written"


def random(sizes: list[int], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(n).to(DEVICE, dtype) for n in sizes]


def launches() -> int:
    return backend.counters()["launches"] if ON_HOST else 0


def counts(optimizer: torch.optim.Optimizer) -> list[int]:
    return [int(state["step"]) for state in optimizer.state.values()]


# ---- scalars in device memory ----------------------------------------------------------------------------------------


@COUNTING_RULE
def test_step_counts_in_device_memory(rule, dtype):
    """capturable: the kernels read and advance them; tensors that join late or pause have their own counts."""
    params = [parameter(p) for p in random(SIZES, dtype)]
    both = BesideReference(rule, {**rule.usual, "capturable": True}, params)
    for t in range(5):
        both.step([None if i > t + 4 or i == t else g for i, g in enumerate(random(SIZES, dtype))])
    assert counts(both.optimizer) == [4, 4, 4, 4, 4, 4, 3, 2, 1]


@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
@EVERY_RULE
def test_hyper_parameters_in_device_memory(rule, wide, dtype):
    """Changed in place between steps; the kernels read the current values."""
    lr = torch.tensor(0.5, dtype=wide, device=DEVICE)
    betas = tuple(torch.tensor(beta, dtype=wide, device=DEVICE) for beta in (0.75, 0.9375))  # exact in float32
    on_device = {"lr": lr, "betas": betas, "capturable": True}
    case = {**rule.usual, **{name: value for name, value in on_device.items() if name in rule.options}}
    both = BesideReference(rule, case, [parameter(p) for p in random([5, 100], dtype)])
    if "betas" in case:
        both.reference.options["betas"] = (0.75, 0.9375)
    for t in range(4):
        both.reference.options["lr"] = 0.5 / 2**t
        lr.fill_(0.5 / 2**t)
        both.step(random([5, 100], dtype))
    assert lr.item() == 0.0625, "a step wrote lr"


@pytest.mark.parametrize("max_norm", [None, 0.5])
@EVERY_RULE
def test_skipping_is_decided_on_the_device(rule, max_norm, dtype):
    """found_inf: nothing is written and no count advances, in the first step and later."""
    params = [parameter(p) for p in random(SIZES, dtype)]
    both = BesideReference(rule, {**rule.usual, "fused_unscale": True, "max_norm": max_norm}, params)

    def overflow() -> None:
        both.optimizer.grad_scale = torch.tensor(4.0, device=DEVICE)
        both.optimizer.found_inf = torch.tensor(1.0, device=DEVICE)
        for p in params:
            p.grad = torch.full_like(p, math.inf)
        before, launched = snapshot(both.optimizer), launches()
        both.optimizer.step()
        after = snapshot(both.optimizer)
        assert_same({key: after[key] for key in before}, before, "after an overflow")
        assert launches() > launched or not ON_HOST, "the host skipped the step; the kernels were not asked"

    overflow()
    for _ in range(2):
        both.step(random(SIZES, dtype), grad_scale=4.0)
        overflow()
    if rule in COUNTING.values():
        assert counts(both.optimizer) == [2] * len(SIZES)


# ---- more than one launch --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "extra"),
    [(rule, extra) for rule in KERNELS.values() for extra in ({}, {"max_norm": 0.5})]
    + [(rule, {"capturable": True}) for rule in COUNTING.values()],
    ids=lambda value: getattr(getattr(value, "ours", None), "rule", str(value)),
)
def test_more_tensors_than_a_launch_can_name(rule, extra):
    both = BesideReference(rule, {**rule.usual, **extra}, [parameter(p) for p in random(MANY)])
    for t in range(2):
        launched = launches()
        both.step([None if (i + t) % 9 == 0 else g for i, g in enumerate(random(MANY))])
        assert launches() - launched >= 2 or not ON_HOST, f"{launches() - launched} launches in step {t}"


@pytest.mark.parametrize("capturable", [False, True])
@COUNTING_RULE
def test_many_distinct_step_counts(rule, capturable):
    """More than a launch can carry: 40 tensors, of which the i-th joins in step i."""
    sizes = [1 + i % 6 for i in range(40)]
    both = BesideReference(
        rule, {**rule.usual, "capturable": capturable}, [parameter(p) for p in random(sizes)], every=10
    )
    for t in range(40):
        both.step([g if i <= t else None for i, g in enumerate(random(sizes))])
    assert counts(both.optimizer) == list(range(40, 0, -1))


# ---- chunks and alignment --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1, 4])
@EVERY_KERNEL
def test_chunks_and_alignment(rule, case, offset, dtype):
    """Tensors that end at, before and after a chunk's end. An offset of 4 elements is aligned for some dtypes only."""
    wholes, views = zip(*(fenced(n, dtype, offset) for n in SIZES), strict=True)
    both = BesideReference(rule, {**case, "max_norm": 0.5}, [parameter(view) for view in views])
    for _ in range(2):
        both.step([fenced(n, dtype, offset)[1] for n in SIZES])
    assert_fences(wholes, SIZES, offset)


@pytest.mark.parametrize("offset", [0, 1])
@EVERY_KERNEL
def test_formats_at_the_ends_of_chunks(rule, case, offset, dtype):
    """States in 8 bits, or in bfloat16 for rules that need more digits; bfloat16 parameters have a master as well.

    test_optim_formats.py compares the numbers; this is about memory that is not theirs.
    """
    master = {"master_bits": 32} if dtype == torch.bfloat16 else {}
    wholes, views = zip(*(fenced(n, dtype, offset) for n in SIZES), strict=True)
    params = [parameter(view) for view in views]
    for states in ({"state_dtype": "8bit"}, {"state_dtype": torch.bfloat16}, {}):
        try:
            optimizer = rule.ours(params, **case, **states, **master)
        except (TypeError, ValueError):  # SparseAdam has no formats
            continue
        break
    if (not states and not master) or dtype == torch.float64:
        pytest.skip("nothing of it has another format")
    before = [p.detach().clone() for p in params]
    for _ in range(2):
        for p, n in zip(params, SIZES, strict=True):
            p.grad = fenced(n, dtype, offset)[1]
        optimizer.step()
    assert_fences(wholes, SIZES, offset)
    for p, old in zip(params, before, strict=True):
        assert p.isfinite().all()
        assert p.numel() < 100 or (p != old).any()


@pytest.mark.parametrize("unaligned", ["gradient", "state"])
@EVERY_RULE
def test_one_unaligned_stream(rule, unaligned, dtype):
    """Beside aligned streams: the wide path requires all streams to be aligned."""
    n = 8192 + 100
    whole, view = fenced(n, dtype)
    p = parameter(view)
    both = BesideReference(rule, rule.usual, [p])
    both.step([fenced(n, dtype)[1]])
    if unaligned == "state":
        for key, value in both.optimizer.state[p].items():
            if value.dim():
                both.optimizer.state[p][key] = fenced(n, value.dtype, 1)[1].copy_(value)
    for _ in range(2):
        both.step([fenced(n, dtype, unaligned == "gradient")[1]])
    assert_fences([whole], [n], 0)


@pytest.mark.parametrize("max_norm", [None, 0.5])  # after a norm the chunks run in reverse
@pytest.mark.parametrize("key", ["sgd", "adam"])
def test_large_chunks(key, max_norm):
    """From 4M elements on, chunks are larger; a misaligned gradient, tensors that end at every place of a chunk."""
    sizes = [3 << 20, 4095, 0, (1 << 20) + 1, 4097, 1]
    wholes, views = zip(*(fenced(n, torch.float32) for n in sizes), strict=True)
    both = BesideReference(
        KERNELS[key], {**KERNELS[key].usual, "max_norm": max_norm}, [parameter(view) for view in views]
    )
    grads = [fenced(n, torch.float32, i % 2)[1] for i, n in enumerate(sizes)]
    before = backend.counters()["blocks"] if ON_HOST else 0
    both.step(grads)
    if ON_HOST:
        blocks = backend.counters()["blocks"] - before
        assert blocks < sum(sizes) / 2048, "the chunks are the smallest"
    assert_fences(wholes, sizes, 0)


@pytest.mark.parametrize("offset", [0, 1, 4])
@EVERY_SPARSE
def test_rows_over_chunks(rule, offset, dtype):
    """Rows of sparse gradients that cross chunks, wide and narrow, aligned and not."""
    shapes = [(3, 8192), (40, 500), (700, 16), (5, 1), (9, 3000), (4000, 3), (2, 0), (6, 4)]
    sizes = [math.prod(shape) for shape in shapes]
    wholes, views = zip(*(fenced(n, dtype, offset) for n in sizes), strict=True)
    params = [parameter(view.view(shape)) for view, shape in zip(views, shapes, strict=True)]
    both = Beside(rule, {**rule.usual, "max_norm": 0.5}, params)
    for _ in range(2):
        both.step([some_rows(shape, shape[0], dtype, DEVICE) for shape in shapes])
    assert_fences(wholes, sizes, offset)


@EVERY_SPARSE
def test_more_tables_than_a_launch_can_name(rule):
    """Among dense gradients, if the rule accepts both; some tables have no row to update."""
    shapes = [(3, 1 + i % 5) for i in range(900)]
    params = [parameter(torch.randn(shape, device=DEVICE)) for shape in shapes]
    twins = [parameter(p.detach().clone()) for p in params]
    ours, theirs = rule.ours(params, **rule.usual), rule.theirs(twins, **rule.usual)
    for t in range(2):
        launched = launches()
        for i, (p, twin) in enumerate(zip(params, twins, strict=True)):
            rows = [[], [2], [0, 2, 0]][(i + t) % 3]
            dense = i % 7 == 0 and rule is not SPARSE["SparseAdam"]
            p.grad = torch.randn_like(p) if dense else sparse(p.shape, rows, device=DEVICE)
            twin.grad = p.grad.clone()
        ours.step()
        theirs.step()
        assert launches() - launched >= 2 or not ON_HOST
    for i, (p, twin) in enumerate(zip(params, twins, strict=True)):
        assert_close(p, twin, 4e-6, f"parameter {i}")


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("p", [2.0, 1.0, 3.0, math.inf, -math.inf])
def test_norms_over_chunks(p, offset, dtype):
    """The reduction has its own chunks; for the 2-norm there are more than the joining block has threads."""
    sizes = SIZES + MANY[:700] if p == 2 else SIZES
    if p == -math.inf:
        sizes = [n for n in sizes if n > 0]  # the smallest magnitude of an empty tensor is 0
    wholes, views = zip(*(fenced(n, dtype, offset) for n in sizes), strict=True)
    params = [parameter(torch.zeros_like(view)) for view in views]
    for q, view in zip(params, views, strict=True):
        q.grad = view
        if p == -math.inf:
            view.abs_().add_(0.125)
    norm, expected = clip.clip_grad_norm([to_numpy(q.grad) for q in params], 0.5, p)
    came = clip_grad_norm_(params, 0.5, p)
    roundings = rounding(dtype) if p == 2 else 4 * rounding(dtype)
    assert_close(came.double() / norm, torch.tensor(1.0), 1e-6, f"{p}-norm", roundings)
    for i, (q, g) in enumerate(zip(params, expected, strict=True)):
        assert_close(q.grad, g, 1e-6, f"gradient {i}", roundings)
    assert_fences(wholes, sizes, offset)


@pytest.mark.parametrize("offset", [0, 1])
def test_clipping_values_over_chunks(offset, dtype):
    wholes, views = zip(*(fenced(n, dtype, offset) for n in SIZES), strict=True)
    params = [parameter(torch.zeros_like(view)) for view in views]
    for p, view in zip(params, views, strict=True):
        p.grad = view
    expected = clip.clip_grad_value([to_numpy(view) for view in views], 0.5)
    clip_grad_value_(params, 0.5)
    for i, (p, g) in enumerate(zip(params, expected, strict=True)):
        assert_close(p.grad, g, 0.0, f"gradient {i}")
    assert_fences(wholes, SIZES, offset)


# ---- the wrappers' passes ----------------------------------------------------------------------------------------------


def beside(wrapper: str, params: list[torch.nn.Parameter]):
    if wrapper == "Lookahead":
        return BesideLookahead(OURS["SGD"], params, 2, 0.25)
    return BesideSAM(OURS["SGD"], params, rho=0.5, adaptive=wrapper == "ASAM")


EVERY_WRAPPER = pytest.mark.parametrize("wrapper", ["Lookahead", "SAM", "ASAM"])


@pytest.mark.parametrize("offset", [0, 1, 4])
@EVERY_WRAPPER
def test_wrappers_over_chunks_and_alignment(wrapper, offset, dtype):
    """Synchronisation, perturbation and its norm (of two streams with adaptive), restoring."""
    wholes, views = zip(*(fenced(n, dtype, offset) for n in SIZES), strict=True)
    both = beside(wrapper, [parameter(view) for view in views])
    for t in range(2):
        grads = ([fenced(n, dtype, (offset + t) % 5)[1] for n in SIZES] for _ in range(1 + (wrapper != "Lookahead")))
        both.step(*grads)
    assert_fences(wholes, SIZES, offset)


@EVERY_WRAPPER
def test_wrappers_of_more_tensors_than_a_launch_can_name(wrapper):
    both = beside(wrapper, [parameter(p) for p in random(MANY)])
    for _ in range(2):
        both.step(*(random(MANY) for _ in range(1 + (wrapper != "Lookahead"))))


@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
def test_alpha_in_device_memory(wide, dtype):
    """alpha="quadratic" leaves it there, and the kernel reads it."""
    params = [parameter(p) for p in random(SIZES, dtype)]
    optimizer = Lookahead(SGD(params, lr=0.5), 2)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    slow = [optimizer.state[p]["slow_param"].clone() for p in params]
    expected = [s + 0.25 * (p.detach().to(s) - s) for p, s in zip(params, slow, strict=True)]
    optimizer._synchronise(torch.tensor(0.25, dtype=wide, device=DEVICE))
    for i, (p, s) in enumerate(zip(params, expected, strict=True)):
        assert_close(optimizer.state[p]["slow_param"], s, 4e-6, f"slow weights {i}")
        assert_close(p, s.to(dtype), 4e-6, f"weights {i}", 2 * rounding(dtype))


def test_restoring_by_numbers_in_device_memory(dtype):
    """Restoring ignores the numbers of the perturbation; the states are read and not written."""
    params, old = (random(SIZES, torch.float32) for _ in range(2))
    params = [p.to(dtype) for p in params]
    old = [o.to(dtype).to(torch.float64 if dtype == torch.float64 else torch.float32) for o in old]
    before = [bits(o) for o in old]
    plan, staging = _native.new_plan(), Staging(str, ("old_param",))
    state = {p: {"old_param": o} for p, o in zip(params, old, strict=True)}
    hyper = {"rho": torch.tensor(math.nan, device=DEVICE), "adaptive": 1.0}
    assert not _native.Group("sam", ("old_param",), params, state, hyper, staging, reads_grad=False).gather(plan)
    _native.update(plan, [staging], _native.GradientFactor())
    for p, o in zip(params, old, strict=True):
        assert bits(p) == bits(o.to(dtype))
    assert [bits(o) for o in old] == before
