"""The references are right: they agree with torch.optim in float64, and with the formulas that torch does not have."""

from functools import partial

import numpy as np
import pytest
import torch
from reference import RULES, adam, clip, sgd
from reference.common import Case, Rule, every, name, norm_scale, pairs_of, total_norm

SHAPES = ((3,), (), (2, 3), (0,))
STEPS = 20
assert_close = partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13)


def gradients(t: int, rng: np.random.Generator) -> list[np.ndarray | None]:
    """Gradients of step t; those of the second parameter start late, those of the third are sometimes missing."""
    grads = [rng.standard_normal(shape) for shape in SHAPES]
    return [None if (i == 1 and t < 3) or (i == 2 and t % 4 == 1) else g for i, g in enumerate(grads)]


def assert_like_torch(rule: Rule, case: Case) -> None:
    rng = np.random.default_rng(0)
    params = [rng.standard_normal(shape) for shape in SHAPES]
    twins = [torch.nn.Parameter(torch.tensor(w)) for w in params]
    reference = rule.reference(**case)
    optimizer = rule.theirs(twins, **rule.to_torch(case))
    for t in range(STEPS):
        grads = gradients(t, rng)
        for p, g in zip(twins, grads, strict=True):
            p.grad = None if g is None else torch.tensor(g)
        if case["max_norm"] is not None:
            torch.nn.utils.clip_grad_norm_(twins, case["max_norm"])
        optimizer.step()
        reference.step(params, grads)

    for i, (w, p) in enumerate(zip(params, twins, strict=True)):
        assert_close(w, p.detach().numpy(), err_msg=f"parameter {i}, {case}")
        came, expected = reference.state.get(i, {}), optimizer.state[p]
        assert came.keys() == expected.keys(), f"state of parameter {i}, {case}"
        for key, value in expected.items():
            assert_close(came[key], value.numpy(), err_msg=f"{key} of parameter {i}, {case}")


EVERY_RULE = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


@EVERY_RULE
def test_reference_agrees_with_torch(rule):
    """In every case of the full product that torch.optim can compute, once."""
    cases = rule.product or rule.cases
    forms = [
        {**form, "max_norm": norm}
        for norm in rule.options["max_norm"]
        for form in rule.torch_forms([case for case in cases if case["max_norm"] == norm])
    ]
    assert len(forms) >= (16 if rule.product else 1), f"only {len(forms)} cases have a counterpart in torch"
    for form in forms:
        assert_like_torch(rule, form)


def test_adamw_reference_has_torchs_defaults():
    assert_like_torch(RULES["AdamW"], {"lr": 0.1, "amsgrad": True, "max_norm": None})


@pytest.mark.parametrize("rule", [pytest.param(rule, id=key) for key, rule in RULES.items() if rule.product])
def test_cases_cover_every_pair(rule):
    wanted = set().union(*map(pairs_of, rule.product))
    listed = set().union(*map(pairs_of, rule.cases))
    assert listed == wanted, f"pairs that no case has: {wanted - listed}"
    arguments = set(rule.reference().options)
    assert arguments == set(rule.options), "every argument must be varied"
    assert len({name(case, rule.options) for case in rule.cases}) == len(rule.cases), "test ids are ambiguous"


# ---- forms that torch does not have ----------------------------------------------------------------------------------


