"""Conformance: every argument of every rule, against the float64 reference and against torch.optim."""

import pytest
import torch
from reference.common import name
from rules import RULES, BesideReference, Rule
from support import ARITHMETIC, arithmetic_dtype, assert_close, parameter, to_numpy

STEPS = 20
SHAPES = ((0,), (), (7,), (1,), (33, 31), (4099,))
SMALL = ((3,), (), (5,))
GRAD_SCALE = 3.0

CASES = [
    pytest.param(rule, case, id=f"{key}-{name(case, rule.options)}")
    for key, rule in RULES.items()
    for case in rule.cases
]


def new_params(shapes, dtype, device) -> list[torch.nn.Parameter]:
    return [parameter(torch.randn(shape, device=device).to(dtype)) for shape in shapes]


def new_grads(t: int, shapes, dtype, device) -> list[torch.Tensor | None]:
    """Gradients of step t, some exactly zero; those of one tensor start late, those of another are sometimes missing."""
    grads = []
    for i, shape in enumerate(shapes):
        g = torch.randn(shape, device=device)
        g = torch.where(torch.rand(shape, device=device) < 0.1, 0.0, g).to(dtype)
        grads.append(None if (i == 1 and t < 3) or (i == 2 and t % 4 == 1) else g)
    return grads


@pytest.mark.parametrize(("rule", "case"), CASES)
def test_every_pair_of_arguments(rule, case, dtype, device):
    """20 steps beside the reference; parameters, states and norm are compared after each."""
    grad_scale = GRAD_SCALE if case["fused_unscale"] else None
    both = BesideReference(rule, case, new_params(SHAPES, dtype, device))
    for t in range(STEPS):
        both.step(new_grads(t, SHAPES, dtype, device), grad_scale)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_many_elements(rule, dtype, device):
    """More than one chunk, with a tail of one element."""
    shapes = [(65537,), (3,), (2, 65537)]
    both = BesideReference(rule, {**rule.usual, "max_norm": 0.5}, new_params(shapes, dtype, device))
    for _ in range(3):
        both.step([torch.randn_like(p) for p in both.params])


@pytest.mark.parametrize("rule", [pytest.param(rule, id=key) for key, rule in RULES.items() if rule.product])
def test_every_combination_of_arguments(rule):
    """The full product, float32, tiny tensors."""
    grads = [new_grads(t, SMALL, torch.float32, "cpu") for t in range(STEPS)]
    start = new_params(SMALL, torch.float32, "cpu")
    wrong = []
    for case in rule.product:
        both = BesideReference(rule, case, [parameter(p.clone()) for p in start], every=5)
        try:
            for step_grads in grads:
                both.step(step_grads, GRAD_SCALE if case["fused_unscale"] else None)
        except AssertionError as error:
            wrong.append(f"{name(case, rule.options)}: {error}")
    assert not wrong, f"{len(wrong)} of {len(rule.product)} cases are wrong:\n" + "\n".join(wrong[:10])


