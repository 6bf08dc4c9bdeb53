"""State dicts go both ways between onepass and torch.optim mid-training; deepcopy and pickle keep everything."""

import copy
import io
import pickle

import pytest
import torch
from reference.common import name
from rules import RULES, BesideReference, BesideTorch
from support import HALF, assert_same, needs_named_parameters, parameter, snapshot

FORMS = [
    pytest.param(rule, form, id=f"{key}-{name(form, rule.options)}")
    for key, rule in RULES.items()
    for form in rule.torch_forms(rule.cases)
]
EVERY_RULE = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def through_file(state_dict: dict) -> dict:
    """Save and load as users do."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(("rule", "case"), FORMS)
def test_torch_to_ours(rule, case, device):
    """An optimizer with other arguments takes everything from the checkpoint and continues like torch."""
    both = BesideTorch(rule, case, device=device)
    both.train(5)
    both.ours = rule.ours(both.model.parameters(), lr=99.0)
    both.ours.load_state_dict(through_file(both.theirs.state_dict()))
    both.train(5)


@pytest.mark.parametrize(("rule", "case"), FORMS)
def test_ours_to_torch(rule, case, device):
    both = BesideTorch(rule, case, device=device)
    both.train(5)
    both.theirs = rule.theirs(both.twin.parameters(), lr=99.0)
    both.theirs.load_state_dict(through_file(both.ours.state_dict()))
    for state in both.theirs.state.values():
        for scalar in both.ours.scalar_states:  # NAdam's and ASGD's: torch casts them and continues in that dtype
            state[scalar] = state[scalar].float()
    both.train(5)


@EVERY_RULE
def test_state_dict_has_torchs_structure(rule, device):
    both = BesideTorch(rule, device=device)
    both.train(1)
    ours, theirs = both.ours.state_dict(), both.theirs.state_dict()
    assert ours.keys() == theirs.keys()
    assert {i: s.keys() for i, s in ours["state"].items()} == {i: s.keys() for i, s in theirs["state"].items()}
    for i, states in theirs["state"].items():
        for key, value in states.items():
            came = ours["state"][i][key]
            assert (came.shape, came.dtype) == (value.shape, value.dtype), f"{key} of parameter {i}"
    assert ours["param_groups"][0]["params"] == theirs["param_groups"][0]["params"]


@EVERY_RULE
def test_loading_keeps_our_own_options(rule):
    """A torch checkpoint lacks them, so they keep the values that this optimizer was created with."""
    own = {"max_norm": 0.25, "fused_unscale": True}
    forms = {"lr_in_velocity": True, "eps_inside_sqrt": True, "bias_correction": False, "variant": "rprop-"}
    own |= {key: value for key, value in forms.items() if key in rule.options}
    both = BesideTorch(rule)
    both.ours = rule.ours(both.model.parameters(), **own)
    both.ours.load_state_dict(both.theirs.state_dict())
    group = both.ours.param_groups[0]
    assert {key: group.get(key) for key in own} == own
    assert group["lr"] == rule.usual["lr"], f"lr should come from the checkpoint: {rule.usual['lr']}, is {group['lr']}"


@EVERY_RULE
def test_our_options_are_in_the_checkpoint(rule):
    """They override those of the optimizer that loads it."""
    p = [parameter(torch.zeros(3))]
    loaded = rule.ours(p)
    loaded.load_state_dict(rule.ours(p, max_norm=0.25).state_dict())
    assert loaded.param_groups[0]["max_norm"] == 0.25


@EVERY_RULE
def test_checkpoint_with_few_keys(rule):
    """Old checkpoints lack newer arguments, which then come from the optimizer, and the step works."""
    both = BesideTorch(rule)
    both.train(2)
    saved = through_file(both.theirs.state_dict())
    saved["param_groups"] = [{"params": g["params"], "lr": g["lr"]} for g in saved["param_groups"]]
    both.ours.load_state_dict(saved)
    both.train(2)


@pytest.mark.parametrize("rule", [pytest.param(r, id=key) for key, r in RULES.items() if "capturable" in r.options])
def test_step_as_a_number(rule):
    """Very old checkpoints hold `step` as an int, and the other 0-d states as floats."""
    both = BesideTorch(rule)
    both.train(3)
    saved = through_file(both.theirs.state_dict())
    for state in saved["state"].values():
        state.update({key: int(v) if key == "step" else float(v) for key, v in state.items() if v.dim() == 0})
    both.ours.load_state_dict(saved)
    both.train(2)
    for state in both.ours.state.values():
        assert state["step"].dtype == torch.float32
        assert state["step"] == 5, f"expected 5 steps, came {state['step']}"


def test_momentum_buffer_of_none():
    """Old SGD checkpoints contain None for a buffer that does not exist yet."""
    both = BesideTorch(RULES["SGD"])
    saved = both.theirs.state_dict()
    saved["state"] = {i: {"momentum_buffer": None} for i in range(4)}
    for optimizer in (both.ours, both.theirs):
        optimizer.load_state_dict(copy.deepcopy(saved))
    both.train(3)


@pytest.mark.parametrize("half", HALF, ids=str)
@EVERY_RULE
def test_sixteen_bit_parameters_keep_float32_states(rule, half, device):
    """torch's load_state_dict casts states to the parameter's dtype; ours come back bit for bit."""
    p = parameter(torch.randn(50, device=device).to(half))
    case = {**rule.usual, "lr": 0.01}
    both = BesideReference(rule, case, [p])
    for _ in range(3):
        both.step([torch.randn(50, device=device).to(half)])
    before = snapshot(both.optimizer)
    saved = through_file(both.optimizer.state_dict())
    both.optimizer = rule.ours([p], **case)
    both.optimizer.load_state_dict(saved)
    assert_same(snapshot(both.optimizer), before, "states after loading")
    both.step([torch.randn(50, device=device).to(half)])


@EVERY_RULE
def test_torch_bfloat16_states_become_float32(rule, device):
    p = parameter(torch.randn(50, device=device).bfloat16())
    twin = parameter(p.detach().clone())
    theirs, ours = rule.theirs([twin], **rule.usual), rule.ours([p], **rule.usual)
    twin.grad = torch.randn_like(twin)
    theirs.step()
    ours.load_state_dict(theirs.state_dict())
    p.grad = torch.randn_like(p)
    ours.step()
    assert {v.dtype for v in ours.state[p].values()} == {torch.float32}, ours.state[p]


@EVERY_RULE
def test_loading_by_keyword_and_twice(rule):
    """Distributed checkpoints call it by keyword; the given dict is not changed."""
    both = BesideTorch(rule)
    both.train(2)
    saved = through_file(both.theirs.state_dict())
    kept = copy.deepcopy(saved)
    for _ in range(2):
        both.ours.load_state_dict(state_dict=saved)
    both.train(1)
    assert saved.keys() == kept.keys()
    assert saved["param_groups"] == kept["param_groups"], "load_state_dict changed what it was given"


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda both: pickle.loads(pickle.dumps(both))}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("clipped", [False, True])
@EVERY_RULE
def test_copies_are_independent(rule, how, clipped):
    """Model and optimizer are copied together: the copy continues as the original would; the original is not changed."""
    model = torch.nn.Linear(5, 3)
    options = {"max_norm": 0.5} if clipped else {}
    optimizer = rule.ours(model.parameters(), **rule.usual, **options)

    def train(model, optimizer):
        generator = torch.Generator().manual_seed(7)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 5, generator=generator)).square().sum().backward()
            optimizer.step()

    train(model, optimizer)
    before = snapshot(optimizer)
    other_model, other = COPIES[how]((model, optimizer))
    assert other.grad_norm is None or isinstance(other.grad_norm, torch.Tensor)
    assert_same(snapshot(other), before, f"content after {how}")
    train(other_model, other)
    assert_same(snapshot(optimizer), before, f"the original after training its {how}")
    train(model, optimizer)
    assert_same(snapshot(other), snapshot(optimizer), f"{how} against the original")


@needs_named_parameters
@EVERY_RULE
def test_param_names_are_kept(rule):
    model = torch.nn.Linear(5, 3)
    optimizer = rule.ours(model.named_parameters(), **rule.usual)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    optimizer.load_state_dict(rule.theirs(model.parameters()).state_dict())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]


@pytest.mark.parametrize("key", ["Adam", "AdamW"])
def test_adamw_stays_decoupled(key):
    """As in torch, no loaded state turns an AdamW into an Adam."""
    p = [parameter(torch.zeros(3))]
    optimizer = RULES["AdamW"].ours(p)
    optimizer.load_state_dict(RULES[key].theirs(p).state_dict())
    assert optimizer.param_groups[0]["decoupled_weight_decay"] is True
