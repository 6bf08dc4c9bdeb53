"""Features of a single rule: states that do not start at zero, special forms and edge cases."""

import copy
import math

import onepass
import pytest
import torch
from onepass import _native
from rules import RULES, BesideReference
from support import assert_close, assert_same, bits, parameter, snapshot


def stepped(optimizer: torch.optim.Optimizer, p: torch.Tensor, grads: list[float]) -> torch.Tensor:
    for g in grads:
        p.grad = torch.full_like(p, g)
        optimizer.step()
    return p.detach()


# ---- NAdam and ASGD: numbers carried from step to step ----------------------------------------------------------------

CARRIED = [("NAdam", "mu_product"), ("ASGD", "eta"), ("ASGD", "mu")]


@pytest.mark.parametrize(("key", "name"), CARRIED)
def test_carried_numbers_stay_float32_through_checkpoints(key, name, dtype):
    """torch's load_state_dict casts them to the parameter's dtype, also for a 0-d float64 parameter."""
    for shape in ((), (5,)):
        p, rule = parameter(torch.ones(shape, dtype=dtype)), RULES[key]
        optimizer = rule.ours([p], **rule.usual)
        stepped(optimizer, p, [1.0, 2.0, 3.0, 4.0, 5.0])
        saved = copy.deepcopy(optimizer.state_dict())
        again = rule.ours([p])
        again.load_state_dict(saved)
        came, expected = again.state[p][name], saved["state"][0][name]
        assert came.dtype == torch.float32
        assert bits(came) == bits(expected), f"{came.item()} came, {expected.item()} expected"


@pytest.mark.parametrize("key", ["NAdam", "ASGD"])
def test_carried_numbers_in_torchs_default_dtype(key):
    """With float64 as default dtype torch keeps them in float64, and so do we: the same numbers to the last places."""
    torch.set_default_dtype(torch.float64)
    try:
        p, twin, rule = parameter(torch.ones(5)), parameter(torch.ones(5)), RULES[key]
        ours, theirs = rule.ours([p], **rule.usual), rule.theirs([twin], **rule.usual)
        grads = [float(g) for g in torch.randn(30)]
        assert_close(stepped(ours, p, grads), stepped(theirs, twin, grads), 1e-14, "parameter")
        for name in ours.scalar_states:
            came, expected = ours.state[p][name], theirs.state[twin][name]
            assert came.dtype == expected.dtype == torch.float64
            assert_close(came, expected, 1e-15, name)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("bad", [torch.ones(2), torch.ones((), dtype=torch.int64), 0.5, "half"], ids=str)
@pytest.mark.parametrize(("key", "name"), CARRIED)
def test_carried_numbers_that_are_none(key, name, bad):
    p = parameter(torch.ones(5))
    optimizer = RULES[key].ours([p])
    stepped(optimizer, p, [1.0])
    optimizer.state[p][name] = bad
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match=rf"parameter 0 of group 0: its state '{name}' is a"):
        optimizer.step()
    assert torch.equal(p, before)
    assert optimizer.state[p]["step"] == 1, "the refused step was counted"


@pytest.mark.parametrize("there", [True, False], ids=["torch to ours", "ours to torch"])
def test_asgd_checkpoints_under_a_scheduler(there):
    """A step uses the eta that the step before it stored, from the learning rate of that step: it is in the checkpoint."""
    rule = RULES["ASGD"]
    first, second = (rule.theirs, rule.ours) if there else (rule.ours, rule.theirs)
    p, twin = (parameter(torch.linspace(-1, 1, 7, dtype=torch.float64)) for _ in range(2))
    straight, optimizer = rule.theirs([twin], **rule.usual), first([p], **rule.usual)
    grads = torch.randn(12, 7, dtype=torch.float64)
    for t, g in enumerate(grads):
        if t == 6:
            saved, optimizer = copy.deepcopy(optimizer.state_dict()), second([p], lr=9.0)
            optimizer.load_state_dict(saved)
            for name in ("eta", "mu"):
                optimizer.state[p][name] = optimizer.state[p][name].float()  # torch made them float64
        for q, stepping in ((p, optimizer), (twin, straight)):
            stepping.param_groups[0]["lr"] = 0.1 / (t + 1)
            q.grad = g.clone()
            stepping.step()
        assert_close(p, twin, 1e-13, f"parameter after step {t + 1}")
        assert_close(optimizer.state[p]["ax"], straight.state[twin]["ax"], 1e-13, f"average after step {t + 1}")


def test_asgd_averages_the_weights():
    """The average is the mean of the weights after the steps t0 + 2, t0 + 3, ..."""
    p = parameter(torch.linspace(-1, 1, 7, dtype=torch.float64))
    optimizer = onepass.optim.ASGD([p], lr=0.1, t0=3)
    visited = []
    for g in torch.randn(12, 7, dtype=torch.float64):
        p.grad = g
        optimizer.step()
        visited.append(p.detach().clone())
        mean = torch.stack(visited[4:] or visited[-1:]).mean(0)
        assert_close(optimizer.state[p]["ax"], mean, 1e-6, f"average after step {len(visited)}")  # mu is float32


def test_asgd_first_step_skipped_for_an_overflow():
    """The first step that counts has the step size of its own learning rate, not of the skipped one."""
    p, twin = parameter(torch.ones(3)), parameter(torch.ones(3))
    optimizer, other = onepass.optim.ASGD([p], lr=0.5), onepass.optim.ASGD([twin], lr=0.1)
    # Where kernels on a device decide to skip, the states have been made by then, with the learning rate of that time.
    optimizer.state[p].update(optimizer._new_states(optimizer.param_groups[0], p))
    assert optimizer.state[p]["eta"] == 0.5
    optimizer.param_groups[0]["lr"] = 0.1
    p.grad, twin.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    other.step()
    assert_same(snapshot(optimizer), snapshot(other), "the first step that counts")


