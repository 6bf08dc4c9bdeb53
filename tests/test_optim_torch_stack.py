"""Works with the rest of torch like any optimizer: closures, hooks, schedulers, groups, profiler, autograd, compile."""

import pytest
import torch
from rules import RULES, BesideReference, BesideTorch, loss_of
from support import assert_close, bits, parameter
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

EVERY_RULE = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


# ---- step ------------------------------------------------------------------------------------------------------------


@EVERY_RULE
def test_closure(rule, device):
    """Evaluated once with gradients enabled, also under no_grad; its loss is returned."""
    both = BesideTorch(rule, device=device)
    x, calls = both.batch(), []

    def closure():
        calls.append(torch.is_grad_enabled())
        both.ours.zero_grad()
        loss = loss_of(both.model, x)
        loss.backward()
        return loss

    with torch.no_grad():
        loss = both.ours.step(closure)
    assert calls == [True], f"expected one call with gradients on, came {calls}"
    assert torch.equal(loss, loss_of(both.twin, x)), "the loss is the one before the step"
    loss_of(both.twin, x).backward()
    both.theirs.step()
    both.compare()
    assert both.ours.step() is None


@EVERY_RULE
def test_hooks(rule):
    """Global and own hooks, before and after, once per step and in torch's order; a pre-hook may replace the arguments."""

    def calls_of(optimizer):
        calls = []
        handles = [
            register_optimizer_step_pre_hook(lambda *_: calls.append("global before")),
            register_optimizer_step_post_hook(lambda *_: calls.append("global after")),
            optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append("before") or ((o, lambda: 5.0), {})),
            optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append("after")),
        ]
        calls.append(optimizer.step())
        for handle in handles:
            handle.remove()
        return calls

    both = BesideTorch(rule)
    expected = calls_of(both.theirs)
    assert expected[-1] == 5.0
    came = calls_of(both.ours)
    assert came == expected, f"expected {expected}, came {came}"


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(  # also cycles momentum and betas
        o, max_lr=0.05, total_steps=12, cycle_momentum=bool({"momentum", "betas"} & o.defaults.keys())
    ),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (t + 1) ** 0.3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 3), lr_scheduler.ExponentialLR(o, 0.8)], [3]
    ),
}


