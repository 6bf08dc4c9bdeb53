"""Lookahead against its reference over any optimizer; resuming at any step, the stack around it, refusals."""

import copy
import io
import math
import pickle

import numpy as np
import onepass
import pytest
import torch
from layouts import LAYOUTS, assert_only_view_written, in_layout
from onepass.optim import SAM, SGD, Adam, Lookahead
from onepass.optim.lookahead import parabola_minimum
from reference import lookahead
from support import ARITHMETIC, HALF, arithmetic_dtype, assert_close, assert_same, bits, parameter, snapshot, to_numpy
from wrappers import BASES, BesideLookahead, Bowl, exact

SHAPES = [(7,), (), (33, 31), (0,), (1000,)]
ISAS = onepass._native.isas()
EVERY_BASE = pytest.mark.parametrize("base", BASES.values(), ids=BASES)


def random(dtype=torch.float32, device="cpu", shapes=SHAPES) -> list[torch.Tensor]:
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def parameters(dtype=torch.float32, device="cpu", shapes=SHAPES) -> list[torch.nn.Parameter]:
    return [parameter(values) for values in random(dtype, device, shapes)]


def train(optimizer, params, steps: int, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p)
        optimizer.step()


# ---- values ----------------------------------------------------------------------------------------------------------


@EVERY_BASE
def test_against_the_reference(base, dtype, device):
    """20 steps, with a synchronisation at every third; weights and slow weights are compared after each."""
    if not exact(base, dtype):
        pytest.skip("torch's 16-bit states are not those of the reference")
    both = BesideLookahead(base, parameters(dtype, device))
    for _ in range(20):
        both.step(random(dtype, device))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.8, 1.0, 1, 0])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_every_k_and_alpha(k, alpha, device):
    both = BesideLookahead(BASES["SGD"], parameters(device=device), k, alpha)
    for _ in range(11):
        both.step(random(device=device))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex(dtype, device):
    both = BesideLookahead(BASES["SGD"], parameters(dtype, device))
    for _ in range(7):
        both.step(random(dtype, device))


def test_late_and_missing_gradients(device):
    """All slow weights are created in the first step; a parameter without a gradient stays unchanged, bit for bit."""
    both = BesideLookahead(BASES["Adam"], parameters(device=device))
    never = bits(both.params[4])
    for t in range(9):
        both.step([None if i == 4 or (i == 0 and t < 4) or (i == 2 and t % 2) else g for i, g in enumerate(random())])
    assert bits(both.params[4]) == never


@pytest.mark.parametrize("half", HALF, ids=str)
def test_slow_weights_keep_what_16_bits_lose(half, device):
    """Steps smaller than half a unit in the parameter's last place add up in the slow weights."""
    p = parameter(torch.ones(3, device=device, dtype=half))
    optimizer = Lookahead(SGD([p], lr=2 * torch.finfo(half).eps), k=1, alpha=0.01)
    for _ in range(10):
        p.grad = torch.ones_like(p)
        optimizer.step()
    slow = optimizer.state[p]["slow_param"]
    assert slow.dtype == torch.float32
    assert ((slow < 1) & (slow.to(half) == p)).all(), f"{slow} and {p}"


def test_fixed_alpha_one_is_the_wrapped_optimizer(dtype, device):
    """Both ends are exact: with alpha = 1 nothing changes, with 0 the weights return to the slow ones."""
    first = parameters(dtype, device)
    twins, back = copy.deepcopy(first), copy.deepcopy(first)
    start = [bits(p) for p in first]
    train(Lookahead(Adam(first, lr=0.1), 2, 1.0), first, 6)
    train(Adam(twins, lr=0.1), twins, 6)
    train(Lookahead(Adam(back, lr=0.1), 2, 0.0), back, 6)
    assert [bits(p) for p in first] == [bits(p) for p in twins]
    assert [bits(p) for p in back] == start


