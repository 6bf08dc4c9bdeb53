"""The same bits on every instruction set and for any number of threads; IEEE arithmetic; NaN, Inf, denormals as torch."""

import math

import onepass
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rules import RULES, BesideReference
from support import HALF, assert_close, assert_same, bits, parameter, snapshot

ISAS = onepass._native.isas()
# Sizes around every vector width and unroll factor, none a multiple of another.
SIZES = [0, 1, 3, 4, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 127, 1000, 4099]
LARGE = [4_200_003, 70_001, 1, 0, 5]


def bit_cases():
    """Every case without a norm, because a reduction has the same bits for any thread count only within one ISA."""
    for key, rule in RULES.items():
        for i, case in enumerate(rule.cases):
            if case["max_norm"] is None and not case["normalize_grads"]:
                yield pytest.param(rule, {**case, "fused_unscale": False}, id=f"{key}-{i}")


def run(rule, case, sizes, dtype, steps=3, device="cpu", offset=0) -> dict[str, bytes]:
    """The bits of parameters and states after several steps from the same seed."""
    generator = torch.Generator(device).manual_seed(1)

    def values(n):
        return torch.randn(n + offset, generator=generator, device=device).to(dtype)[offset:]

    params = [parameter(values(n)) for n in sizes]
    optimizer = rule.ours(params, **case)
    for _ in range(steps):
        for p in params:
            p.grad = values(p.numel())
        optimizer.step()
    return snapshot(optimizer)


def test_the_baseline_is_always_there():
    assert "baseline" in ISAS, f"the instruction sets are {ISAS}"
    with pytest.raises((ValueError, RuntimeError)), onepass._native.use_isa("no-such-isa"):
        pass


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(("rule", "case"), list(bit_cases()))
def test_same_bits_on_every_isa(rule, case, offset, dtype):
    results = {}
    for isa in ISAS:
        with onepass._native.use_isa(isa):
            results[isa] = run(rule, case, SIZES, dtype, offset=offset)
    for isa in ISAS:
        assert_same(results[isa], results["baseline"], f"{isa} against baseline, {case}")


@pytest.mark.parametrize(
    "extra", [{}, {"max_norm": 0.5}, {"normalize_grads": True}], ids=["plain", "clip", "normalize"]
)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_same_bits_for_any_thread_count(rule, extra):
    """Enough elements to use both threads, and few enough to use one."""
    for sizes, dtypes in ((LARGE, (torch.float32,)), (SIZES, (torch.float32, torch.bfloat16))):
        for dtype in dtypes:
            results = {}
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results[threads] = run(rule, {**rule.usual, **extra}, sizes, dtype, steps=2)
            for threads in (2, 3):
                assert_same(
                    results[threads], results[1], f"{threads} threads against 1, {sum(sizes)} elements of {dtype}"
                )


@pytest.mark.parametrize("isa", ISAS)
def test_same_bits_from_run_to_run(isa):
    torch.set_num_threads(2)
    rule = RULES["AdamW"]
    with onepass._native.use_isa(isa):
        first, second = (run(rule, {**rule.usual, "max_norm": 1.0}, [1_500_001, 3], torch.float32, 2) for _ in range(2))
    assert_same(second, first, f"second run on {isa}")


def every_pattern(dtype: torch.dtype) -> torch.Tensor:
    """All 65536 values of a 16-bit dtype."""
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)


