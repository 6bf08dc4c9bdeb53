"""Unusual uses of optimizers: lazy parameters, no groups, subclasses, numbers of any kind, a scaler on another device."""

import copy
import io
import pickle

import numpy as np
import onepass
import pytest
import torch
from onepass import _native
from onepass.optim import Adam, AdamW
from rules import RULES
from support import assert_close, assert_same, bits, needs_named_parameters, parameter, snapshot

EVERY_RULE = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


# ---- parameters without a shape --------------------------------------------------------------------------------------


def lazy_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.LazyLinear(4), torch.nn.Tanh(), torch.nn.LazyLinear(2))


@pytest.mark.parametrize("form", ["list", pytest.param("named", marks=needs_named_parameters), "group", "added"])
@EVERY_RULE
def test_lazy_parameters(rule, form):
    """Accepted before the first forward pass, and stepped like others after it. (In torch only Adagrad refuses them.)"""

    def train(cls):
        model, x = lazy_model(), torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
        params = list(model.parameters())
        first = {"list": params, "named": list(model.named_parameters()), "group": [{"params": params}]}
        optimizer = cls(first.get(form, params[:1]), **rule.usual)
        if form == "added":
            optimizer.add_param_group({"params": params[1:]})
        optimizer.step()  # nothing has a gradient yet
        optimizer.load_state_dict(optimizer.state_dict())
        for _ in range(3):
            optimizer.zero_grad()
            torch.manual_seed(2)
            model(x).square().mean().backward()
            optimizer.step()
        return model, optimizer

    model, optimizer = train(rule.ours)
    if rule.theirs is not torch.optim.Adagrad:
        # A lazy layer draws its weights in the first forward pass; both runs use the same seed.
        for (name, p), q in zip(model.named_parameters(), train(rule.theirs)[0].parameters(), strict=True):
            assert_close(p, q, 1e-5, name)
    assert all(optimizer.state[p] for p in model.parameters())


def test_lazy_parameters_in_wrappers():
    for wrap in (
        lambda params: onepass.optim.Lookahead(Adam(params, lr=0.1), k=2),
        lambda params: onepass.optim.SAM(params, Adam, lr=0.1),
    ):
        model = lazy_model()
        optimizer = wrap(model.parameters())
        optimizer.step(lambda: None)

        def closure(model=model):
            loss = model(torch.ones(5, 3)).square().mean()
            loss.backward()
            return loss

        before = optimizer.step(closure).item()
        assert optimizer.step(closure).item() < before


def test_lazy_parameters_in_sparse_adam():
    model = lazy_model()
    for cls in (torch.optim.SparseAdam, onepass.optim.SparseAdam):
        try:
            cls(list(model.parameters()), lr=0.1).step()
            came = None
        except ValueError as error:
            came = str(error).split(" in ")[0]
        if cls is torch.optim.SparseAdam:
            expected = came
    assert came == expected


# ---- no parameters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"max_norm": 1.0}, {"fused_unscale": True}], ids=str)
@EVERY_RULE
def test_no_groups(rule, options):
    """With all groups removed a step does nothing and returns the closure's loss; an empty state loads both ways."""
    p = parameter(torch.ones(2))
    optimizer = rule.ours([p], lr=0.1, **options)
    optimizer.param_groups.clear()
    assert optimizer.step(lambda: 3.5) == 3.5
    assert optimizer.step() is None
    assert optimizer.grad_norm is None
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer = copy.deepcopy(pickle.loads(pickle.dumps(optimizer)))
    optimizer.zero_grad()
    optimizer.add_param_group({"params": [p]})
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert (p != 1).all()


@EVERY_RULE
def test_groups_without_parameters(rule):
    p = parameter(torch.ones(2))
    optimizer = rule.ours([{"params": []}, {"params": [p]}, {"params": []}], lr=0.1, max_norm=1.0)
    p.grad = torch.full_like(p, 3.0)
    optimizer.step()
    assert (p != 1).all()
    assert optimizer.grad_norm == pytest.approx(18**0.5)
    optimizer.load_state_dict(optimizer.state_dict())


