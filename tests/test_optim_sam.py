"""SAM against its reference over any optimizer; restoring bit for bit, resuming, the stack around it, refusals."""

import copy
import functools
import io
import math
import pickle
import re
from pathlib import Path

import onepass
import pytest
import torch
from layouts import LAYOUTS, assert_only_view_written, in_layout
from onepass.optim import SAM, SGD, Adam, Lookahead
from reference import sam
from support import (
    ARITHMETIC,
    arithmetic_dtype,
    assert_close,
    assert_same,
    bits,
    parameter,
    snapshot,
    to_numpy,
)
from wrappers import BASES, BesideSAM, Bowl, exact

SHAPES = [(7,), (), (33, 31), (0,), (1000,)]
ISAS = onepass._native.isas()
EVERY_BASE = pytest.mark.parametrize("base", BASES.values(), ids=BASES)
ADAPTIVE = pytest.mark.parametrize("adaptive", [False, True], ids=["", "adaptive"])
PAGE = Path(__file__).parent.parent / "docs" / "rules" / "sam.md"


def random(dtype=torch.float32, device="cpu", shapes=SHAPES) -> list[torch.Tensor]:
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def parameters(dtype=torch.float32, device="cpu", shapes=SHAPES) -> list[torch.nn.Parameter]:
    return [parameter(values) for values in random(dtype, device, shapes)]


def set_grads(params, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p)


def train(optimizer, params, steps: int, seed: int = 1) -> None:
    """Steps by hand with gradients drawn from the seed."""
    for t in range(steps):
        set_grads(params, 1000 * seed + 2 * t)
        optimizer.first_step(zero_grad=True)
        set_grads(params, 1000 * seed + 2 * t + 1)
        optimizer.second_step(zero_grad=True)


def bowl_closure(optimizer, params):
    bowl = Bowl(params)
    bowl.targets = [t.to(params[0].device) for t in bowl.targets]

    def closure():
        loss = bowl.loss()
        loss.backward()
        return loss

    return bowl, closure


# ---- values ----------------------------------------------------------------------------------------------------------


@ADAPTIVE
@EVERY_BASE
def test_against_the_reference(base, adaptive, dtype, device):
    """20 steps by hand: the perturbed weights, the weights that the base optimizer sees, and its result."""
    if not exact(base, dtype):
        pytest.skip("torch's 16-bit states are not those of the reference")
    both = BesideSAM(base, parameters(dtype, device), rho=0.5, adaptive=adaptive)
    for _ in range(20):
        both.step(random(dtype, device), random(dtype, device))


@ADAPTIVE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@EVERY_BASE
def test_closures_against_the_reference(base, adaptive, dtype, device):
    """20 steps on a loss that is not convex: step(closure) computes both gradients and returns the first loss."""
    params = parameters(dtype, device)
    optimizer = SAM(params, base.optimizer, rho=0.3, adaptive=adaptive, **base.case)
    reference = sam.SAM(base.reference(**base.case), rho=0.3, adaptive=adaptive)
    bowl, closure = bowl_closure(optimizer, params)
    expected = [to_numpy(p) for p in params]
    for t in range(20):
        loss = bowl.loss().item()
        optimizer.zero_grad()
        assert optimizer.step(closure).item() == loss, "the loss of the first evaluation"
        reference.step(expected, lambda ws: bowl.evaluate(ws)[1])
        for i, (p, w) in enumerate(zip(params, expected, strict=True)):
            assert_close(p, w, 50 * ARITHMETIC[arithmetic_dtype(dtype)], f"parameter {i} after step {t + 1}")


@pytest.mark.parametrize("rho", [0, 0.05, 3.0])
@ADAPTIVE
def test_every_rho(rho, adaptive, device):
    both = BesideSAM(BASES["SGD"], parameters(device=device), rho=rho, adaptive=adaptive)
    for _ in range(3):
        both.step(random(device=device), random(device=device))


@ADAPTIVE
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex(dtype, adaptive, device):
    """As pairs of reals, also in |w| g."""
    both = BesideSAM(BASES["SGD"], parameters(dtype, device), rho=0.5, adaptive=adaptive)
    for _ in range(3):
        both.step(random(dtype, device), random(dtype, device))