def test_betas_changed_between_steps():
    """mu_product is the product of each step's momentum, not a power of the current one."""
    both = BesideReference(RULES["NAdam"], RULES["NAdam"].usual, [parameter(torch.randn(6, dtype=torch.float64))])
    for beta in (0.9, 0.5, 0.8, 0.3):
        both.optimizer.param_groups[0]["betas"] = both.reference.options["betas"] = (beta, 0.999)
        both.step([torch.randn(6, dtype=torch.float64)])


# ---- RMSprop ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [{}, {"eps_inside_sqrt": True}], ids=str)
def test_centered_rmsprop_under_a_constant_gradient(form, device):
    """G - a^2 rounds below 0; torch.optim then returns NaN."""
    p, twin = parameter(torch.zeros(50, device=device)), parameter(torch.zeros(50, device=device))
    grads = torch.linspace(0.1, 0.9, 50, device=device)
    case = {"lr": 1e-3, "alpha": 0.5, "eps": 1.0, "centered": True}
    ours, theirs = onepass.optim.RMSprop([p], **case, **form), torch.optim.RMSprop([twin], **case)
    for _ in range(200):
        p.grad, twin.grad = grads, grads.clone()
        ours.step()
        theirs.step()
    assert bool(twin.isnan().any()), "torch has mended it: the documentation says otherwise"
    assert bool(p.isfinite().all()), f"{int((~p.isfinite()).sum())} elements are not finite"
    assert_close(p, -200 * 1e-3 * grads, 2e-2, "with D near eps = 1")


def test_nan_gradient_of_centered_rmsprop(device):
    """The clamp at 0 keeps NaN, so it does not hide that training went wrong."""
    p = parameter(torch.ones(3, device=device))
    optimizer = onepass.optim.RMSprop([p], centered=True)
    p.grad = torch.tensor([1.0, math.nan, math.inf], device=device)
    optimizer.step()
    assert p.isnan().tolist() == [False, True, True], p


# ---- Rprop -----------------------------------------------------------------------------------------------------------


def test_rprop_by_hand():
    """Gradient signs + + - - + 0 +; etas 0.5 and 2, initial step size 1."""
    grads = [1.0, 1.0, -1.0, -1.0, 1.0, 0.0, 1.0]
    expected = {  # step sizes, and the parameter's path from 0
        "irprop-": ([1, 2, 1, 1, 0.5, 0.5, 0.5], [-1, -3, -3, -2, -2, -2, -2.5]),
        "rprop-": ([1, 2, 1, 2, 1, 0.5, 0.25], [-1, -3, -2, 0, -1, -1, -1.25]),
    }
    for variant, (sizes, places) in expected.items():
        p = parameter(torch.zeros(1))
        optimizer = onepass.optim.Rprop([p], lr=1.0, etas=(0.5, 2.0), variant=variant)
        for t, g in enumerate(grads):
            p.grad = torch.full_like(p, g)
            optimizer.step()
            state = optimizer.state[p]
            assert (state["step_size"].item(), p.item()) == (sizes[t], places[t]), f"{variant}, step {t + 1}"


@pytest.mark.parametrize("variant", ["irprop-", "rprop-"])
def test_rprop_reads_lr_once(variant):
    p = parameter(torch.zeros(1))
    lr = torch.tensor(0.5)
    optimizer = onepass.optim.Rprop([p], lr=lr, variant=variant)
    stepped(optimizer, p, [1.0])
    lr.fill_(7.0)
    stepped(optimizer, p, [1.0])
    assert_close(optimizer.state[p]["step_size"], torch.tensor([0.6]), 1e-7, "step size")


def test_nan_has_no_sign(device):
    """A NaN gradient moves nothing and leaves the step sizes, in this step and in the next."""
    p, twin = parameter(torch.ones(3, device=device)), parameter(torch.ones(3, device=device))
    ours, theirs = onepass.optim.Rprop([p]), torch.optim.Rprop([twin])
    for g in (1.0, math.nan, 2.0, -1.0):
        assert_close(stepped(ours, p, [g]), stepped(theirs, twin, [g]), 1e-7, f"parameter after {g}")
        for key, value in theirs.state[twin].items():
            assert_close(ours.state[p][key], value, 1e-7, f"{key} after {g}")


# ---- Adagrad ---------------------------------------------------------------------------------------------------------


def test_share_memory():
    """Before the first step it creates the states, as in torch; later steps keep using the same memory."""
    p, other = parameter(torch.ones(3)), parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = onepass.optim.Adagrad([p, other], initial_accumulator_value=0.25)
    optimizer.share_memory()
    for q in (p, other):
        state = optimizer.state[q]
        assert state["sum"].is_shared()
        assert state["sum"].dtype == torch.float32
        assert bool((state["sum"] == 0.25).all())
        assert state["step"] == 0
    shared = optimizer.state[p]["sum"]
    stepped(optimizer, p, [1.0, 1.0])
    assert optimizer.state[p]["sum"] is shared
    assert shared.tolist() == [2.25] * 3
    before = snapshot(optimizer)
    optimizer.share_memory()
    assert snapshot(optimizer) == before


def test_accumulator_of_complex_parameters_starts_in_both_parts():
    p = parameter(torch.ones(3, dtype=torch.complex64))
    optimizer = onepass.optim.Adagrad([p], initial_accumulator_value=0.5)
    optimizer.share_memory()
    assert optimizer.state[p]["sum"].tolist() == [0.5 + 0.5j] * 3


# ---- all -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_classes_name_the_scalar_states_of_their_rule(rule):
    assert set(rule.ours.scalar_states) - {"step"} == set(_native.variants(rule.ours.rule)[0].carried)