# ---- subclasses ------------------------------------------------------------------------------------------------------


@EVERY_RULE
def test_arguments_of_a_subclass_are_not_options(rule):
    """They are not options: loading, copying and pickling leave groups and defaults as torch would."""
    keys = {}
    for base in (rule.ours, rule.theirs):
        mine = type("Mine", (base,), {"__init__": make_init(base), "__module__": __name__})
        globals()["Mine"] = mine
        p = parameter(torch.ones(3))
        optimizer, again = mine([p], 0.1, warmup=7), mine([p], 0.1)
        p.grad = torch.ones(3)
        optimizer.step()
        before = set(again.param_groups[0])
        again.load_state_dict(optimizer.state_dict())
        assert set(again.param_groups[0]) == before
        for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            assert set(other.param_groups[0]) == before
            assert not {"warmup", "name"} & other.defaults.keys()
            other.step()
        keys[base] = before
    assert keys[rule.theirs] - keys[rule.ours] <= {"initial_lr"}, "options of torch that ours lack"


def make_init(base):
    def __init__(self, params, lr, warmup=100, name="mine"):
        base.__init__(self, params, lr)
        self.warmup, self.name = warmup, name

    return __init__


def test_pickles_of_older_versions_get_the_options_of_the_class():
    """Options added by a later version get their defaults; AdamW has its own."""
    for cls in (AdamW, type("Mine", (AdamW,), {})):
        optimizer = cls([parameter(torch.ones(2))], lr=0.1)
        state = optimizer.__getstate__()
        for options in (state["defaults"], *state["param_groups"]):
            del options["eps_inside_sqrt"], options["max_norm"], options["weight_decay"]
        again = cls.__new__(cls)
        again.__setstate__(state)
        for options in (again.defaults, *again.param_groups):
            assert options["eps_inside_sqrt"] is False
            assert options["max_norm"] is None
            assert options["weight_decay"] == 1e-2


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [np.float32, np.float64, lambda v: torch.tensor(v, dtype=torch.float64)])
@EVERY_RULE
def test_numbers_of_numpy_and_torch(rule, number):
    """Every numeric option, in constructor and group. NumPy's numbers are saved as Python's."""

    def each(convert, value):
        if isinstance(value, tuple):
            return tuple(each(convert, v) for v in value)
        return convert(value) if type(value) is float else value

    p = parameter(torch.randn(5))
    twin = parameter(p.detach().clone())
    pairs = {"betas": (0.9, 0.99), "etas": (0.5, 1.25), "step_sizes": (1e-6, 50.0)}
    case = {**rule.usual, **{key: value for key, value in pairs.items() if key in rule.options}, "max_norm": 0.5}
    optimizer = rule.ours([p], **{key: each(number, value) for key, value in case.items()})
    other = rule.ours([twin], **{key: each(lambda v: float(number(v)), value) for key, value in case.items()})
    for _ in range(3):
        p.grad = torch.randn(5)
        twin.grad = p.grad.clone()
        optimizer.step()
        other.step()
    assert bits(p) == bits(twin)
    optimizer.add_param_group({"params": [parameter(torch.ones(2))], "lr": number(0.25)})
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))


# ---- a scaler's numbers on another device ----------------------------------------------------------------------------


@pytest.mark.parametrize("found", [0.0, 1.0])
@EVERY_RULE
def test_overflow_found_on_a_device_without_parameters(rule, found, monkeypatch):
    """found_inf is on CUDA while all parameters with gradients are on the CPU, so the host has to read it."""
    p, q = parameter(torch.ones(3)), parameter(torch.ones(3))
    optimizer = rule.ours([p, q], fused_unscale=True, **rule.usual)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(found)
    monkeypatch.setattr(_native, "is_on_cuda", lambda tensor: tensor is optimizer.found_inf or tensor is q)
    p.grad = torch.ones(3)
    before = snapshot(optimizer)
    optimizer.step()
    assert (snapshot(optimizer) == before) == bool(found)
    if found:
        assert_same(snapshot(optimizer), before, "skipped")
        assert not optimizer.state