@ADAPTIVE
def test_groups_with_their_own_rho(adaptive, device):
    """The norm is over all groups. A rho of zero leaves its group unchanged; a later group may have its own rho."""
    params = parameters(device=device)
    groups = [{"params": params[:2], "rho": 0.0}, {"params": params[2:3]}, {"params": params[3:], "rho": 2.0}]
    both = BesideSAM(BASES["SGD"], params, groups, rho=0.5, adaptive=adaptive)
    assert [group["sam_rho"] for group in both.optimizer.param_groups] == [0.0, 0.5, 2.0]
    assert groups[0].keys() == {"params", "rho"}, "the caller's dicts were changed"
    for _ in range(3):
        both.step(random(device=device), random(device=device))
    new = parameter(torch.randn(3, device=device))
    both.optimizer.add_param_group({"params": [new], "rho": 0.7})
    both.params.append(new)
    both.expected.append(to_numpy(new))
    both.reference.rhos[5] = 0.7
    both.step([*random(device=device), torch.ones_like(new)], [*random(device=device), torch.ones_like(new)])
    both.optimizer.param_groups[0]["sam_rho"] = both.reference.rhos[0] = both.reference.rhos[1] = 1.0
    both.step([*random(device=device), torch.ones_like(new)], [*random(device=device), torch.ones_like(new)])


def test_a_base_with_a_rho_of_its_own():
    """Adadelta's rho has another meaning and keeps the value that the base was created with."""
    params, adadelta = parameters(), functools.partial(torch.optim.Adadelta, rho=0.8)
    optimizer = SAM(params, adadelta, rho=0.3, lr=0.1)
    assert (optimizer.param_groups[0]["rho"], optimizer.param_groups[0]["sam_rho"]) == (0.8, 0.3)
    train(optimizer, params, 2)


def test_maximize_reverses_the_perturbation(device):
    """The loss is then -loss: the perturbation descends the loss that the step climbs."""
    params = parameters(device=device)
    twins = copy.deepcopy(params)
    up, down = SAM(params, SGD, rho=0.5, lr=0.1, maximize=True), SAM(twins, SGD, rho=0.5, lr=0.1)
    for sign, optimizer, ps in ((-1, up, params), (1, down, twins)):
        set_grads(ps, 5)
        for p in ps:
            p.grad.mul_(sign)
        optimizer.first_step()
    for p, twin in zip(params, twins, strict=True):
        assert_close(p, twin, 0.0, "perturbed parameter")
    up.second_step()
    down.second_step()
    for p, twin in zip(params, twins, strict=True):
        assert_close(p, twin, 0.0, "parameter")


def test_missing_and_late_gradients(device):
    """A parameter without a gradient is neither perturbed nor restored to weights of an earlier step."""
    both = BesideSAM(BASES["Adam"], parameters(device=device), rho=0.5)
    for t in range(6):
        first = [None if (i + t) % 3 == 0 else g for i, g in enumerate(random(device=device))]
        second = [None if (i + t) % 4 == 0 else g for i, g in enumerate(random(device=device))]
        both.step(first, second)


def test_no_gradients_at_all(device):
    both = BesideSAM(BASES["SGD"], parameters(device=device))
    nothing = [None] * len(SHAPES)
    both.step(nothing, random(device=device))
    both.step(random(device=device), nothing)
    both.step(nothing, nothing)