def test_nan_and_infinity_flow_as_in_lerp(device):
    """If a weight became infinite, the slow weight follows it, as in torch.lerp."""
    start = torch.tensor([1.0, 1.0, 1.0, math.inf, -math.inf, math.nan, 1.0], device=device)
    grad = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -math.inf, 1.0, 1e-40], device=device)
    p = parameter(start.clone())
    optimizer = Lookahead(SGD([p], lr=1.0), 1, 0.25)
    p.grad = grad
    optimizer.step()
    expected = torch.lerp(start, start - grad, 0.25)
    assert_close(p, expected, 0.0, "weights")
    assert_close(optimizer.state[p]["slow_param"], expected, 0.0, "slow weights")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_in_any_layout(layout, dtype, device):
    base, view = in_layout(layout, torch.randn(3, 4, 5, 2, device=device).to(dtype))
    both = BesideLookahead(BASES["SGD"], [parameter(view), parameter(torch.ones(5, device=device, dtype=dtype))])
    for _ in range(7):
        both.step([torch.randn_like(p) for p in both.params])
    assert_only_view_written(base, view, layout)


def test_several_dtypes_in_groups(device):
    params = [p for dtype in (torch.float32, torch.float64, torch.bfloat16) for p in parameters(dtype, device)]
    both = BesideLookahead(BASES["SGD"], params)
    for _ in range(7):
        both.step([torch.randn_like(p) for p in params])


def test_a_parameter_listed_twice():
    """torch steps it twice; it is synchronised only once."""
    p = parameter(torch.randn(5))
    start = p.detach().clone()
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = Lookahead(SGD([p, p], lr=0.1), 1, 0.25)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert_close(p, start - 0.25 * 0.2, 1e-6, "weights")


# ---- bits ------------------------------------------------------------------------------------------------------------


def run(dtype, sizes, offset=0, alpha=0.3) -> dict[str, bytes]:
    torch.manual_seed(3)
    params = [parameter(torch.randn(n + offset).to(dtype)[offset:]) for n in sizes]
    optimizer = Lookahead(Adam(params, lr=0.1), 2, alpha)
    train(optimizer, params, 4)
    return snapshot(optimizer)


@pytest.mark.parametrize("alpha", [0.3, 0.7])
@pytest.mark.parametrize("offset", [0, 1])
def test_same_bits_on_every_isa(offset, alpha, dtype):
    results = {}
    for isa in ISAS:
        with onepass._native.use_isa(isa):
            results[isa] = run(dtype, [0, 1, 3, 8, 15, 17, 64, 65, 1000, 4099], offset, alpha)
    for isa in ISAS:
        assert_same(results[isa], results["baseline"], f"{isa} against baseline")


def test_same_bits_for_any_thread_count():
    results = {}
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results[threads] = run(torch.float32, [2_100_003, 70_001, 0, 5])
    for threads in (2, 3):
        assert_same(results[threads], results[1], f"{threads} threads against 1")


# ---- alpha="quadratic" -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@EVERY_BASE
def test_quadratic_against_the_reference(base, dtype, device):
    params = parameters(dtype, device)
    bowl = Bowl(params)
    bowl.targets = [t.to(device) for t in bowl.targets]
    case = {**base.case, "lr": 0.4}  # large enough to jump over a minimum
    optimizer = Lookahead(base.optimizer(params, **case), 3, "quadratic")
    reference = lookahead.Lookahead(base.reference(**case), 3, "quadratic")
    expected = [to_numpy(p) for p in params]
    alphas, wanted, calls = [], [], []
    optimizer._synchronise = lambda alpha: (alphas.append(float(alpha)), Lookahead._synchronise(optimizer, alpha))
    reference.quadratic = lambda *args: (wanted.append(lookahead.Lookahead.quadratic(reference, *args)), wanted[-1])[1]

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss = bowl.loss()
        loss.backward()
        return loss

    for t in range(21):
        before = bowl.loss().item()
        assert optimizer.step(closure).item() == before, "the loss returned is the one before the step"
        if (t + 1) % 3 == 0:
            assert all(p.grad is None for p in params), "gradients of the extra evaluations are left"
        reference.step(expected, bowl.evaluate(expected)[1], bowl.evaluate)
        for i, (p, w) in enumerate(zip(params, expected, strict=True)):
            assert_close(p, w, 50 * ARITHMETIC[arithmetic_dtype(dtype)], f"parameter {i} after step {t + 1}")
    assert len(calls) == 21 + 2 * 7
    assert alphas == pytest.approx(wanted, rel=1e-3 if dtype == torch.float32 else 1e-9)
    assert len(alphas) == 7
    assert any(0 < alpha < 1 for alpha in wanted), f"no minimum inside: {wanted}"


