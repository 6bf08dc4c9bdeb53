"""from_torch() and to_torch(): training continues with the same groups, names, hooks and schedulers."""

import copy
import gc
import inspect
import re
import warnings
import weakref
from pathlib import Path

import onepass
import pytest
import torch
from onepass.optim import SAM, Adam, Lookahead, from_torch, to_torch
from rules import RULES, loss_of
from sparse import SPARSE, some_rows
from support import (
    ARITHMETIC,
    HALF,
    arithmetic_dtype,
    assert_close,
    assert_same,
    bits,
    has_named_parameters,
    parameter,
    rounding,
    snapshot,
)

EVERY_RULE = pytest.mark.parametrize("rule", [pytest.param(r, id=key) for key, r in RULES.items() if not r.stand_in])


class Uninterrupted:
    """A model trained by torch, and a copy whose optimizer is converted mid-training; compared at every step."""

    def __init__(self, rule, case=None, dtype=torch.float64, ours=False, device="cpu") -> None:
        torch.manual_seed(0)
        layers = [torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)]
        self.model = torch.nn.Sequential(*layers).to(device, dtype)
        self.twin = copy.deepcopy(self.model)
        self.optimizer, self.straight = (
            (rule.ours if ours else rule.theirs)(self.groups_of(model), **(case or rule.usual))
            for model in (self.model, self.twin)
        )
        self.seed = 0

    def groups_of(self, model) -> list[dict]:
        params = list(model.named_parameters() if has_named_parameters else model.parameters())
        return [{"params": params[:2], "lr": 0.05, "mine": "first"}, {"params": params[2:]}]

    def train(self, steps: int, tolerance: float | None = None) -> None:
        for _ in range(steps):
            self.seed += 1
            losses = []
            for model, optimizer in ((self.model, self.optimizer), (self.twin, self.straight)):
                p = next(model.parameters())
                x = torch.randn(5, 6, generator=torch.Generator().manual_seed(self.seed)).to(p)
                optimizer.zero_grad()
                loss = loss_of(model, x)
                losses.append(loss.detach())
                loss.backward()
                optimizer.step()
            for (name, p), q in zip(self.model.named_parameters(), self.twin.parameters(), strict=True):
                allowed = 10 * ARITHMETIC[arithmetic_dtype(p.dtype)] if tolerance is None else tolerance
                assert_close(losses[0], losses[1], allowed, f"loss of step {self.seed}", 8 * rounding(p.dtype))
                assert_close(p, q, allowed, f"{name} after step {self.seed}", 2 * rounding(p.dtype))


SETTINGS = [
    {},
    {"foreach": True},
    {"foreach": False},
    {"fused": True},
    {"lr": torch.tensor(0.1, dtype=torch.float64)},
    {"maximize": True},
]


# ---- training goes on ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", [0, 3])
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: next(iter(setting.items()), "default"))
@EVERY_RULE
def test_there_and_back(rule, setting, when):
    """Before the first step or in the middle, from any setting: losses and weights are those of torch alone."""
    if not setting.keys() <= inspect.signature(rule.theirs).parameters.keys():
        pytest.skip("torch has no such form")
    both = Uninterrupted(rule, {**rule.usual, **setting})
    tolerance = 1e-7 if rule.name == "ASGD" and setting.get("foreach") else None  # torch's then has an eta of its own
    both.train(when, tolerance)
    both.optimizer = from_torch(both.optimizer)
    assert type(both.optimizer) is rule.ours
    both.train(4, tolerance)
    both.optimizer = to_torch(both.optimizer)
    assert type(both.optimizer) is rule.theirs
    both.train(3, tolerance)
    both.optimizer = from_torch(both.optimizer)
    both.train(2, tolerance)
    assert {key: both.optimizer.param_groups[1][key] for key in setting} == setting


@pytest.mark.skipif(not (onepass.has_cuda and torch.cuda.is_available()), reason="needs a GPU")
@pytest.mark.parametrize(
    "setting", [{"capturable": True}, {"capturable": True, "foreach": True}, {"fused": True}, {}], ids=str
)
@EVERY_RULE
def test_there_and_back_on_a_gpu(rule, setting):
    """The step count moves between device and host, as each of the two requires."""
    if not setting.keys() <= inspect.signature(rule.theirs).parameters.keys():
        pytest.skip("torch has no such form")
    both = Uninterrupted(rule, {**rule.usual, **setting}, device="cuda")
    both.train(2)
    both.optimizer = from_torch(both.optimizer)
    both.train(3)
    both.optimizer = to_torch(both.optimizer)
    both.train(3)
    for p, q in zip(both.model.parameters(), both.twin.parameters(), strict=True):
        for name, state in both.straight.state[q].items():
            assert both.optimizer.state[p][name].device == state.device, name
            assert both.optimizer.state[p][name].dtype == state.dtype, name