def test_gradients_of_zero(device):
    """0 / (0 + 1e-12): the weights stay bit for bit."""
    params = parameters(device=device)
    optimizer = SAM(params, SGD, lr=0.1)
    before = [bits(p) for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.first_step()
    assert [bits(p) for p in params] == before


def test_small_norms_show_the_epsilon():
    p = parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = SAM([p], SGD, rho=1.0, lr=0.1)
    p.grad = torch.full_like(p, 1e-12)
    optimizer.first_step()
    assert p.item() == pytest.approx(0.5, rel=1e-12)


@ADAPTIVE
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity(bad, adaptive, dtype, device):
    """A gradient that is not finite gives NaN there and, if it is NaN, everywhere; then all the old bits return."""
    both = BesideSAM(BASES["SGD"], parameters(dtype, device), rho=0.5, adaptive=adaptive)
    grads = random(dtype, device)
    grads[2][3, 4] = bad
    both.step(grads, random(dtype, device))
    both.step(random(dtype, device), random(dtype, device))


def test_weights_that_are_not_finite_come_back(dtype, device):
    """Infinity, NaN, denormals, -0: the same bits, except NaN's payload."""
    values = [math.inf, -math.inf, 0.0, -0.0, 1e-40, 6e-8, 65504.0, 1.0, math.nan]
    p = parameter(torch.tensor(values, device=device).to(dtype))
    optimizer = SAM([p], SGD, rho=0.5, lr=0.0)
    before = bits(p[:-1])
    p.grad = torch.ones_like(p)
    optimizer.first_step()
    assert bits(p[:-1]) != before
    optimizer._restore()
    assert bits(p[:-1]) == before
    assert p[-1].isnan()


@pytest.mark.parametrize("bad_layout", ["parameter", "gradient"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout, bad_layout, dtype, device):
    values = torch.randn(3, 4, 5, 2, device=device).to(dtype)
    base, view = in_layout(layout if bad_layout == "parameter" else "contiguous", values)
    both = BesideSAM(BASES["SGD"], [parameter(view), parameter(torch.ones(5, device=device, dtype=dtype))], rho=0.5)

    def grads():
        odd = in_layout(layout, torch.randn(3, 4, 5, 2, device=device).to(dtype))[1]
        return [odd, torch.randn_like(both.params[1])]

    for _ in range(3):
        both.step(grads(), grads())
    assert_only_view_written(base, view, layout)


def test_several_dtypes(device):
    """In one group, with one norm."""
    params = [p for dtype in (torch.float32, torch.float64, torch.bfloat16) for p in parameters(dtype, device)]
    both = BesideSAM(BASES["SGD"], params, rho=0.5)
    for _ in range(3):
        both.step([torch.randn_like(p) for p in params], [torch.randn_like(p) for p in params])


def test_shared_parameters_come_back():
    """One listed twice, and two that share memory: the kept weights are those from before the first perturbation."""
    values = torch.randn(5)
    same, a, b = parameter(torch.randn(5)), parameter(values), parameter(values)
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = SAM([same, a, same, b], SGD, rho=0.5, lr=0.0)
    before = snapshot(optimizer)
    for p in (same, a, b):
        p.grad = torch.ones_like(p)
    optimizer.first_step()
    assert bits(same) != before["parameter 0"]
    optimizer._restore()
    after = snapshot(optimizer)
    assert [after[f"parameter {i}"] for i in range(4)] == [before[f"parameter {i}"] for i in range(4)]


# ---- bits ------------------------------------------------------------------------------------------------------------


def run(dtype, sizes, adaptive, offset=0) -> dict[str, bytes]:
    torch.manual_seed(3)
    params = [parameter(torch.randn(n + offset).to(dtype)[offset:]) for n in sizes]
    optimizer = SAM(params, Adam, rho=0.5, adaptive=adaptive, lr=0.1)
    train(optimizer, params, 2)
    set_grads(params, 9)
    optimizer.first_step()
    return snapshot(optimizer)


@ADAPTIVE
@pytest.mark.parametrize("offset", [0, 1])
def test_same_bits_on_every_isa(offset, adaptive, dtype):
    results = {}
    for isa in ISAS:
        with onepass._native.use_isa(isa):
            results[isa] = run(dtype, [0, 1, 3, 8, 15, 17, 64, 65, 1000, 4099, 40_000], adaptive, offset)
    for isa in ISAS:
        assert_same(results[isa], results["baseline"], f"{isa} against baseline")


@ADAPTIVE
def test_same_bits_for_any_thread_count(adaptive):
    results = {}
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results[threads] = run(torch.float32, [1_100_003, 70_001, 0, 5], adaptive)
    for threads in (2, 3):
        assert_same(results[threads], results[1], f"{threads} threads against 1")


# ---- the two halves --------------------------------------------------------------------------------------------------


def test_by_hand_and_by_closure_are_the_same():
    """Also with clipping between the halves, and inside the base's step."""
    by_hand, by_closure = parameters(), []
    by_closure = copy.deepcopy(by_hand)
    first, second = SAM(by_hand, SGD, rho=0.3, lr=0.1), SAM(by_closure, SGD, rho=0.3, lr=0.1, max_norm=0.5)
    for _ in range(3):
        _, closure = bowl_closure(first, by_hand)
        closure()
        torch.nn.utils.clip_grad_norm_(by_hand, 0.01)  # has no effect: only the direction counts
        first.first_step(zero_grad=True)
        assert first.is_perturbed
        closure()
        torch.nn.utils.clip_grad_norm_(by_hand, 0.5)
        first.second_step(zero_grad=True)
        assert all(p.grad is None for p in by_hand)
        second.step(bowl_closure(second, by_closure)[1])
        second.zero_grad()
    for p, q in zip(by_hand, by_closure, strict=True):
        assert_close(p, q, 1e-5, "parameter")
    assert second.base_optimizer.grad_norm is not None


def test_zero_grad_is_optional():
    params = parameters()
    optimizer = SAM(params, SGD, lr=0.1)
    set_grads(params, 1)
    grads = [bits(p.grad) for p in params]
    optimizer.first_step()
    assert [bits(p.grad) for p in params] == grads
    optimizer.second_step()
    assert [bits(p.grad) for p in params] == grads


def test_memory_is_reused():
    """The weights are kept in the same tensors from step to step."""
    params = parameters()
    optimizer = SAM(params, SGD, lr=0.1)
    addresses = []
    for seed in range(3):
        set_grads(params, seed)
        optimizer.first_step()
        addresses.append([optimizer.state[p]["old_param"].data_ptr() for p in params])
        optimizer.second_step()
    assert addresses[0] == addresses[1] == addresses[2]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_closure_that_fails_leaves_the_weights(failing):
    """Also in the second evaluation, where they are perturbed."""
    params, calls = parameters(), []
    optimizer = SAM(params, Adam, rho=0.5, lr=0.1)
    _, closure = bowl_closure(optimizer, params)
    optimizer.step(closure)
    before = snapshot(optimizer)

    def fails():
        calls.append(1)
        if len(calls) == failing:
            raise KeyError("lost")
        return closure()

    with pytest.raises(KeyError):
        optimizer.step(fails)
    assert_same(snapshot(optimizer), before, "after the closure's error")
    assert not optimizer.is_perturbed
    optimizer.step(closure)


def test_a_stale_backward_raises():
    """The perturbation bumps version counters, so an older graph does not silently use the perturbed weights."""
    layers = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    optimizer = SAM(layers.parameters(), SGD, lr=0.1)
    x = torch.randn(2, 3)
    loss = layers(x).square().sum()
    loss.backward(retain_graph=True)
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    second = layers(x).square().sum()
    second.backward(retain_graph=True)
    optimizer.second_step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def through_file(state_dict: dict) -> dict:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("between", [False, True], ids=["", "between the halves"])
@EVERY_BASE
def test_resumed(base, between, dtype, device):
    """After a whole step and after the first half of one: bit for bit an uninterrupted run."""
    params = parameters(dtype, device)
    twins = copy.deepcopy(params)
    straight, first = (SAM(ps, base.optimizer, rho=0.5, **base.case) for ps in (twins, params))
    for optimizer, ps in ((straight, twins), (first, params)):
        train(optimizer, ps, 3)
        if between:
            set_grads(ps[:-1], 77)
            ps[-1].grad = None
            optimizer.first_step(zero_grad=True)
    saved = through_file(first.state_dict())
    has_old = {i for i, states in saved["state"].items() if "old_param" in states}
    assert has_old == ({0, 1, 2, 3} if between else set()), (
        "old weights belong to the checkpoint between the halves only"
    )
    second = SAM(params, base.optimizer, rho=9.0, adaptive=True, **{**base.case, "lr": 99.0})
    second.load_state_dict(state_dict=saved)
    assert second.is_perturbed == between
    for optimizer, ps in ((straight, twins), (second, params)):
        if between:
            set_grads(ps, 78)
            optimizer.second_step(zero_grad=True)
        train(optimizer, ps, 2, seed=2)
    assert_same(snapshot(second), snapshot(straight), "resumed")


@pytest.mark.parametrize("between", [False, True], ids=["", "between the halves"])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"])
def test_copies_are_independent(how, between):
    params = parameters()
    optimizer = SAM(params, Adam, rho=0.5, lr=0.1)
    train(optimizer, params, 2)
    if between:
        set_grads(params, 77)
        optimizer.first_step()
    before = snapshot(optimizer)
    others, other = how((params, optimizer))
    assert_same(snapshot(other), before, "the copy")
    for o, ps in ((other, others), (optimizer, params)):
        if o is optimizer:
            assert_same(snapshot(optimizer), before, "the original after training its copy")
        if between:
            set_grads(ps, 78)
            o.second_step()
        train(o, ps, 2, seed=2)
    assert_same(snapshot(other), snapshot(optimizer), "copy and original")


def test_loading_in_the_middle_of_a_step():
    """Loading the checkpoint of a whole step ends the current one; its weights come with the model's checkpoint."""
    params = parameters()
    optimizer = SAM(params, SGD, lr=0.1)
    saved = copy.deepcopy(optimizer.state_dict())
    set_grads(params, 1)
    optimizer.first_step()
    optimizer.load_state_dict(saved)
    assert not optimizer.is_perturbed


def test_a_checkpoint_of_the_base_alone():
    """Fine-tuning a model with SAM that was trained without it."""
    for base in (torch.optim.Adam, Adam):
        params = parameters()
        plain = base(params, lr=0.1)
        set_grads(params, 1)
        plain.step()
        optimizer = SAM(params, base, rho=0.3, lr=99.0)
        optimizer.base_optimizer.load_state_dict(plain.state_dict())
        train(optimizer, params, 1)
        assert optimizer.param_groups[0]["lr"] == 0.1
        assert optimizer.state[params[0]]["step"] == 2


# ---- in the stack ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
def test_schedulers_and_hooks_see_one_step():
    """By hand as by closure, without the warning that the scheduler stepped before the optimizer."""
    for by_hand in (True, False):
        params, seen = parameters(), []
        optimizer = SAM(params, SGD, lr=0.1)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        optimizer.register_step_pre_hook(lambda *_, seen=seen: seen.append("before"))
        optimizer.register_step_post_hook(lambda *_, seen=seen: seen.append("after"))
        optimizer.base_optimizer.register_step_pre_hook(lambda *_, seen=seen: seen.append("inside"))
        for _ in range(2):
            if by_hand:
                train(optimizer, params, 1)
            else:
                optimizer.step(bowl_closure(optimizer, params)[1])
            schedule.step()
        assert optimizer.base_optimizer.param_groups[0]["lr"] == 0.025
        assert seen == ["before", "inside", "after"] * 2


class Halves:
    """A model trained by SAM with a GradScaler (the page's recipe) beside the same without a scaler."""

    def __init__(self, base, device, **kwargs):
        self.model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).to(device)
        self.twin = copy.deepcopy(self.model)
        self.scaled = SAM(self.model.parameters(), base, rho=0.1, lr=0.01, **kwargs)
        kwargs.pop("fused_unscale", None)
        kwargs.pop("fused", None)
        self.plain = SAM(self.twin.parameters(), base, rho=0.1, lr=0.01, **kwargs)
        self.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, growth_interval=3)
        self.device = device

    def step(self, overflow: str = "", clip: bool = False):
        x = torch.randn(5, 6, device=self.device)
        infinite = x.clone()
        infinite[0, 0] = math.inf

        def loss(model, second):
            return model(infinite if overflow in ("both", "second" if second else "first") else x).square().mean()

        self.scaler.scale(loss(self.model, False)).backward()
        self.scaled.first_step(zero_grad=True)
        self.scaler.scale(loss(self.model, True)).backward()
        if clip:
            self.scaler.unscale_(self.scaled)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.05)
        self.scaler.step(self.scaled)
        self.scaler.update()
        self.scaled.zero_grad()
        if overflow:
            return
        loss(self.twin, False).backward()
        self.plain.first_step(zero_grad=True)
        loss(self.twin, True).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(self.twin.parameters(), 0.05)
        self.plain.second_step(zero_grad=True)