def test_minimum_of_the_parabola():
    """Inside, clipped at either end, without a minimum, and with numbers that are not finite; by hand and reference."""
    by_hand = {
        (1.0, 1.0, 2.0): 0.5,  # symmetric
        (0.0, 4.0, 8.0): 0.0,  # 4x²
        (4.0, 0.0, 0.0): 1.0,  # 4(1-x)²
        (0.0, 1.0, 9.0): 7 / 16,  # 8x² - 7x
        (5.0, 1.0, -1.0): 1.0,  # minimum beyond 1
        (0.0, 5.0, 6.0): 0.0,  # minimum before 0
        (1.0, 0.0, -4.0): 1.0,  # opens downwards, fell
        (0.0, 1.0, -4.0): 0.5,  # opens downwards, rose
        (1.0, 1.0, 0.0): 1.0,  # flat
        (0.0, 1.0, 1.0): 0.5,  # a straight line up
        (math.nan, 1.0, 2.0): 0.5,
        (1.0, math.inf, 2.0): 0.5,
        (math.inf, 1.0, 2.0): 0.5,
        (1.0, 1.0, math.nan): 0.5,
        (1.0, 1.0, math.inf): 0.5,
    }
    for numbers, alpha in by_hand.items():
        tensors = [torch.tensor(number, dtype=torch.float64) for number in numbers]
        assert parabola_minimum(*tensors).item() == alpha, f"{numbers}: {parabola_minimum(*tensors)}, not {alpha}"
        with np.errstate(all="ignore"):
            assert lookahead.minimum(*numbers) == alpha, f"the reference at {numbers}"


def test_quadratic_of_16_bits_keeps_its_slow_weights():
    """The losses are those at the rounded weights; afterwards the slow weights have all of their bits."""
    p = parameter(torch.randn(9).bfloat16())
    optimizer = Lookahead(SGD([p], lr=0.9), 1, "quadratic")

    def closure():
        optimizer.zero_grad()
        loss = (p.float() - torch.linspace(1, 3, 9)).square().sum()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    slow = optimizer.state[p]["slow_param"]
    assert bits(slow.bfloat16()) == bits(p)
    assert bits(slow) != bits(slow.bfloat16().float()), "nothing is there that 16 bits do not hold"


@pytest.mark.parametrize("failing", [2, 3])
def test_a_closure_that_fails_leaves_the_weights(failing):
    """If either of the extra evaluations fails, the weights are those of the wrapped optimizer's step."""
    p, twin = parameters(shapes=[(5,)])[0], None
    twin = parameter(p.detach().clone())
    optimizer, other, calls = Lookahead(SGD([p], lr=0.1), 1, "quadratic"), SGD([twin], lr=0.1), []

    def closure():
        calls.append(1)
        if len(calls) == failing:
            raise KeyError("lost")
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    with pytest.raises(KeyError):
        optimizer.step(closure)
    twin.grad = 2 * twin.detach()
    other.step()
    assert bits(p) == bits(twin)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def through_file(state_dict: dict) -> dict:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("stop", range(7))
@EVERY_BASE
def test_resumed_at_any_step(base, stop, dtype, device):
    """Loaded from a file into an optimizer made with other arguments: bit for bit an uninterrupted run."""
    params = parameters(dtype, device)
    twins = copy.deepcopy(params)
    straight = Lookahead(base.optimizer(twins, **base.case), 3, 0.25)
    train(straight, twins, stop)
    train(straight, twins, 4, seed=2)
    first = Lookahead(base.optimizer(params, **base.case), 3, 0.25)
    train(first, params, stop)
    saved = through_file(first.state_dict())
    second = Lookahead(base.optimizer(params, **{**base.case, "lr": 99.0}), 7, 0.9)
    second.load_state_dict(state_dict=saved)
    train(second, params, 4, seed=2)
    assert_same(snapshot(second), snapshot(straight), f"resumed after {stop} steps")
    assert second.param_groups[0]["lookahead_step"] == stop + 4