@EVERY_RULE
def test_every_case_of_the_rule(rule):
    """Every combination of options that torch also has."""
    for case in rule.cases:
        clips = case.get("max_norm") is not None or case.get("normalize_grads") or case.get("fused_unscale")
        theirs = rule.to_torch(case)
        if theirs is None or clips or case.get("capturable"):
            continue
        both = Uninterrupted(rule, theirs)
        both.train(2)
        both.optimizer = from_torch(both.optimizer)
        both.train(2)
        both.optimizer = to_torch(both.optimizer)
        both.train(2)


@EVERY_RULE
def test_ours_there_and_back_is_exact(rule):
    """Conversion changes no bit of parameters and states; the following steps are those of an uninterrupted run."""
    both = Uninterrupted(rule, ours=True, dtype=torch.float32)
    both.train(3, tolerance=0.0)
    before = snapshot(both.optimizer)
    both.optimizer = from_torch(to_torch(both.optimizer))
    assert_same(snapshot(both.optimizer), before, "there and back")
    both.train(3, tolerance=0.0)


@pytest.mark.parametrize("half", HALF, ids=str)
@EVERY_RULE
def test_16_bit_states_widen_and_round(rule, half):
    """torch keeps them in 16 bits, onepass in 32."""
    case = {**rule.usual, "eps": 1e-2} if "eps" in rule.usual else rule.usual
    both = Uninterrupted(rule, case, half)
    both.train(2)
    states = copy.deepcopy(both.optimizer.state)
    both.optimizer = from_torch(both.optimizer)
    for p in both.model.parameters():
        for (name, state), old in zip(
            both.optimizer.state[p].items(), next(iter(states.values())).values(), strict=True
        ):
            assert state.dtype == torch.float32, name
            assert old.dtype == half or name in both.optimizer.scalar_states
    both.optimizer.step()
    both.optimizer = to_torch(both.optimizer)
    for states in both.optimizer.state.values():
        assert {s.dtype for name, s in states.items() if name not in rule.ours.scalar_states} == {half}
    both.optimizer.step()


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_gradients(name):
    rule = SPARSE[name]
    values = torch.randn(6, 3)
    tables = [parameter(values.clone()) for _ in range(2)]
    optimizers = [rule.theirs([table], **rule.usual) for table in tables]

    def train(steps: int) -> None:
        for _ in range(steps):
            gradient = some_rows((6, 3), 4)
            for table, optimizer in zip(tables, optimizers, strict=True):
                table.grad = gradient.clone()
                optimizer.step()
            assert_close(tables[0], tables[1], 1e-5, "the table")

    train(2)
    optimizers[0] = from_torch(optimizers[0])
    train(2)
    optimizers[0] = to_torch(optimizers[0])
    train(2)
    if name == "SparseAdam":
        assert type(optimizers[0].state[tables[0]]["step"]) is int


@EVERY_RULE
def test_late_gradients(rule):
    """A parameter that was never stepped has no state, except in torch's Adagrad, which creates all states at once."""
    lists = [[parameter(torch.ones(3)), parameter(torch.ones(2))] for _ in range(2)]
    optimizers = [rule.theirs(params, **rule.usual) for params in lists]
    for t, convert in enumerate((from_torch, to_torch, lambda optimizer: optimizer)):
        optimizers[0] = convert(optimizers[0])
        for params, optimizer in zip(lists, optimizers, strict=True):
            params[0].grad = torch.full((3,), 0.5 + t)
            params[1].grad = torch.ones(2) if t == 2 else None
            optimizer.step()
        for p, q in zip(*lists, strict=True):
            assert_close(p, q, 1e-6, f"step {t + 1}")


def test_groups_of_their_own_initial_accumulator():
    """States start with the group's value, which torch's constructor does not support."""
    params = [parameter(torch.ones(3)), parameter(torch.ones(3))]
    groups = [{"params": params[:1]}, {"params": params[1:], "initial_accumulator_value": 2.0}]
    optimizer = to_torch(onepass.optim.Adagrad(groups, lr=0.1, initial_accumulator_value=1.0))
    assert [optimizer.state[p]["sum"][0].item() for p in params] == [1.0, 2.0]