def assert_same_values(came: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Equal bits; any NaN equals any other."""
    nan = expected.isnan()
    assert bool((came.isnan() == nan).all()), f"{what}: NaN in other places"
    different = (came.view(torch.int16) != expected.view(torch.int16)) & ~nan
    where = different.nonzero().flatten()[:3].tolist()
    assert not where, f"{what}: expected {expected[where].tolist()}, came {came[where].tolist()} at {where}"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_sixteen_bit_storage_rounds_to_nearest_even(dtype, isa):
    """Every 16-bit parameter with scattered gradients: float32 arithmetic, one rounding at the store."""
    w, g = every_pattern(dtype), every_pattern(dtype)[torch.randperm(65536)]
    p = parameter(w.clone())
    p.grad = g
    with onepass._native.use_isa(isa):
        RULES["SGD"].ours([p], lr=0.3).step()
    expected = (w.float() - torch.tensor(0.3) * g.float()).to(dtype)
    assert_same_values(p.detach(), expected, f"w - 0.3g in {dtype}")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_lr_zero_keeps_sixteen_bit_values(dtype, isa):
    """With lr = 0 every pattern, including denormals and infinities, is loaded and stored unchanged."""
    w = every_pattern(dtype)
    p = parameter(w.clone())
    p.grad = torch.ones_like(p)
    with onepass._native.use_isa(isa):
        RULES["SGD"].ours([p], lr=0.0).step()
    assert_same_values(p.detach(), w, f"{dtype} after a step of lr=0")


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40),
    st.floats(width=32, min_value=0, max_value=1e3),
    st.sampled_from(ISAS),
)
def test_sgd_is_plain_ieee_arithmetic(values, lr, isa):
    """w - lr·g with two roundings and no fused multiply-add."""
    w = torch.tensor(values, dtype=torch.float32)
    g = w.flip(0).contiguous()
    p = parameter(w.clone())
    p.grad = g
    with onepass._native.use_isa(isa):
        RULES["SGD"].ours([p], lr=lr).step()
    expected = w - torch.tensor(lr, dtype=torch.float32) * g
    equal = (p.detach() == expected) | (p.detach().isnan() & expected.isnan())
    assert bool(equal.all()), f"expected {expected.tolist()}, came {p.tolist()}"


# ---- values that are not ordinary ------------------------------------------------------------------------------------

SPECIAL = [0.0, -0.0, 1.0, -1.5, math.nan, math.inf, -math.inf, 1e20, -1e30, 1e-20, 1e-40, -1e-44, 3e38]


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_special_values_flow_as_in_torch(rule, maximize, device):
    """Every special parameter with every special gradient for three steps, then ordinary gradients."""
    w, g = torch.meshgrid(torch.tensor(SPECIAL), torch.tensor(SPECIAL), indexing="ij")
    cases = [{"lr": 0.1}, {**rule.usual}, {"lr": 0.1, "momentum": 0.9, "nesterov": True}]
    for case in cases if "nesterov" in rule.options else cases[:2]:
        p = parameter(w.clone().flatten().to(device))
        twin = parameter(p.detach().clone())
        ours = rule.ours([p], maximize=maximize, **case)
        theirs = rule.theirs([twin], maximize=maximize, foreach=False, **case)
        for t in range(3):
            grad = g.flatten() if t == 0 else torch.full_like(g.flatten(), 0.5)
            p.grad, twin.grad = grad.to(device), grad.to(device).clone()
            ours.step()
            theirs.step()
            came = {"parameter": p.detach(), **ours.state.get(p, {})}
            expected = {"parameter": twin.detach(), **theirs.state.get(twin, {})}
            for key, value in expected.items():
                assert_special(came[key], value, w, g, f"{key} after step {t + 1} with {case}")


def assert_special(came, expected, w, g, what) -> None:
    """Assert the same NaN and Inf and the same sign near zero; denormals to their last places.

    If a step cancels a parameter completely, its last place may remain, depending on the instruction set torch uses.
    """
    close = torch.isclose(came, expected, rtol=2e-3, atol=1e-44, equal_nan=True)
    if what.startswith("parameter"):
        before = w.flatten().to(came.device).abs()
        close |= before.isfinite() & ((came - expected).abs() <= before * 2**-23)
    if not bool(close.all()):
        i = int((~close).nonzero()[0])
        raise AssertionError(
            f"{what}: parameter {w.flatten()[i]}, gradient {g.flatten()[i]}: expected {expected[i]}, came {came[i]}"
        )


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_denormals_are_kept(rule):
    """A denormal gradient reaches the state and a denormal parameter stays: nothing is flushed to zero."""
    p = parameter(torch.full((40,), 1e-40))
    p.grad = torch.full((40,), 1e-39)
    still = {"step_sizes": (0.0, 50.0)} if "step_sizes" in rule.options else {}
    optimizer = rule.ours([p], **{**rule.usual, **rule.no_decay, **still, "lr": 0.0})
    optimizer.step()
    assert bits(p) == bits(torch.full((40,), 1e-40)), f"expected 1e-40, came {p[0]}"
    linear = {"momentum_buffer", "exp_avg", "grad_avg", "prev"} & optimizer.state[p].keys()  # in the gradient
    for name in linear:
        assert bool((optimizer.state[p][name] != 0).all()), f"a denormal gradient was lost in {name}"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"normalize_grads": True}], ids=["clip", "normalize"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_nonfinite_norm(rule, option, bad, device):
    """NaN in one gradient gives a NaN norm and NaN everywhere, as in torch; Inf gives a factor of 0, NaN only at the Inf."""
    params = [parameter(torch.ones(3, device=device)) for _ in range(2)]
    twins = [parameter(torch.ones(3, device=device)) for _ in range(2)]
    nan = [True, True, True] * 2 if math.isnan(bad) else [False, True, False, False, False, False]
    for p, twin, is_nan in zip(params, twins, (nan[:3], nan[3:]), strict=True):
        p.grad = torch.ones_like(p)
        twin.grad = torch.tensor([math.nan if n else 0.0 for n in is_nan], device=device)
    params[0].grad[1] = bad
    optimizer = rule.ours(params, lr=0.1, **option)
    optimizer.step()
    assert str(float(optimizer.grad_norm)) == str(bad), f"expected a norm of {bad}, came {optimizer.grad_norm}"
    rule.theirs(twins, lr=0.1).step()
    for i, (p, twin) in enumerate(zip(params, twins, strict=True)):
        assert_close(p, twin, 0.0, f"parameter {i}")


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_norm_of_nothing(rule, device):
    """If all gradients are zero, s = 0, not 0/0. Without gradients the norm is 0 and nothing changes."""
    p = parameter(torch.ones(3, device=device))
    optimizer = rule.ours([p], lr=0.1, normalize_grads=True, **rule.no_decay)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert p.tolist() == [1, 1, 1], f"a zero gradient moved the parameter to {p.tolist()}"
    assert float(optimizer.grad_norm) == 0
    p.grad = None
    optimizer.step()
    assert p.tolist() == [1, 1, 1]
    assert float(optimizer.grad_norm) == 0


@pytest.mark.parametrize("case", [{"lr": 1e6, "max_norm": 1e-6}, {"lr": 1.0, "normalize_grads": True}], ids=str)
def test_small_norms(case, device):
    """A norm of 2e-6 shows the 1e-6 that clipping adds to it, and that normalizing adds nothing."""
    both = BesideReference(RULES["SGD"], case, [parameter(torch.zeros(4, device=device))])
    both.step([torch.full((4,), 1e-6, device=device)])


@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_norm_neither_overflows_nor_underflows(magnitude, device):
    """1e30² does not fit in float32: the squares are summed in a wider type or scaled."""
    p = parameter(torch.zeros(1000, device=device))
    p.grad = torch.full_like(p, magnitude)
    optimizer = RULES["SGD"].ours([p], lr=1.0, normalize_grads=True)
    optimizer.step()
    norm = magnitude * math.sqrt(1000)
    assert_close(optimizer.grad_norm.double() / norm, torch.tensor(1.0), 1e-6, f"norm {norm} relative")
    assert_close(p, torch.full((1000,), -1 / math.sqrt(1000)), 1e-6, "a normalized gradient")