@pytest.mark.parametrize("how", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"])
def test_copies_are_independent(how):
    params = parameters()
    optimizer = Lookahead(Adam(params, lr=0.1), 3, 0.25)
    train(optimizer, params, 4)
    before = snapshot(optimizer)
    others, other = how((params, optimizer))
    assert_same(snapshot(other), before, "the copy")
    train(other, others, 4, seed=2)
    assert_same(snapshot(optimizer), before, "the original after training its copy")
    train(optimizer, params, 4, seed=2)
    assert_same(snapshot(other), snapshot(optimizer), "copy and original")
    assert other.param_groups is other.base_optimizer.param_groups


def test_the_wrapped_optimizers_state_is_its_own():
    """It contains nothing of Lookahead's; `state` and `state_dict()` contain both."""
    params = parameters()
    optimizer = Lookahead(Adam(params, lr=0.1))
    train(optimizer, params, 1)
    assert optimizer.base_optimizer.state[params[0]].keys() == {"step", "exp_avg", "exp_avg_sq"}
    both = {"step", "exp_avg", "exp_avg_sq", "slow_param"}
    assert optimizer.state[params[0]].keys() == optimizer.state_dict()["state"][0].keys() == both


def test_hooks_of_checkpoints():
    params, seen = parameters(), []
    optimizer = Lookahead(SGD(params, lr=0.1))
    optimizer.register_state_dict_post_hook(lambda o, d: {**d, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, d: (seen.append(d.pop("extra")), d)[1])
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o))
    train(optimizer, params, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [1, optimizer]


def test_a_checkpoint_of_the_wrapped_optimizer_alone():
    """Loaded by base_optimizer; torch then drops Lookahead's options in the groups and keeps its own."""
    for base in (torch.optim.Adam, Adam):
        params = parameters()
        plain = base(params, lr=0.1)
        train(plain, params, 2)
        optimizer = Lookahead(base(params, lr=99.0), 2, 0.25)
        optimizer.base_optimizer.load_state_dict(plain.state_dict())
        train(optimizer, params, 2)
        assert optimizer.param_groups[0]["lr"] == 0.1
        for p in params:
            assert_close(p, optimizer.state[p]["slow_param"], 0.0, "synchronised after k = 2 steps")


# ---- in the stack ----------------------------------------------------------------------------------------------------


def test_schedulers_drive_the_wrapped_optimizer():
    """Schedulers on the wrapper and on the wrapped optimizer, and OneCycleLR, which cycles betas by the defaults."""
    for wrap_first in (True, False):
        params = parameters()
        inner = Adam(params, lr=0.1)
        optimizer = Lookahead(inner)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer if wrap_first else inner, 1, 0.5)
        train(optimizer, params, 1)
        schedule.step()
        assert inner.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == 0.05
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=10, max_momentum=0.95)
    before = inner.param_groups[0]["betas"]
    train(optimizer, params, 1)
    cycle.step()
    assert inner.param_groups[0]["betas"] != before


def test_step_hooks_closure_and_zero_grad():
    params, seen = parameters(), []
    optimizer = Lookahead(SGD(params, lr=0.1))
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.base_optimizer.register_step_pre_hook(lambda *_: seen.append("inside"))

    def closure():
        loss = torch.stack([p.square().sum() for p in params]).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    assert seen == ["before", "inside", "after"]
    optimizer.zero_grad(set_to_none=False)
    assert all((p.grad == 0).all() for p in params)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


def test_added_groups_synchronise_with_the_others():
    """The count is shared; the new group's slow weights are created when it joins."""
    both = BesideLookahead(BASES["SGD"], parameters())
    for _ in range(2):
        both.step(random())
    new = parameter(torch.randn(3))
    for add in (both.optimizer.add_param_group, both.optimizer.base_optimizer.add_param_group):
        with pytest.raises((TypeError, ValueError)):
            add("no group")
    both.optimizer.add_param_group({"params": [new]})
    both.params.append(new)
    both.expected.append(to_numpy(new))
    for _ in range(5):
        both.step([*random(), torch.randn(3)])
    assert [group["lookahead_step"] for group in both.optimizer.param_groups] == [7, 7]