def torch_cases(rule: Rule) -> list[dict]:
    """The cases that torch.optim can compute, once each; more than the pairs, because torch lacks many pairs."""
    cases = [case for case in rule.product or rule.cases if not case["fused_unscale"] and not case.get("capturable")]
    seen = {f"{form} {case['max_norm']}": case for case in cases if (form := rule.to_torch(case)) is not None}
    return list(seen.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_like_torch(rule, dtype, device):
    """After 20 steps parameters and states are torch's, for every form that torch has."""
    cases = torch_cases(rule)
    assert cases, "no case to compare"
    for case in cases:
        params = new_params(SMALL, dtype, device)
        twins = [parameter(p.clone()) for p in params]
        ours, theirs = rule.ours(params, **case), rule.theirs(twins, **rule.to_torch(case))
        for t in range(STEPS):
            for p, twin, g in zip(params, twins, new_grads(t, SMALL, dtype, device), strict=True):
                p.grad, twin.grad = g, None if g is None else g.clone()
            if case["max_norm"] is not None:
                torch.nn.utils.clip_grad_norm_(twins, case["max_norm"])
            ours.step()
            theirs.step()
        assert_like_torch(ours, theirs, str(case))


def assert_like_torch(ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer, what: str) -> None:
    params, twins = ([p for group in o.param_groups for p in group["params"]] for o in (ours, theirs))
    for i, (p, twin) in enumerate(zip(params, twins, strict=True)):
        tolerance = 2 * ARITHMETIC[arithmetic_dtype(p.dtype)]
        assert_close(p, twin, tolerance, f"parameter {i} of {what}")
        came, expected = ours.state.get(p, {}), theirs.state.get(twin, {})
        assert came.keys() == expected.keys(), f"state of parameter {i}: {list(expected)} expected, {list(came)} came"
        for key, value in expected.items():
            assert_close(came[key], value, tolerance, f"{key} of parameter {i} of {what}")
            assert came[key].dtype == value.dtype, f"{key}: {value.dtype} expected, {came[key].dtype} came"


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_mixed_dtypes_in_one_group(rule, device):
    """Each tensor is updated in its own dtype, with one norm over all of them."""
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32]
    for extra in ({}, {"max_norm": 0.5}, {"normalize_grads": True}):
        params = [parameter(torch.randn(40 + i, device=device).to(dt)) for i, dt in enumerate(dtypes)]
        both = BesideReference(rule, {**rule.usual, **extra}, params)
        for _ in range(5):
            grads = [torch.randn_like(p) for p in params]
            both.optimizer.zero_grad()
            both.step(grads)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_groups_with_their_own_options(rule, device):
    """Groups differ in lr, decay and sign; there is one norm over all groups."""
    params = new_params([(5,), (9,), (4,)], torch.float32, device)
    own = [{"lr": 0.01}, {"weight_decay": 0.0, "maximize": True}, {}]
    options = {**rule.usual, "max_norm": 0.7}
    optimizer = rule.ours([{"params": [p], **o} for p, o in zip(params, own, strict=True)], **options)
    both = BesideReference(rule, options, params)
    both.optimizer = optimizer
    both.reference = rule.reference(overrides=dict(enumerate(own)), **options)
    for _ in range(STEPS):
        both.step([torch.randn_like(p) for p in params])


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_lr_changed_between_steps(rule, device):
    """Each step uses the group's current lr; SGD's two velocities differ here."""
    forms = (
        [{}, {"lr_in_velocity": True}, {"lr_in_velocity": True, "nesterov": True}]
        if "lr_in_velocity" in rule.options
        else [{}]
    )
    for form in forms:
        both = BesideReference(rule, {**rule.usual, **form}, new_params(SMALL, torch.float32, device))
        for t in range(STEPS):
            lr = 0.1 / (t + 1) ** 0.3
            both.optimizer.param_groups[0]["lr"] = both.reference.options["lr"] = lr
            both.step(new_grads(t, SMALL, torch.float32, device))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_complex_parameters_are_pairs_of_reals(rule, dtype, device):
    extras = [{}, {"maximize": True}, {"max_norm": 0.5}]
    for extra in extras:
        case = {**rule.usual, **extra}
        params = [parameter(torch.randn(shape, dtype=dtype, device=device)) for shape in [(6,), (), (2, 3)]]
        twins = [parameter(p.clone()) for p in params]
        both = BesideReference(rule, case, params)
        theirs = rule.theirs(twins, **rule.to_torch(case))
        for _ in range(STEPS):
            grads = [torch.randn_like(p) for p in params]
            for twin, g in zip(twins, grads, strict=True):
                twin.grad = g.clone()
            if "max_norm" in case:
                torch.nn.utils.clip_grad_norm_(twins, case["max_norm"])
            both.step(grads)
            theirs.step()
        assert_like_torch(both.optimizer, theirs, str(case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_no_drift_in_ten_thousand_steps(rule, dtype):
    """Against torch in float64 on the same gradients; float32 may lose half a unit per step, without a preferred direction."""
    steps, size = 10_000, 8
    torch.set_num_threads(1)
    p = parameter(torch.randn(size, dtype=dtype))
    twin = parameter(p.detach().clone().double())
    case = {**rule.usual, "lr": 1e-3}
    ours, theirs = rule.ours([p], **case), rule.theirs([twin], foreach=False, **case)
    table = torch.randn(64, size, dtype=dtype) + 0.2
    for t in range(steps):
        p.grad = table[t % 64]
        twin.grad = p.grad.double()
        ours.step()
        theirs.step()
    allowed = {torch.float32: 1e-4, torch.float64: 1e-11}[dtype]
    assert_close(p, twin, allowed, f"parameter after {steps} steps")
    for key, value in theirs.state[twin].items():
        assert_close(ours.state[p][key], value, allowed, f"{key} after {steps} steps")


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_gradients_are_never_written(rule, dtype, device):
    """They are neither clipped, unscaled nor negated: the kernel only reads them."""
    for extra in ({"max_norm": 0.01}, {"normalize_grads": True}, {"maximize": True, "fused_unscale": True}):
        params = new_params(SMALL, dtype, device)
        both = BesideReference(rule, {**rule.usual, **extra}, params)
        grads = [torch.randn_like(p) for p in params]
        before = [to_numpy(g) for g in grads]
        versions = [g._version for g in grads]
        both.step(grads, 2.0 if "fused_unscale" in extra else None)
        for p, g, value, version in zip(params, grads, before, versions, strict=True):
            assert p.grad is g, f"{extra}: .grad was replaced"
            assert_close(g, value, 0.0, f"gradient after a step with {extra}")
            assert g._version == version, f"{extra}: the gradient's version counter rose"