@pytest.mark.parametrize("clip", [False, True], ids=["", "clip"])
@pytest.mark.parametrize(
    ("base", "kwargs"),
    [
        (Adam, {}),
        (Adam, {"fused_unscale": True}),
        (torch.optim.Adam, {}),
        (torch.optim.Adam, {"fused": True}),
        (torch.optim.SGD, {"momentum": 0.9}),
    ],
    ids=["ours", "ours, fused_unscale", "torch", "torch, fused", "torch SGD"],
)
def test_gradient_scaling(base, kwargs, clip, device):
    """Overflows in either half: the weights return bit for bit, base and count stay, the scale decreases."""
    both = Halves(base, device, **kwargs)
    for overflow in ("both", "", "", "first", "second", "", "both", ""):
        before, scale = snapshot(both.scaled), both.scaler.get_scale()
        both.step(overflow, clip)
        assert not both.scaled.is_perturbed
        if overflow:
            after = snapshot(
                both.scaled
            )  # torch's fused optimizers create their states (zeros) in a step that they skip
            assert_same({key: after[key] for key in before}, before, f"overflow in {overflow}")
            assert both.scaler.get_scale() == scale / 2
        for p, q in zip(both.model.parameters(), both.twin.parameters(), strict=True):
            assert_close(p, q, 2e-5, f"parameter after {overflow or 'a step'}")
    for attribute in ("grad_scale", "found_inf"):
        assert not hasattr(both.scaled, attribute)
        assert not hasattr(both.scaled.base_optimizer, attribute)