def test_frozen_parameters_cost_nothing():
    """Their slow weights are created in the first step that trains them."""
    params = parameters()
    params[2].requires_grad_(False)
    optimizer = Lookahead(SGD(params, lr=0.1), 2)
    train(optimizer, params[:2], 3)
    assert params[2] not in optimizer.state
    params[2].requires_grad_(True)
    start = bits(params[2])
    params[2].grad = torch.ones_like(params[2])
    made = []
    optimizer.base_optimizer.register_step_pre_hook(
        lambda *_: made.append(bits(optimizer.state[params[2]]["slow_param"]))
    )
    optimizer.step()
    assert made == [start]


@pytest.mark.parametrize("inner", [{}, {"fused_unscale": True}], ids=["", "fused_unscale"])
def test_a_scaler_that_skips_does_not_count(inner, device):
    """GradScaler unscales and skips around the wrapper; the numbers are those of training without it."""
    params = parameters(device=device)
    twins = copy.deepcopy(params)
    optimizer = Lookahead(Adam(params, lr=0.1, **inner), 2, 0.25)
    other = Lookahead(Adam(twins, lr=0.1), 2, 0.25)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    for t in range(6):
        grads = random(device=device)
        for p, twin, g in zip(params, twins, grads, strict=True):
            p.grad, twin.grad = g * scaler.get_scale(), g
        if t == 3:
            params[0].grad[0] = math.inf
        scaler.scale(torch.zeros((), device=device))
        scaler.step(optimizer)
        scaler.update()
        if t != 3:
            other.step()
    assert_same(snapshot(optimizer), snapshot(other), "with a scaler")
    assert optimizer.param_groups[0]["lookahead_step"] == 5


def test_over_sam():
    """Wrappers of different kinds nest in this order: a step of SAM, then Lookahead's part."""
    params = parameters()
    twins = copy.deepcopy(params)
    optimizer = Lookahead(SAM(params, SGD, rho=0.1, lr=0.1), 2, 0.25)
    sam = SAM(twins, SGD, rho=0.1, lr=0.1)
    slow = [p.detach().clone() for p in twins]

    def closure_of(params, optimizer):
        def closure():
            optimizer.zero_grad()
            loss = Bowl(params).loss()
            loss.backward()
            return loss

        return closure

    for t in range(4):
        optimizer.step(closure_of(params, optimizer))
        sam.step(closure_of(twins, sam))
        if t % 2:
            with torch.no_grad():
                for p, s in zip(twins, slow, strict=True):
                    s.lerp_(p, 0.25)
                    p.copy_(s)
    for p, twin in zip(params, twins, strict=True):
        assert_close(p, twin, 1e-6, "parameter")
    saved = through_file(optimizer.state_dict())
    optimizer.load_state_dict(saved)


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"k": 0}, "Invalid k value"),
        ({"k": -1}, "Invalid k value"),
        ({"k": 2.5}, "Invalid k value"),
        ({"alpha": -0.1}, "Invalid alpha value"),
        ({"alpha": 1.1}, "Invalid alpha value"),
        ({"alpha": math.nan}, "Invalid alpha value"),
        ({"alpha": "cubic"}, "Invalid alpha value"),
    ],
    ids=str,
)
def test_options_out_of_range(arguments, text):
    inner = SGD(parameters(), lr=0.1)
    before = {key: value for key, value in inner.param_groups[0].items() if key != "params"}
    with pytest.raises(ValueError, match=text):
        Lookahead(inner, **arguments)
    assert {key: value for key, value in inner.param_groups[0].items() if key != "params"} == before
    optimizer = Lookahead(inner)
    with pytest.raises(ValueError, match=text):
        optimizer.add_param_group(
            {"params": parameters(), **{f"lookahead_{key}": value for key, value in arguments.items()}}
        )
    assert len(optimizer.param_groups) == 1


def test_wrapping_other_objects():
    params = parameters()
    with pytest.raises(TypeError, match=r"^list is not an Optimizer; Lookahead wraps an optimizer: Lookahead\("):
        Lookahead(params)


def test_wrapping_twice():
    inner = SGD(parameters(), lr=0.1)
    optimizer = Lookahead(inner)
    for wrapped in (inner, optimizer):
        with pytest.raises(ValueError, match="wrapped in Lookahead already"):
            Lookahead(wrapped, k=2)
    assert optimizer.param_groups[0]["lookahead_k"] == 5