def test_parameters_of_any_kind():
    """Complex parameters, several dtypes, none at all, and one listed twice (without a second warning)."""
    params = [parameter(torch.ones(3, dtype=dtype)) for dtype in (torch.complex64, torch.float64, torch.bfloat16)]
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = torch.optim.SGD([{"params": [*params, params[1]]}, {"params": []}], lr=0.1, momentum=0.9)
    for convert in (from_torch, to_torch, from_torch):
        optimizer = convert(optimizer)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert [group["params"] for group in optimizer.param_groups] == [[*params, params[1]], []]


# ---- what comes along ------------------------------------------------------------------------------------------------


@EVERY_RULE
def test_nothing_is_copied(rule):
    """Groups, options, names and the memory of the states stay the same."""
    both = Uninterrupted(rule, {**rule.usual, "lr": torch.tensor(0.1, dtype=torch.float64)})
    both.train(1)
    old = both.optimizer
    groups, dicts, lrs = old.param_groups, list(old.param_groups), [g["lr"] for g in old.param_groups]
    memory = {s.data_ptr() for states in old.state.values() for s in states.values() if s.dim()}
    keys = [set(group) for group in groups]
    ours = from_torch(old)
    assert ours.param_groups is groups
    assert all(a is b for a, b in zip(groups, dicts, strict=True))
    assert [group["lr"] for group in groups] == lrs
    assert groups[1]["lr"] is lrs[1]
    assert groups[0].get("param_names") == (["0.weight", "0.bias"] if has_named_parameters else None)
    assert groups[0]["mine"] == "first"
    assert {s.data_ptr() for states in ours.state.values() for s in states.values() if s.dim()} == memory
    theirs = to_torch(ours)
    assert theirs.param_groups is groups
    assert [set(group) for group in groups] == keys, "no option of ours is left"
    assert groups[1]["lr"] is lrs[1]
    assert {s.data_ptr() for states in theirs.state.values() for s in states.values() if s.dim()} == memory
    assert theirs.state_dict()["param_groups"] == both.straight.state_dict()["param_groups"]


def test_names_from_a_checkpoint():
    """Newer torch saves names; older torch loads them like any option but does not accept them in the constructor."""
    p = parameter(torch.ones(3))
    saved = Adam([p], lr=0.1).state_dict()
    saved["param_groups"][0]["param_names"] = ["weight"]
    optimizer = Adam([p], lr=0.1)
    optimizer.load_state_dict(saved)
    for convert in (to_torch, from_torch):
        optimizer = convert(optimizer)
        assert optimizer.param_groups[0]["param_names"] == ["weight"]


@pytest.mark.parametrize("repoint", [False, True], ids=["", "scheduler.optimizer = optimizer"])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_schedulers_keep_their_effect(steps_before, repoint):
    """Schedulers of the old optimizer work, without torch's warning that no step was taken; both see new groups."""
    rule = RULES["AdamW"]
    both = Uninterrupted(rule)
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20) for o in (both.optimizer, both.straight)]

    def train(steps: int) -> None:
        for _ in range(steps):
            both.train(1)
            for scheduler in schedulers:
                scheduler.step()
            for a, b in zip(both.optimizer.param_groups, both.straight.param_groups, strict=True):
                assert (a["lr"], a["betas"]) == (b["lr"], b["betas"])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(steps_before)
        both.optimizer = from_torch(both.optimizer)
        if repoint and steps_before:
            schedulers[0].optimizer = both.optimizer
        train(3)
        both.optimizer = to_torch(both.optimizer)
        if repoint and steps_before:
            schedulers[0].optimizer = both.optimizer
        train(3)


def test_repointed_schedulers_survive_a_checkpoint():
    """load_state_dict() gives an optimizer new groups; a repointed scheduler still reaches them."""
    p = parameter(torch.ones(3))
    p.grad = torch.ones(3)
    old = torch.optim.SGD([p], lr=1.0)
    schedulers = [torch.optim.lr_scheduler.StepLR(old, 1, 0.5) for _ in range(2)]
    old.step()
    for scheduler in schedulers:
        scheduler.step()
    optimizer = from_torch(old)
    schedulers[0].optimizer = optimizer
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    schedulers[1].step()
    assert optimizer.param_groups[0]["lr"] == 0.25
    schedulers[0].step()
    assert optimizer.param_groups[0]["lr"] == 0.125