def test_a_scaler_cannot_do_the_first_half():
    """scaler.step() raises torch's error with a closure and ours without first_step(); neither changes anything."""
    params = parameters()
    optimizer, scaler = SAM(params, SGD, lr=0.1), torch.amp.GradScaler("cpu")
    set_grads(params, 1)
    before = snapshot(optimizer)
    scaler.scale(torch.zeros(()))
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(optimizer, closure=lambda: None)
    with pytest.raises(RuntimeError, match="call first_step"):
        scaler.step(optimizer)
    assert_same(snapshot(optimizer), before, "after the errors")


def recipe(title: str) -> str:
    """The code under a heading of docs/rules/sam.md."""
    found = re.search(rf"^#+ {re.escape(title)}$.*?```python\n(.*?)```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None, f"docs/rules/sam.md has no code under {title!r}"
    return found[1]


def network() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8, momentum=None), torch.nn.Linear(8, 3))


@pytest.mark.parametrize("title", ["By closure", "By hand", "BatchNorm", "GradScaler"])
def test_recipes_of_the_page_train(title):
    """The code on the page runs as it stands, and the loss falls."""
    torch.manual_seed(0)
    model, x, target = network(), torch.randn(64, 6), torch.randn(64, 3)
    before = torch.nn.functional.mse_loss(model(x), target).item()
    space = {
        "torch": torch,
        "onepass": onepass,
        "model": model,
        "loader": [(x, target)] * 20,
        "loss_fn": torch.nn.functional.mse_loss,
        "device": "cpu",
    }
    exec(recipe(title), space)
    assert torch.nn.functional.mse_loss(model(x), target).item() < 0.9 * before


