"""The wrappers' states: live, writable, and only of parameters in the groups."""

import copy
import gc
import io
import weakref
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from onepass.optim import SAM, SGD, Adam, Lookahead, SparseAdam
from support import assert_same, bits, parameter, snapshot

WRAPPED = {
    "Lookahead": lambda params, **options: Lookahead(Adam(params, lr=0.1), **{"k": 2, **options}),
    "SAM": lambda params, **options: SAM(params, Adam, lr=0.1, **options),
    "both": lambda params: Lookahead(SAM(params, Adam, lr=0.1), k=2),
}
EVERY_WRAPPER = pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)


def step(optimizer, params, seed: int = 1) -> None:
    """One step of any wrapper, with the same gradients in both halves of SAM."""
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(p.shape, generator=generator).to(p) for p in params]

    def closure():
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()

    optimizer.step(closure)


def perturb(optimizer, params) -> None:
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.first_step()


def parameters(*shapes) -> list[torch.nn.Parameter]:
    return [parameter(torch.randn(shape)) for shape in shapes or ((3,), (2, 4))]


# ---- what left the groups --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remove", ["group", "entry", "frozen"])
def test_lookahead_ignores_parameters_that_left(remove):
    """Removed, replaced and frozen parameters keep their current values, bit for bit."""
    kept, gone = parameters((3,), (3,))
    optimizer = Lookahead(SGD([{"params": [kept]}, {"params": [gone]}], lr=0.1), k=2)
    step(optimizer, [kept, gone])
    if remove == "group":
        del optimizer.param_groups[1]
    elif remove == "entry":
        optimizer.param_groups[1]["params"][0] = parameter(torch.zeros(5))
    else:
        gone.requires_grad_(False)
    gone.grad = None
    gone.data.fill_(7.0)
    start = optimizer.state[kept]["slow_param"].clone()
    step(optimizer, [kept])
    assert gone.tolist() == [7.0] * 3
    assert not torch.equal(optimizer.state[kept]["slow_param"], start), "the others are synchronised"


def test_a_parameter_that_returns_starts_again():
    """It gets new slow weights, not those from before it left."""
    stays, away = parameters((3,), (3,))
    optimizer = Lookahead(SGD([{"params": [stays]}, {"params": [away]}], lr=0.1), k=2)
    step(optimizer, [stays, away])
    group = optimizer.param_groups.pop()
    step(optimizer, [stays])
    away.data.fill_(7.0)
    optimizer.param_groups.append(group)
    away.grad = None
    step(optimizer, [stays])
    assert optimizer.state[away]["slow_param"].tolist() == [7.0] * 3


def test_sam_restores_what_is_in_the_groups():
    stays, away = parameters((3,), (3,))
    optimizer = SAM([{"params": [stays]}, {"params": [away]}], SGD, lr=0.0)
    before = bits(stays)
    perturb(optimizer, [stays, away])
    del optimizer.param_groups[1]
    away.data.fill_(7.0)
    optimizer.second_step()
    assert bits(stays) == before
    assert away.tolist() == [7.0] * 3


@EVERY_WRAPPER
def test_a_replaced_parameter_is_saved_and_dies(wrap):
    """Densification: a larger parameter replaces another and takes its base states; nothing keeps the old one alive."""
    p = parameter(torch.zeros(3))
    optimizer = wrap([p])
    died = []
    for _ in range(4):
        step(optimizer, [p])
        died.append(weakref.ref(p))
        base = getattr(optimizer.base_optimizer, "base_optimizer", optimizer.base_optimizer)
        states = base.state.pop(p)
        q = parameter(torch.zeros(p.numel() + 2))
        base.state[q] = {k: torch.cat([v, torch.zeros(2)]) if v.dim() else v for k, v in states.items()}
        base.param_groups[0]["params"][0] = p = q
    states = None
    step(optimizer, [p])
    saved = optimizer.state_dict()
    assert saved["state"][0]["step"] == 5
    assert saved["state"][0]["exp_avg"].shape == p.shape
    assert saved["state"][0].get("slow_param", p).shape == p.shape
    optimizer.load_state_dict(saved)
    gc.collect()
    assert [r() for r in died] == [None] * 4


def test_a_dropped_wrapper_frees_its_states_at_once():
    """There is no reference cycle that waits for the garbage collector: states may be as large as the model."""
    params = parameters()
    gc.disable()
    try:
        for wrap in (WRAPPED["Lookahead"], WRAPPED["SAM"]):
            optimizer = wrap(params)
            step(optimizer, params)
            states = [weakref.ref(value) for _, of in optimizer._own._entries.values() for value in of.values()]
            assert len(states) == 2
            del optimizer
            assert [r() for r in states] == [None, None]
    finally:
        gc.enable()


