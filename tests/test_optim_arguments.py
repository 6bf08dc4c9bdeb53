"""Arguments in other forms: tensors for lr and betas, accepted hints, and torch's defaults and signatures."""

import inspect
import pydoc

import onepass
import pytest
import torch
from onepass.optim._formats import STORAGE_OPTIONS
from onepass.optim._interchange import fused_optimizers
from reference.common import SHARED_DEFAULTS
from rules import RULES, BesideReference
from support import assert_same, parameter, snapshot

ADAMS = {key: RULES[key] for key in ("Adam", "AdamW")}
COUNTING = {key: rule for key, rule in RULES.items() if "capturable" in rule.options}


def run(rule, case, device, steps=5) -> dict[str, bytes]:
    torch.manual_seed(3)
    params = [parameter(torch.randn(n, device=device)) for n in (5, 100)]
    optimizer = rule.ours(params, **case)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return snapshot(optimizer)


@pytest.mark.parametrize("rule", RULES)
def test_signature_is_torchs_and_ours_is_keyword_only(rule):
    ours, theirs = (inspect.signature(c).parameters for c in (RULES[rule].ours, RULES[rule].theirs))
    positional = [k for k, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [k for k, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
    assert {k: p.default for k, p in ours.items() if k in theirs} == {k: p.default for k, p in theirs.items()}
    added = ours.keys() - theirs.keys()
    storage = {} if rule == "SparseAdam" else STORAGE_OPTIONS
    accepted = {*RULES[rule].only_ours, *SHARED_DEFAULTS, *storage, "capturable"}  # Adagrad of torch has no capturable
    assert added <= accepted, f"arguments that neither torch nor the reference has: {added - accepted}"
    assert added >= {*RULES[rule].only_ours, "max_norm", "normalize_grads", "fused_unscale"}
    assert all(ours[name].kind is ours[name].KEYWORD_ONLY for name in added)


@pytest.mark.parametrize("rule", RULES)
def test_param_groups_have_torchs_keys_and_ours(rule):
    """Every argument is kept in the groups, where schedulers and checkpoints find it."""
    p = [parameter(torch.zeros(2))]
    ours, theirs = RULES[rule].ours(p).param_groups[0], RULES[rule].theirs(p).param_groups[0]
    assert ours.keys() >= theirs.keys(), f"missing: {theirs.keys() - ours.keys()}"
    shared = theirs.keys() - {"params"}
    assert {k: ours[k] for k in shared} == {k: theirs[k] for k in shared}
    assert {"max_norm", "normalize_grads"} <= ours.keys()


def test_adamw_is_an_adam():
    """As in torch: users' isinstance checks hold, and decay is decoupled whatever is loaded."""
    assert issubclass(RULES["AdamW"].ours, RULES["Adam"].ours)
    for rule in RULES.values():
        assert issubclass(rule.ours, torch.optim.Optimizer)
        assert rule.ours.__name__ == rule.theirs.__name__


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_lr_as_a_tensor(rule, shape, device):
    """The same bits as with a float, whatever the tensor's shape."""
    case = {**rule.usual, "lr": 0.125}
    tensor = {**case, "lr": torch.full(shape, 0.125, device=device)}
    assert_same(run(rule, tensor, device), run(rule, case, device), "lr as a tensor against a float")


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_lr_tensor_changed_in_place(rule, device):
    """Schedulers fill a tensor lr in place: each step reads it again, and no step writes it."""
    lr = torch.tensor(0.1, dtype=torch.float64, device=device)
    params = [parameter(torch.randn(6, device=device))]
    both = BesideReference(rule, {**rule.usual, "lr": lr}, params)
    for t in range(10):
        value = 0.1 / (t + 1)
        lr.fill_(value)
        both.reference.options["lr"] = value
        both.step([torch.randn_like(params[0])])
        assert float(lr) == value, "the step wrote lr"
    assert both.optimizer.param_groups[0]["lr"] is lr


@pytest.mark.parametrize("rule", ADAMS.values(), ids=ADAMS)
def test_betas_as_tensors(rule, device):
    """The same bits as with floats; 0.75 and 0.9375 are exact in float32."""
    case = {**rule.usual, "betas": (0.75, 0.9375)}
    for shape in ((), (1,)):
        betas = tuple(torch.full(shape, b, device=device) for b in case["betas"])
        assert_same(run(rule, {**case, "betas": betas}, device), run(rule, case, device), f"betas of shape {shape}")


@pytest.mark.parametrize("rule", [pytest.param(r, id=key) for key, r in RULES.items() if "betas" in r.options])
def test_betas_of_zero(rule, device):
    both = BesideReference(rule, {**rule.usual, "betas": (0.0, 0.0)}, [parameter(torch.randn(6, device=device))])
    for _ in range(3):
        both.step([torch.randn(6, device=device)])


@pytest.mark.parametrize("rule", COUNTING.values(), ids=COUNTING)
def test_capturable_gives_the_same_numbers(rule, device):
    expected = run(rule, rule.usual, device)
    assert_same(run(rule, {**rule.usual, "capturable": True}, device), expected, "capturable=True")


@pytest.mark.parametrize("hint", [{"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}], ids=str)
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_foreach_and_fused_are_hints(rule, hint, device):
    if not hint.keys() <= inspect.signature(rule.theirs).parameters.keys():
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            rule.ours([parameter(torch.zeros(2))], **hint)
        return
    assert_same(run(rule, {**rule.usual, **hint}, device), run(rule, rule.usual, device), str(hint))


@pytest.mark.parametrize("rule", [pytest.param(r, id=key) for key, r in RULES.items() if r.no_decay])
def test_zero_decay_adds_nothing(rule, device):
    """weight_decay=0 is skipped: an infinite parameter does not become NaN by 0·inf."""
    p = parameter(torch.tensor([float("inf"), 1.0], device=device))
    p.grad = torch.ones_like(p)
    rule.ours([p], lr=0.1, weight_decay=0.0).step()
    assert p[0].item() == float("inf"), f"expected inf, came {p[0]}"


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_no_parameters_with_gradients(rule, device):
    """A step without any gradient changes nothing and creates no state."""
    p = parameter(torch.ones(3, device=device))
    optimizer = rule.ours([p], **rule.usual)
    optimizer.step()
    assert p.tolist() == [1, 1, 1]
    assert not optimizer.state.get(p), f"expected no state, came {optimizer.state[p]}"


def test_sgd_without_momentum_stores_nothing(device):
    p = parameter(torch.ones(3, device=device))
    p.grad = torch.ones_like(p)
    optimizer = RULES["SGD"].ours([p], lr=0.5)
    optimizer.step()
    assert not optimizer.state.get(p), f"expected no state, came {optimizer.state[p]}"


def test_only_empty_tensors(device):
    for rule in RULES.values():
        params = [parameter(torch.zeros(shape, device=device)) for shape in ((0,), (3, 0), (0, 2))]
        both = BesideReference(rule, {**rule.usual, "max_norm": 1.0}, params)
        for _ in range(2):
            both.step([torch.zeros_like(p) for p in params])


@pytest.mark.parametrize("name", fused_optimizers())
def test_options_are_explained_and_misspelt_ones_refused(name):
    """help() lists every option, the groups keep each by its name, and an unknown one is named in the error."""
    cls = getattr(onepass.optim, name)
    p = [parameter(torch.zeros(2))]
    options = [option for option in inspect.signature(cls).parameters if option != "params"]
    shown = pydoc.render_doc(cls, renderer=pydoc.plaintext)
    assert [option for option in options if f"{option}: " not in shown] == []
    assert cls(p).param_groups[0].keys() >= set(options)
    assert {"max_norm", "normalize_grads", "fused_unscale"} <= set(options)
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_nrom'"):
        cls(p, max_nrom=1.0)