def test_running_statistics_are_counted_once():
    """With the page's recipe they and their counter are those of one forward pass per step, at the unperturbed weights."""
    model, twin = network(), network()
    x, target = torch.randn(32, 6) + 3, torch.randn(32, 3)
    space = {"torch": torch, "onepass": onepass, "model": model, "loader": [(x, target)]}
    space["loss_fn"] = torch.nn.functional.mse_loss
    twin.load_state_dict(model.state_dict())
    exec(recipe("BatchNorm"), space)
    twin(x)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert_close(getattr(model[1], name), getattr(twin[1], name), 1e-6, name)
    assert model[1].track_running_stats
    model(x)
    assert model[1].num_batches_tracked == 2, "statistics are tracked again"


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [-0.1, math.nan, -math.inf])
def test_rho_out_of_range(rho):
    p = parameter(torch.ones(3))
    with pytest.raises(ValueError, match="Invalid rho value"):
        SAM([p], SGD, rho=rho, lr=0.1)
    with pytest.raises(ValueError, match="Invalid rho value"):
        SAM([{"params": [p], "rho": rho}], SGD, lr=0.1)
    optimizer = SAM([p], SGD, lr=0.1)
    with pytest.raises(ValueError, match="Invalid rho value"):
        optimizer.add_param_group({"params": [parameter(torch.ones(3))], "rho": rho})
    assert len(optimizer.param_groups) == 1


def test_unsuitable_base_optimizers():
    params = parameters()
    for base, text in (
        (SGD(params), "base_optimizer is of type SGD; a class is expected"),
        (SAM, "SAM does not wrap SAM"),
        (Lookahead, "SAM does not wrap Lookahead"),
        (functools.partial(SAM, base_optimizer=SGD), "SAM does not wrap SAM"),
        (lambda params, **_: params, "list is not an Optimizer"),
        (torch.optim.LBFGS, "LBFGS needs a closure"),
    ):
        with pytest.raises(TypeError, match=text):
            SAM(params, base, lr=0.1)