def test_modules_that_swap_their_tensors():
    """torch.utils.swap_tensors refuses tensors with weak references; slow weights work regardless."""
    model = torch.nn.Linear(3, 2)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        optimizer = WRAPPED["Lookahead"](model.parameters())
        step(optimizer, list(model.parameters()))
        optimizer.zero_grad()
        model.to(torch.float64)
        assert optimizer.state[model.weight]["slow_param"].dtype == torch.float32
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    replaced = weakref.ref(model.weight)
    optimizer.base_optimizer.state.clear()
    optimizer.state.clear()
    optimizer.param_groups[0]["params"] = list(torch.nn.Linear(3, 2).parameters())
    step(optimizer, optimizer.param_groups[0]["params"])
    del model
    gc.collect()
    assert replaced() is None


# ---- groups without parameters, counts -------------------------------------------------------------------------------


@EVERY_WRAPPER
@pytest.mark.parametrize("which", ["first", "all", "none at all"])
def test_empty_groups(wrap, which):
    """As on a rank that owns no parameter of a group: the others step, and an empty state is saved and loaded."""
    p = parameter(torch.ones(2))
    optimizer = wrap([{"params": []}, {"params": [p] if which == "first" else []}])
    if which == "none at all":
        optimizer.param_groups.clear()
    step(optimizer, [p])
    assert (p == 1).all() != (which == "first")
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.add_param_group({"params": [parameter(torch.ones(3))]})


def test_quadratic_without_parameters():
    optimizer = Lookahead(SGD([{"params": []}], lr=0.1), 1, "quadratic")
    assert optimizer.step(lambda: 3.5) == 3.5


def test_groups_added_to_the_wrapped_optimizer_are_seen():
    p, q = parameters((3,), (3,))
    optimizer = Lookahead(SGD([p], lr=0.1), k=2)
    step(optimizer, [p])
    optimizer.base_optimizer.add_param_group({"params": [q]})
    step(optimizer, [p, q])
    assert [group["lookahead_step"] for group in optimizer.param_groups] == [2, 2]
    assert torch.equal(optimizer.state[q]["slow_param"], q), "synchronised in step 2"


# ---- the mapping -----------------------------------------------------------------------------------------------------


@EVERY_WRAPPER
def test_writes_reach_both_optimizers(wrap):
    """Code that iterates over the states to move, cast or reset them reaches both optimizers, in both usual forms."""
    params = parameters()
    optimizer = wrap(params)
    step(optimizer, params)
    for p, states in optimizer.state.items():
        for key, value in states.items():
            states[key] = torch.full_like(value, 2.0)
        assert {key: value.max().item() for key, value in optimizer.state[p].items()} == dict.fromkeys(states, 2.0)
    for p, states in optimizer.state.items():
        optimizer.state[p] = type(states)(OrderedDict((k, torch.full_like(v, 3.0)) for k, v in states.items()))
    base = getattr(optimizer.base_optimizer, "base_optimizer", optimizer.base_optimizer)
    for i, p in enumerate(params):
        assert {value.max().item() for value in optimizer.state[p].values()} == {3.0}
        assert {value.max().item() for value in base.state[p].values()} == {3.0}
        assert type(base.state[p]) is dict
        assert base.state[p].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert {value.max().item() for value in optimizer.state_dict()["state"][i].values()} == {3.0}
    step(optimizer, params)


def test_the_mapping_is_a_dict_of_dicts():
    """Every method of a dict works, on the states of all parameters and of one."""
    params, other = parameters(), parameter(torch.zeros(1))
    optimizer = WRAPPED["Lookahead"](params)
    assert (len(optimizer.state), bool(optimizer.state), list(optimizer.state)) == (0, False, [])
    step(optimizer, params)
    state = optimizer.state
    assert list(state) == params
    assert len(state) == 2
    assert params[0] in state
    assert other not in state
    assert state.get(other) is None
    assert state.get(other, 5) == 5
    assert other not in state, "get() makes no entry"
    assert state.pop(other, 6) == 6
    for call in (lambda: state.pop(other), lambda: state.__delitem__(other)):
        with pytest.raises(KeyError):
            call()
    assert not state[other], "but [] makes one, as in torch"
    assert optimizer.base_optimizer.state.pop(other) == {}

    one = state[params[0]]
    assert list(one) == ["step", "exp_avg", "exp_avg_sq", "slow_param"]
    assert len(one) == 4
    assert repr(one) == repr(dict(one))
    assert repr(state) == repr({p: dict(state[p]) for p in params})
    for name in ("slow_param", "exp_avg"):
        value = one.pop(name)
        assert name not in one
        assert name not in state[params[0]]
        with pytest.raises(KeyError):
            one[name]
        with pytest.raises(KeyError):
            del one[name]
        one.setdefault(name, value)
        assert state[params[0]][name] is value

    content = state.pop(params[0])
    assert content.keys() == {"step", "exp_avg", "exp_avg_sq", "slow_param"}
    assert params[0] not in state
    assert params[0] not in optimizer.base_optimizer.state
    state.update({params[0]: content})
    assert state[params[0]]["slow_param"] is content["slow_param"]
    before = snapshot(optimizer)
    popped = dict(state.popitem() for _ in range(2))
    assert not state
    with pytest.raises(KeyError):
        state.popitem()
    optimizer.state = popped
    assert_same(snapshot(optimizer), before, "popped and put back")
    state.clear()
    assert not optimizer.state_dict()["state"]