def test_hooks_are_transferred():
    """All six kinds are called with the new optimizer; their old handles still remove them."""
    p, seen = parameter(torch.ones(3)), []
    optimizer = torch.optim.Adam([p], lr=0.1)
    handles = [
        optimizer.register_step_pre_hook(lambda o, *_: seen.append(("before", o))),
        optimizer.register_step_post_hook(lambda o, *_: seen.append(("after", o))),
        optimizer.register_state_dict_pre_hook(lambda o: seen.append(("saving", o))),
        optimizer.register_state_dict_post_hook(lambda o, d: seen.append(("saved", o))),
        optimizer.register_load_state_dict_pre_hook(lambda o, d: seen.append(("loading", o))),
        optimizer.register_load_state_dict_post_hook(lambda o: seen.append(("loaded", o))),
    ]
    for convert in (from_torch, to_torch):
        optimizer = convert(optimizer)
        gc.collect()
        assert not seen, "converting calls no hooks"
        p.grad = torch.ones(3)
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        names = ["before", "after", "saving", "saved", "loading", "loaded"]
        assert seen == [(name, optimizer) for name in names]
        seen.clear()
    for handle in handles:
        handle.remove()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert not seen


def test_entries_that_belong_to_no_parameter():
    """torch.optim allows anything under keys that are not parameters."""
    p = parameter(torch.ones(3))
    optimizer = torch.optim.NAdam([p], lr=0.1)
    optimizer.state["calls"] = 3
    for convert in (from_torch, to_torch, from_torch):
        optimizer = convert(optimizer)
        p.grad = torch.ones(3)
        optimizer.step()
        assert optimizer.state["calls"] == 3


def test_the_old_optimizer_can_be_freed():
    p = parameter(torch.ones(3))
    old = torch.optim.Adam([p], lr=0.1)
    optimizer, gone = from_torch(old), weakref.ref(old)
    del old
    gc.collect()
    assert gone() is None
    p.grad = torch.ones(3)
    optimizer.step()


def test_scaling_continues():
    """torch's fused optimizer unscales by itself, ours leaves it to the scaler; the numbers are the same."""
    rule = RULES["AdamW"]
    both = Uninterrupted(rule, {**rule.usual, "fused": True}, torch.float32)
    scalers = [torch.amp.GradScaler("cpu", init_scale=64.0) for _ in range(2)]
    for t in range(6):
        if t in (2, 4):
            both.optimizer = (from_torch if t == 2 else to_torch)(both.optimizer)
        x = torch.randn(5, 6)
        pairs = ((both.model, both.optimizer), (both.twin, both.straight))
        for (model, optimizer), scaler in zip(pairs, scalers, strict=True):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, x)).backward()
            scaler.step(optimizer)
            scaler.update()
        for p, q in zip(both.model.parameters(), both.twin.parameters(), strict=True):
            assert_close(p, q, 1e-5, f"step {t}")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda params: Lookahead(torch.optim.Adam(params, lr=0.1), 2),
        lambda params: SAM(params, torch.optim.Adam, lr=0.1),
    ],
)
def test_inside_a_wrapper(wrap):
    """Assigning the wrapped optimizer keeps the wrapper's options and state."""
    lists = [[parameter(torch.linspace(-1, 1, 5))] for _ in range(2)]
    wrappers = [wrap(params) for params in lists]
    for convert in (lambda o: o, from_torch, to_torch, from_torch):
        wrappers[0].base_optimizer = convert(wrappers[0].base_optimizer)
        for _ in range(3):
            for (p,), wrapper in zip(lists, wrappers, strict=True):

                def closure(p=p, wrapper=wrapper):
                    wrapper.zero_grad()
                    loss = (p - 0.3).square().sum()
                    loss.backward()
                    return loss

                wrapper.step(closure)
            assert_close(lists[0][0], lists[1][0], 1e-5, "the parameter")
    wrappers[0].add_param_group({"params": [parameter(torch.ones(2))]})
    wrappers[0].load_state_dict(wrappers[0].state_dict())


# ---- what cannot be said there ---------------------------------------------------------------------------------------


EXTRAS = [
    *((name, {k: v}) for name, rule in RULES.items() for k in rule.only_ours for v in rule.options[k][1:]),
    ("Adam", {"max_norm": 1.0}),
    ("NAdam", {"normalize_grads": True}),
    ("SGD", {"fused_unscale": True}),
]