def test_errors_of_the_base_are_its_own():
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        SAM([], SGD, lr=0.1)
    with pytest.raises(TypeError, match="params argument given to the optimizer should be an iterable"):
        SAM(torch.ones(3), SGD, lr=0.1)
    with pytest.raises(ValueError, match="Invalid learning rate"):
        SAM(parameters(), SGD, lr=-1.0)
    with pytest.raises(TypeError, match="unexpected keyword"):
        SAM(parameters(), SGD, lr=0.1, betas=(0.9, 0.99))


def test_halves_out_of_order():
    params = parameters()
    optimizer = SAM(params, Adam, rho=0.5, lr=0.1)
    train(optimizer, params, 1)
    set_grads(params, 5)
    before = snapshot(optimizer)
    for call in (optimizer.second_step, optimizer.step):
        with pytest.raises(RuntimeError, match=r"first_step\(\)"):
            call()
    assert_same(snapshot(optimizer), before, "second half before the first")
    optimizer.first_step()
    before = snapshot(optimizer)
    for call in (optimizer.first_step, lambda: optimizer.step(lambda: None)):
        with pytest.raises(RuntimeError, match=r"after first_step\(\)"):
            call()
    assert_same(snapshot(optimizer), before, "first half twice")
    optimizer.second_step()


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (lambda p: setattr(p, "grad", torch.ones(3, 4).to_sparse()), "SAM does not support sparse gradients"),
        (lambda p: setattr(p, "data", torch.zeros(1).expand(3, 4)), "share memory"),
        (lambda p: setattr(p, "data", torch.zeros(3, 4, dtype=torch.int64)), "dtype"),
    ],
    ids=["sparse", "expanded", "integer"],
)
def test_parameters_that_cannot_be_perturbed(bad, text):
    """The error names the parameter, and none is perturbed."""
    fine, odd = parameter(torch.ones(3)), parameter(torch.ones(3, 4))
    optimizer = SAM([fine, odd], torch.optim.SGD, lr=0.1)
    fine.grad, odd.grad = torch.ones_like(fine), torch.ones_like(odd)
    try:
        bad(odd)
    except RuntimeError:
        odd.requires_grad_(False)
        bad(odd)
    with pytest.raises(RuntimeError, match=text) as error:
        optimizer.first_step()
    assert "parameter 1 of group 0" in str(error.value)
    assert (fine == 1).all()
    assert not optimizer.is_perturbed
    assert len(optimizer.state) == 0


def test_groups_that_disagree():
    a, b = parameters(shapes=[(3,), (3,)])
    optimizer = SAM([{"params": [a]}, {"params": [b]}], SGD, lr=0.1)
    optimizer.param_groups[1]["sam_adaptive"] = True
    set_grads([a, b], 1)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="disagree"):
        optimizer.first_step()
    assert_same(snapshot(optimizer), before, "after the error")


def foreign_states(params):
    plain, adam, other = SGD(params, lr=0.1, momentum=0.9), SAM(params, Adam, lr=0.1), [parameter(torch.zeros(2))]
    set_grads(params, 1)
    plain.step()
    train(adam, params, 1)
    between = SAM(params, SGD, lr=0.1, momentum=0.9)
    train(between, params, 1)
    set_grads(params, 1)
    between.first_step()
    bent, outside = (copy.deepcopy(between.state_dict()) for _ in range(2))
    between.second_step()
    bent["state"][0]["old_param"] = torch.zeros(8)
    outside["param_groups"][0]["sam_rho"] = -1
    return {
        "plain": (plain.state_dict(), "not one of SAM"),
        "Lookahead": (Lookahead(plain).state_dict(), "not one of SAM"),
        "another rule": (adam.state_dict(), "of another optimizer"),
        "another model": (SAM(other, SGD, lr=0.1).state_dict(), "doesn't match the size"),
        "other shapes": (bent, "old_param.*shape"),
        "options": (outside, "Invalid rho value"),
    }


@pytest.mark.parametrize("which", ["plain", "Lookahead", "another rule", "another model", "other shapes", "options"])
def test_foreign_states_are_refused(which):
    params = parameters()
    state, text = foreign_states(params)[which]
    optimizer = SAM(params, SGD, lr=0.1, momentum=0.9)
    train(optimizer, params, 2)
    set_grads(params, 5)
    optimizer.first_step()
    before, groups = snapshot(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(ValueError, match=text):
        optimizer.load_state_dict(state)
    assert_same(snapshot(optimizer), before, "after the error")
    assert optimizer.state_dict()["param_groups"] == groups
    assert optimizer.is_perturbed