def test_quadratic_without_a_closure():
    """Python's sentence for a missing closure; nothing is stepped."""
    params = parameters()
    with pytest.raises(TypeError) as theirs:
        torch.optim.LBFGS(params).step()
    optimizer = Lookahead(Adam(params, lr=0.1), 2, "quadratic")
    before = snapshot(optimizer)
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(TypeError) as ours:
        optimizer.step()
    sentence = str(theirs.value).partition("step() ")[2]
    assert sentence in str(ours.value)
    assert_same(snapshot(optimizer), before, "after the error")
    assert optimizer.param_groups[0]["lookahead_step"] == 0


def test_groups_that_disagree():
    a, b = parameters(shapes=[(3,), (3,)])
    optimizer = Lookahead(SGD([{"params": [a]}, {"params": [b]}], lr=0.1))
    optimizer.param_groups[1]["lookahead_k"] = 3
    with pytest.raises(ValueError, match="disagree"):
        optimizer.step()


@pytest.mark.parametrize("bad", [lambda: torch.zeros(1).expand(4), lambda: torch.zeros(4, device="meta")])
def test_parameters_that_cannot_be_averaged(bad):
    """Refused before the wrapped optimizer (here torch's) steps any of them."""
    fine, odd = parameter(torch.ones(3)), parameter(bad())
    optimizer = Lookahead(torch.optim.SGD([fine, odd], lr=0.1))
    for p in (fine, odd):
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="parameter 1 of group 0"):
        optimizer.step()
    assert (fine == 1).all()
    assert len(optimizer.state) == 0


def test_an_error_of_the_wrapped_optimizer_changes_nothing():
    params = parameters()
    optimizer = Lookahead(Adam(params, lr=0.1), 2)
    params[0].grad = torch.zeros(7)
    params[2].grad = torch.zeros(33, 31).to_sparse()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert_same(snapshot(optimizer), before, "after the error")
    assert optimizer.param_groups[0]["lookahead_step"] == 0
    with pytest.raises(ValueError, match="boom"):
        optimizer.step(lambda: (_ for _ in ()).throw(ValueError("boom")))
    assert_same(snapshot(optimizer), before, "after the closure's error")


def foreign_states(params):
    """State dicts that do not belong to a Lookahead over SGD with momentum."""
    plain, adam = SGD(params, lr=0.1, momentum=0.9), Lookahead(Adam(params, lr=0.1))
    sam = SAM(params, SGD, lr=0.1, momentum=0.9)
    train(plain, params, 1)
    train(adam, params, 1)
    other = [parameter(torch.zeros(2))]
    longer, reshaped = Lookahead(SGD(other, lr=0.1)), Lookahead(SGD(params, lr=0.1, momentum=0.9))
    train(reshaped, params, 1)
    bent, broken, outside = (copy.deepcopy(reshaped.state_dict()) for _ in range(3))
    bent["state"][0]["slow_param"] = torch.zeros(8)
    broken["state"][0]["slow_param"] = 1.0
    outside["param_groups"][0]["lookahead_k"] = 0
    return {
        "plain": (plain.state_dict(), "not one of Lookahead"),
        "SAM": (sam.state_dict(), "not one of Lookahead"),
        "another rule": (adam.state_dict(), "of another optimizer"),
        "another model": (longer.state_dict(), "doesn't match the size"),
        "other shapes": (bent, "slow_param.*shape"),
        "no tensor": (broken, "slow_param.*float"),
        "options": (outside, "Invalid k value"),
    }


@pytest.mark.parametrize(
    "which", ["plain", "SAM", "another rule", "another model", "other shapes", "no tensor", "options"]
)
def test_foreign_states_are_refused(which):
    params = parameters()
    state, text = foreign_states(params)[which]
    optimizer = Lookahead(SGD(params, lr=0.1, momentum=0.9))
    train(optimizer, params, 2)
    before, groups = snapshot(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(ValueError, match=text):
        optimizer.load_state_dict(state)
    assert_same(snapshot(optimizer), before, "after the error")
    assert optimizer.state_dict()["param_groups"] == groups