@pytest.mark.parametrize(("name", "options"), EXTRAS, ids=str)
def test_options_that_torch_lacks(name, options):
    """The error names them and says what to do; the optimizer is unchanged and converts once they are reset."""
    p = parameter(torch.ones(3))
    optimizer = RULES[name].ours([p], lr=0.1, **options)
    p.grad = torch.ones(3)
    optimizer.step()
    before, groups = snapshot(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    option = next(iter(options))
    with pytest.raises(ValueError, match=rf"torch.optim.{name} has no {option}, which is .* here\. \w+"):
        to_torch(optimizer)
    assert_same(snapshot(optimizer), before, "after the error")
    assert optimizer.state_dict()["param_groups"] == groups
    optimizer.step()
    for group in optimizer.param_groups:
        group[option] = onepass.optim._options.options_of(type(optimizer))[option]
    to_torch(optimizer).step()


def test_capturable_on_the_cpu():
    optimizer = Adam([parameter(torch.ones(3))], lr=0.1, capturable=True)
    with pytest.raises(ValueError, match="capturable=True for parameters on the CPU"):
        to_torch(optimizer)


def test_errors_of_the_constructors_change_nothing():
    """differentiable=True for ours, foreach and fused together for torch's; the errors are the constructors' own."""
    p = parameter(torch.ones(3))
    old = torch.optim.SGD([p], lr=0.1, momentum=0.9, differentiable=True)
    keys, state = set(old.param_groups[0]), old.state
    with pytest.raises(RuntimeError, match="does not support `differentiable`"):
        from_torch(old)
    assert set(old.param_groups[0]) == keys
    assert old.state is state
    bent = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    bent.state[p]["momentum_buffer"] = torch.zeros(4)
    with pytest.raises(ValueError, match=r"parameter 0 of group 0.*momentum_buffer.*shape"):
        from_torch(bent)
    assert set(bent.param_groups[0]) == keys
    ours = Adam([p], lr=torch.tensor(0.1), foreach=True)
    keys = set(ours.param_groups[0])
    with pytest.raises(ValueError, match="lr as a Tensor is not supported for capturable=False and foreach=True"):
        to_torch(ours)
    assert set(ours.param_groups[0]) == keys
    ours.param_groups[0]["foreach"] = None
    p.grad = torch.ones(3)
    ours.step()


def test_negated_parameters():
    old = torch.optim.SGD([torch.nn.Parameter(torch._neg_view(torch.ones(3)))], lr=0.1)
    with pytest.raises(RuntimeError, match="parameter 0 of group 0 is a lazily negated view"):
        from_torch(old)


class Mine(torch.optim.Adam):
    pass


class MyAdam(Adam):
    pass


@pytest.mark.parametrize(
    ("convert", "make", "text"),
    [
        (from_torch, lambda p: torch.optim.LBFGS([p]), r"from_torch\(\) takes .*Adam, .*; LBFGS came$"),
        (from_torch, lambda p: Mine([p]), "Mine came, a subclass of them, whose step may be another one"),
        (from_torch, lambda p: Adam([p]), "Adam came$"),
        (from_torch, lambda p: "Adam", "str came$"),
        (
            from_torch,
            lambda p: Lookahead(torch.optim.Adam([p])),
            "Convert what is in the Lookahead: optimizer.base_optimizer",
        ),
        (to_torch, lambda p: torch.optim.Adam([p]), "Adam came"),
        (to_torch, lambda p: onepass.optim.Lion([p]), r"to_torch\(\) takes .*; Lion came, which torch.optim lacks$"),
        (to_torch, lambda p: MyAdam([p]), "MyAdam came, a subclass of them"),
        (to_torch, lambda p: SAM([p], Adam), "Convert what is in the SAM: optimizer.base_optimizer"),
        (to_torch, lambda p: None, "NoneType came"),
    ],
)
def test_refused_optimizers(convert, make, text):
    with pytest.raises(TypeError, match=text):
        convert(make(parameter(torch.ones(3))))


def test_bits_of_the_first_converted_step():
    """If torch's formula has the same roundings, the bits agree: SGD without momentum or decay."""
    p, q = (parameter(torch.linspace(-1, 1, 9)) for _ in range(2))
    for optimizer, x in ((from_torch(torch.optim.SGD([p], lr=0.5)), p), (torch.optim.SGD([q], lr=0.5), q)):
        x.grad = torch.linspace(2, 3, 9)
        optimizer.step()
    assert bits(p) == bits(q)


def test_the_code_of_the_page():
    """The code in docs/optimizers.md runs as it stands, and the scheduler has an effect."""
    text = (Path(__file__).parent.parent / "docs" / "optimizers.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "from_torch" in block)
    space: dict = {}
    exec(code, space)
    assert type(space["optimizer"]) is onepass.optim.AdamW
    assert space["optimizer"].param_groups[0]["lr"] == pytest.approx(1e-2 * 0.9**5)