def test_slow_weights_without_states_of_the_base():
    """SGD keeps no state: the mapping contains the parameters only because of the wrapper."""
    params = parameters()
    optimizer = Lookahead(SGD(params, lr=0.1))
    step(optimizer, params)
    assert list(optimizer.state) == params
    assert optimizer.state_dict()["state"].keys() == {0, 1}
    assert params[1] in optimizer.state
    assert optimizer.state.pop(params[1]).keys() == {"slow_param"}
    assert list(optimizer.state) == params[:1]


@EVERY_WRAPPER
def test_copies_and_assignment(wrap):
    """A deep copy of the states consists of dicts; assigning it restores them."""
    params = parameters()
    optimizer = wrap(params)
    step(optimizer, params)
    before = snapshot(optimizer)
    values = [p.detach().clone() for p in params]
    backup = {p: copy.deepcopy(states) for p, states in optimizer.state.items()}
    assert {type(states) for states in backup.values()} == {dict}
    assert type(copy.deepcopy(optimizer.state)) is dict
    step(optimizer, params)
    for p, value in zip(params, values, strict=True):
        p.data.copy_(value)
    optimizer.state = backup
    assert_same(snapshot(optimizer), before, "restored")
    optimizer.state = optimizer.state
    assert_same(snapshot(optimizer), before, "assigned to itself")
    optimizer.state = defaultdict(dict)
    assert not optimizer.state
    step(optimizer, params)


def test_anything_under_any_key():
    """torch.optim allows values that are not tensors and keeps them in checkpoints."""
    optimizer = WRAPPED["Lookahead"](parameters())
    optimizer.state["calls"] = 3
    assert (
        optimizer.state["calls"]
        == optimizer.base_optimizer.state["calls"]
        == optimizer.state_dict()["state"]["calls"]
        == 3
    )
    assert optimizer.state.pop("calls") == 3


def test_reading_a_state_looks_at_one_parameter():
    """A lookup must not visit all parameters, or n lookups would cost n² steps."""

    class NoWalks(defaultdict):
        def __iter__(self):
            raise AssertionError("all parameters were walked over")

        keys = values = items = copy = __len__ = __iter__

    params = parameters()
    for wrap in (WRAPPED["Lookahead"], WRAPPED["SAM"]):
        optimizer = wrap(params)
        step(optimizer, params)
        states = NoWalks(dict)
        for p in params:
            dict.__setitem__(states, p, optimizer.base_optimizer.state[p])
        optimizer.base_optimizer.state, optimizer._kept_state = states, None
        assert params[0] in optimizer.state
        assert optimizer.state[params[0]]["step"] == optimizer.state.get(params[0])["step"] == 1


def test_old_weights_are_state_between_the_halves_only():
    params, other = parameters(), parameter(torch.zeros(1))
    optimizer = SAM([*params, other], Adam, lr=0.1)
    step(optimizer, params)
    assert "old_param" not in optimizer.state[params[0]]
    with pytest.raises(KeyError, match="not perturbed"):
        optimizer.state[params[0]]["old_param"] = torch.zeros(3)
    before = bits(params[0])
    optimizer.zero_grad()
    perturb(optimizer, params)
    assert bits(optimizer.state[params[0]]["old_param"]) == before
    with pytest.raises(KeyError, match="not perturbed"):
        optimizer.state[other] = {"old_param": torch.zeros(1)}
    optimizer.state[params[0]]["old_param"] = torch.full((3,), 5.0)
    optimizer.base_optimizer.register_step_pre_hook(lambda *_: seen.append(params[0].tolist()))
    seen = []
    optimizer.second_step()
    assert seen == [[5.0] * 3]