def quadratic(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A and b of the loss ½wᵀAw - bᵀw, whose gradient at w is Aw - b."""
    rng = np.random.default_rng(seed)
    half = rng.standard_normal((4, 4))
    return half @ half.T / 4 + np.eye(4), rng.standard_normal(4)


def learning_rate(t: int) -> float:
    return 0.1 / (t + 1) ** 0.3


def test_lecture_momentum_is_polyaks():
    """h ← μh + ηg, w ← w - h equals w₊ = w - ηg + μ(w - w₋), also when η changes."""
    a, b = quadratic()
    mu, w = 0.9, np.ones(4)
    reference = sgd.SGD(momentum=mu, lr_in_velocity=True)
    polyak, before = w.copy(), w.copy()
    for t in range(STEPS):
        reference.options["lr"] = learning_rate(t)
        reference.step([w], [a @ w - b])
        polyak, before = polyak - learning_rate(t) * (a @ polyak - b) + mu * (polyak - before), polyak
        assert_close(w, polyak, err_msg=f"step {t}")


def test_lecture_nesterov_uses_the_gradient_ahead():
    """The parameters hold φ = w - μh, where h₊ = μh + η∇L(w - μh) and w₊ = w - h₊."""
    a, b = quadratic()
    mu, w, h = 0.9, np.ones(4), np.zeros(4)
    reference, phi = sgd.SGD(momentum=mu, nesterov=True, lr_in_velocity=True), w.copy()
    for t in range(STEPS):
        lr = reference.options["lr"] = learning_rate(t)
        ahead = w - mu * h
        h = mu * h + lr * (a @ ahead - b)
        w = w - h
        reference.step([phi], [a @ phi - b])
        velocity = reference.state[0]["momentum_buffer"]
        assert_close(velocity, h, err_msg=f"velocity at step {t}")
        assert_close(phi + mu * velocity, w, err_msg=f"parameter at step {t}")


@pytest.mark.parametrize("nesterov", [False, True])
def test_velocity_forms_differ_only_when_lr_changes(nesterov):
    def run(lr_in_velocity, schedule):
        a, b = quadratic()
        w = np.ones(4)
        reference = sgd.SGD(momentum=0.9, nesterov=nesterov, lr_in_velocity=lr_in_velocity)
        for t in range(STEPS):
            reference.options["lr"] = schedule(t)
            reference.step([w], [a @ w - b])
        return w

    assert_close(run(True, lambda t: 0.1), run(False, lambda t: 0.1))
    assert not np.allclose(run(True, learning_rate), run(False, learning_rate), rtol=1e-3)


def test_adam_first_step_by_hand():
    """After one step m̂ = g and v̂ = g², so w moves by η·g/(|g| + ε), or by η·g/√(g² + ε), or, uncorrected, by more."""
    g, lr, eps = 2.0, 0.1, 0.5
    moved = {}
    for key, kwargs in {
        "torch": {},
        "inside": {"eps_inside_sqrt": True},
        "uncorrected": {"bias_correction": False},
        "both": {"eps_inside_sqrt": True, "bias_correction": False},
    }.items():
        w = np.zeros(1)
        adam.Adam(lr=lr, eps=eps, betas=(0.9, 0.99), **kwargs).step([w], [np.array([g])])
        moved[key] = -w[0]
    expected = {
        "torch": lr * g / (g + eps),
        "inside": lr * g / np.sqrt(g**2 + eps),
        "uncorrected": lr * 0.1 * g / (np.sqrt(0.01 * g**2) + eps),
        "both": lr * 0.1 * g / np.sqrt(0.01 * g**2 + eps),
    }
    assert moved == pytest.approx(expected, rel=1e-12)


def test_scale_of_the_norm():
    assert norm_scale(3.0, max_norm=1.0, normalize_grads=False) == 1.0 / (3.0 + 1e-6)
    assert norm_scale(0.5, max_norm=1.0, normalize_grads=False) == 1.0
    assert norm_scale(4.0, max_norm=None, normalize_grads=True) == 0.25
    assert norm_scale(0.0, max_norm=None, normalize_grads=True) == 0.0
    assert np.isnan(norm_scale(np.nan, max_norm=1.0, normalize_grads=False))
    assert np.isnan(norm_scale(np.nan, max_norm=None, normalize_grads=True))
    assert total_norm([np.array([3.0]), None, np.array([[4.0]])]) == 5.0


def test_found_inf_skips_everything():
    w, reference = np.ones(2), adam.Adam(max_norm=1.0)
    reference.step([w], [np.ones(2)], found_inf=True)
    assert (w == 1).all()
    assert reference.state == {}
    assert reference.grad_norm is None


def test_unscaling_comes_before_the_norm():
    scaled, plain = [np.ones(2)], [np.ones(2)]
    g = np.array([3.0, 4.0])
    sgd.SGD(lr=1.0, max_norm=1.0).step(scaled, [g * 8], grad_scale=8.0)
    sgd.SGD(lr=1.0, max_norm=1.0).step(plain, [g])
    assert_close(scaled[0], plain[0])


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 3.0, float("inf"), -float("inf"), 0.0, -1.0])
def test_clip_reference_agrees_with_torch(p):
    rng = np.random.default_rng(1)
    grads = [rng.standard_normal(shape) for shape in [(3,), (), (2, 3)]]
    params = [torch.nn.Parameter(torch.zeros(g.shape, dtype=torch.float64)) for g in grads]
    for w, g in zip(params, grads, strict=True):
        w.grad = torch.tensor(g)
    norm, clipped = clip.clip_grad_norm(grads, 0.5, p)
    assert norm == pytest.approx(torch.nn.utils.clip_grad_norm_(params, 0.5, p).item(), rel=1e-12)
    for w, g in zip(params, clipped, strict=True):
        assert_close(g, w.grad.numpy())
    torch.nn.utils.clip_grad_value_(params, 0.01)
    for w, g in zip(params, clip.clip_grad_value(clipped, 0.01), strict=True):
        assert_close(g, w.grad.numpy())


def test_products_leave_out_what_the_constructor_refuses():
    assert every({"max_norm": (None, 1.0), "normalize_grads": (False, True)}) == [
        {"max_norm": None, "normalize_grads": False},
        {"max_norm": None, "normalize_grads": True},
        {"max_norm": 1.0, "normalize_grads": False},
    ]
    rule = RULES["SGD"]
    for case in rule.product:
        rule.theirs([torch.nn.Parameter(torch.zeros(1))], **(rule.to_torch(case) or {}))