@pytest.mark.parametrize("as_tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@EVERY_RULE
def test_schedulers(rule, scheduler, as_tensor):
    lr = (lambda: torch.tensor(0.02, dtype=torch.float64)) if as_tensor else (lambda: 0.02)
    both = BesideTorch(rule)
    both.ours = rule.ours(both.model.parameters(), **{**rule.usual, "lr": lr()})
    both.theirs = rule.theirs(both.twin.parameters(), **{**rule.usual, "lr": lr()})
    schedules = [SCHEDULERS[scheduler](optimizer) for optimizer in (both.ours, both.theirs)]
    seen = set()

    def after_step():
        for schedule in schedules:
            schedule.step()
        ours, theirs = (schedule.get_last_lr()[0] for schedule in schedules)
        assert float(ours) == pytest.approx(float(theirs), rel=1e-12), "the scheduler sees another lr"
        seen.add(round(float(ours), 9))

    both.train(10, after_step)
    assert len(seen) > 3, f"the lr hardly changed: {seen}"


def test_plateau_scheduler():
    both = BesideTorch(RULES["Adam"])
    schedule = lr_scheduler.ReduceLROnPlateau(both.ours, patience=0, factor=0.5)
    for _ in range(3):
        schedule.step(1.0)
    assert both.ours.param_groups[0]["lr"] == RULES["Adam"].usual["lr"] / 4


@EVERY_RULE
def test_wrapped_step(rule):
    """accelerate and others replace `step` on the instance and call the original."""
    both = BesideTorch(rule)
    plain, calls = both.ours.step, []
    both.ours.step = lambda closure=None: (calls.append(1), plain(closure))[1]
    both.train(2)
    assert len(calls) == 2


# ---- groups and gradients --------------------------------------------------------------------------------------------


def adagrad_steps_an_added_group() -> bool:
    """Older torch creates Adagrad's states only in the constructor."""
    p, q = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.Adagrad([p])
    optimizer.add_param_group({"params": [q]})
    q.grad = torch.ones(1)
    try:
        optimizer.step()
    except KeyError:
        return False
    return True


@EVERY_RULE
def test_add_param_group_in_training(rule, device):
    """The new group starts at step 1 while the old one continues: different counts in one step."""
    if rule.theirs is torch.optim.Adagrad and not adagrad_steps_an_added_group():
        pytest.skip("this torch's Adagrad does not support added groups")
    both = BesideTorch(rule, device=device)
    both.train(4)
    for model, optimizer in ((both.model, both.ours), (both.twin, both.theirs)):
        torch.manual_seed(5)
        extra = torch.nn.Linear(3, 3).to(device, torch.float64)
        model.append(extra)
        optimizer.add_param_group({"params": extra.parameters(), "lr": 0.03})
    both.train(4)
    steps = [int(s["step"]) for s in both.ours.state.values() if "step" in s]
    assert steps in ([], [8] * 4 + [4] * 2), f"step counts are {steps}"


@EVERY_RULE
def test_frozen_and_thawed(rule, device):
    """Parameters without gradients keep their values, states and counts; zero_grad(set_to_none=False) does not."""
    both = BesideTorch(rule, device=device)
    both.train(2)
    for frozen in (True, False):
        for model in (both.model, both.twin):
            model[0].requires_grad_(not frozen)
        before = bits(both.model[0].weight)
        both.train(2)
        assert (bits(both.model[0].weight) == before) is frozen, f"frozen={frozen}, the weight says otherwise"
    for optimizer in (both.ours, both.theirs):
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
    both.compare()


@EVERY_RULE
def test_states_are_torchs_at_each_step(rule, device):
    """Names, shapes, dtypes, devices."""
    both = BesideTorch(rule, device=device)

    def look(optimizer):
        return [
            {key: (value.shape, value.dtype, value.device) for key, value in state.items()}
            for state in optimizer.state.values()
        ]

    def compare_states():
        assert look(both.ours) == look(both.theirs)

    both.train(5, compare_states)


@EVERY_RULE
def test_states_need_no_gradient(rule):
    p = parameter(torch.zeros(3))
    p.grad = torch.ones(3, requires_grad=True) * 2  # as backward(create_graph=True) leaves it
    optimizer = rule.ours([p], **rule.usual)
    optimizer.step()
    assert p.is_leaf
    assert p.requires_grad
    for key, value in optimizer.state[p].items():
        assert not value.requires_grad, f"{key} requires a gradient"
        assert value.grad_fn is None, f"{key} has a graph"


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize("case", [("SGD", {"lr": 0.1}), ("Adam", {"lr": 0.1}), ("AdamW", {"lr": 0.1})], ids=str)
def test_a_parameter_listed_twice(case):
    """Updated twice in order, as in torch's loop, even if threads could run both at once."""
    key, options = case
    for size in (5, 3_000_000):
        p = parameter(torch.randn(size))
        other = parameter(torch.randn(3))
        twins = [parameter(t.detach().clone()) for t in (p, other)]
        ours = RULES[key].ours([p, other, p], **options)
        theirs = RULES[key].theirs([twins[0], twins[1], twins[0]], foreach=False, **options)
        for _ in range(3):
            for t, twin in zip((p, other), twins, strict=True):
                t.grad = torch.randn_like(t)
                twin.grad = t.grad.clone()
            ours.step()
            theirs.step()
        for t, twin in zip((p, other), twins, strict=True):
            assert_close(t, twin, 1e-5, f"a parameter of {t.numel()} elements")


@EVERY_RULE
def test_storage_may_move_between_steps(rule, device):
    """No pointer is cached: .data may be replaced, and swap_tensors puts other memory under the same parameter."""
    p = parameter(torch.randn(40, device=device))
    both = BesideReference(rule, rule.usual, [p])
    both.step([torch.randn(40, device=device)])
    p.data = p.data.clone()
    both.step([torch.randn(40, device=device)])
    p.grad = None
    old = p.data_ptr()
    both.optimizer.zero_grad()
    torch.utils.swap_tensors(p, parameter(p.detach().clone()))
    assert p.data_ptr() != old
    both.step([torch.randn(40, device=device)])


# ---- autograd, profiler, compile -------------------------------------------------------------------------------------


@EVERY_RULE
def test_version_counter_guards_saved_weights(rule, device):
    """backward through weights that a step has changed raises torch's error instead of giving wrong gradients."""
    both = BesideTorch(rule, device=device)
    versions = [p._version for p in both.model.parameters()]
    loss = loss_of(both.model, both.batch())
    loss.backward(retain_graph=True)
    both.model[0].bias.grad = None
    both.ours.step()
    rose = [p._version > v for p, v in zip(both.model.parameters(), versions, strict=True)]
    assert rose == [True, False, True, True], f"version counters rose: {rose}; the second has no gradient"
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("rule", RULES)
def test_profiler_names(rule):
    def events(optimizer):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            optimizer.step()
            optimizer.zero_grad()
        return {event.key for event in profile.key_averages() if event.key.startswith("Optimizer.")}

    both = BesideTorch(RULES[rule])
    assert events(both.ours) == events(both.theirs) >= {f"Optimizer.step#{rule}.step"}


@pytest.mark.filterwarnings("ignore")  # warnings of torch's tracer, which depend on its version
def test_torch_compile_of_a_training_step():
    """A graph break leaves the step to eager code; forward and backward are traced."""
    both = BesideTorch(RULES["Adam"])

    @torch.compile(backend="eager")
    def train_step(x):
        both.ours.zero_grad()
        loss = loss_of(both.model, x)
        loss.backward()
        both.ours.step()
        return loss

    for _ in range(3):
        x = both.batch()
        train_step(x)
        both.theirs.zero_grad()
        loss_of(both.twin, x).backward()
        both.theirs.step()
        both.compare()


@EVERY_RULE
def test_repr_and_subclass(rule):
    """A user's subclass works, and repr lists the arguments."""

    class Mine(rule.ours):
        pass

    p = parameter(torch.zeros(3))
    p.grad = torch.ones(3)
    optimizer = Mine([p], lr=0.5)
    optimizer.step()
    assert bool((p < 0).all())
    assert "Mine" in repr(optimizer)
    assert "lr: 0.5" in repr(optimizer)