def test_old_weights_that_were_cleared():
    """There is nothing to restore, and the error says so; loading a checkpoint helps."""
    params = parameters()
    optimizer = SAM(params, Adam, lr=0.1)
    saved = copy.deepcopy(optimizer.state_dict())
    perturb(optimizer, params)
    optimizer.state.clear()
    with pytest.raises(RuntimeError, match=r"weights from before are gone.*checkpoint"):
        optimizer.second_step()
    assert optimizer.is_perturbed
    optimizer.load_state_dict(saved)
    assert not optimizer.is_perturbed
    step(optimizer, params)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def test_hooks_of_the_wrapped_optimizer_save_and_load():
    """One of its hooks adds an entry when saving, another removes it when loading."""
    params, seen = parameters(), []
    optimizer = WRAPPED["Lookahead"](params)
    base = optimizer.base_optimizer
    base.register_state_dict_pre_hook(lambda o: seen.append(o))
    base.register_state_dict_post_hook(lambda o, d: {**d, "extra": 1})
    base.register_load_state_dict_pre_hook(lambda o, d: (seen.append(d.pop("extra")), d)[1])
    optimizer.register_state_dict_pre_hook(lambda o: seen.append(o))
    step(optimizer, params)
    saved = optimizer.state_dict()
    assert seen == [optimizer, base]
    assert saved["extra"] == 1
    optimizer.load_state_dict(saved)
    assert seen == [optimizer, base, 1]


def test_a_wrapped_optimizer_saves_in_its_own_way():
    """torch's SparseAdam counts steps in Python ints, and so does ours in a checkpoint."""
    table = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = Lookahead(SparseAdam(table.parameters(), lr=0.1), k=2)
    table(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    assert type(saved["state"][0]["step"]) is int
    optimizer.load_state_dict(saved)


def test_saving_changes_nothing():
    params = parameters()
    optimizer = WRAPPED["Lookahead"](params)
    step(optimizer, params)
    saved = optimizer.state_dict()
    saved["state"][0].clear()
    saved["state"].clear()
    assert len(optimizer.state[params[0]]) == 4


@pytest.mark.parametrize("perturbed", [None, "list"])
def test_pickles_of_older_versions(perturbed):
    """They contained a list of the perturbed parameters."""
    p = parameter(torch.zeros(2))
    optimizer = SAM.__new__(SAM)
    own = {p: {"old_param": torch.ones(2)}}
    state = {"base_optimizer": SAM([p], SGD, lr=0.0).base_optimizer, "_own_state": own if perturbed else {}}
    optimizer.__setstate__({**state, "_perturbed": [p] if perturbed else None})
    assert optimizer.is_perturbed == bool(perturbed)
    if perturbed:
        optimizer.second_step()
        assert p.tolist() == [1, 1]


# ---- numbers of any kind ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [np.float32, np.float64, torch.tensor, lambda v: torch.tensor([v])])
def test_numbers_of_numpy_and_torch(number):
    """Accepted for k, alpha and rho, in constructor and group; NumPy's numbers are saved as Python's."""
    params = parameters()
    integer = (lambda v: np.int64(v)) if number in (np.float32, np.float64) else number
    for optimizer, twin in (
        (Lookahead(SGD(params, lr=0.1), integer(2), number(0.25)), Lookahead(SGD(params, lr=0.1), 2, 0.25)),
        (SAM(params, SGD, number(0.25), lr=0.1), SAM(params, SGD, 0.25, lr=0.1)),
    ):
        values = [p.detach().clone() for p in params]
        results = []
        for o in (optimizer, twin):
            for p, value in zip(params, values, strict=True):
                p.data.copy_(value)
            step(o, params)
            step(o, params, seed=2)
            results.append([bits(p) for p in params])
        assert results[0] == results[1]
        name = "lookahead_k" if isinstance(optimizer, Lookahead) else "sam_rho"
        optimizer.add_param_group({"params": parameters((2,)), name: integer(2)})
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        optimizer.load_state_dict(torch.load(file, weights_only=True))


@pytest.mark.parametrize("k", [np.float64(2), 2.0, torch.tensor(2.0), torch.tensor([2, 3]), "2", None, np.int64(0)])
def test_numbers_that_are_not_counts(k):
    with pytest.raises(ValueError, match="Invalid k value"):
        Lookahead(SGD(parameters(), lr=0.1), k)


def test_tensors_with_more_than_a_number():
    params = parameters()
    with pytest.raises(ValueError, match="Tensor alpha must be 1-element"):
        Lookahead(SGD(params, lr=0.1), 2, torch.tensor([0.1, 0.2]))
    with pytest.raises(ValueError, match="Tensor rho must be 1-element"):
        SAM(params, SGD, torch.tensor([0.1, 0.2]), lr=0.1)
