"""Refused arguments, groups and checkpoints: torch's errors where torch has them, and nothing has changed."""

import re

import pytest
import torch
from rules import RULES
from support import assert_same, has_named_parameters, parameter, snapshot

EVERY_RULE = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def good_parameters(sizes=(5, 3, 8, 6)) -> list[torch.nn.Parameter]:
    params = [parameter(torch.randn(n)) for n in sizes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


# ---- hyper-parameters ------------------------------------------------------------------------------------------------

# Each is tried on every optimizer that has these arguments.
ARGUMENTS = [
    {"lr": -1.0},
    {"lr": torch.tensor([0.1, 0.2])},
    {"weight_decay": -0.1},
    {"eps": -1e-8},
    {"betas": (1.0, 0.9)},
    {"betas": (0.9, 1.0)},
    {"betas": (-0.1, 0.9)},
    {"momentum": -0.1},
    {"nesterov": True},
    {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
    {"momentum_decay": -0.1},
    {"alpha": -0.1},
    {"etas": (1.2, 0.5)},
    {"etas": (0.5, 1.0)},
    {"etas": (0.0, 1.2)},
    {"lr_decay": -0.1},
    {"initial_accumulator_value": -0.1},
]
WRONG = [(key, kwargs) for key, rule in RULES.items() for kwargs in ARGUMENTS if kwargs.keys() <= rule.options.keys()]
WRONG.remove(("ASGD", {"alpha": -0.1}))  # an exponent, of any sign as in torch; RMSprop's is a weight
WRONG += [(key, {"betas": (0.9, torch.tensor(0.9))}) for key in ("Adam", "AdamW")]


def error_of(optimizer_class, kwargs) -> Exception | None:
    try:
        optimizer_class([parameter(torch.zeros(2))], **kwargs)
    except Exception as error:  # any type: the test compares them
        return error
    return None


@pytest.mark.parametrize(("key", "kwargs"), WRONG, ids=str)
def test_wrong_arguments_are_torchs_errors(key, kwargs):
    """The type and the beginning of the message are torch's for the same arguments."""
    theirs, ours = (error_of(cls, kwargs) for cls in (RULES[key].theirs, RULES[key].ours))
    if theirs is None or "Boolean value of Tensor" in str(theirs):  # older torch does not check tensors
        assert isinstance(ours, ValueError), f"a ValueError expected, came {ours!r}"
        return
    assert isinstance(ours, type(theirs)), f"expected {theirs!r}, came {ours!r}"
    assert str(ours).startswith(str(theirs)), f"expected {theirs}, came {ours}"


@pytest.mark.parametrize("rule", [pytest.param(rule, id=key) for key, rule in RULES.items() if not rule.stand_in])
def test_differentiable_is_refused(rule):
    with pytest.raises(RuntimeError, match="differentiable"):
        rule.ours([parameter(torch.zeros(2))], differentiable=True)


OURS = [
    ("SGD", {"max_norm": 1.0, "normalize_grads": True}, "max_norm"),
    ("Adam", {"max_norm": 1.0, "normalize_grads": True}, "max_norm"),
    ("Adam", {"max_norm": -1.0}, "max_norm"),
    (
        "Adam",
        {"betas": (torch.tensor([0.9, 0.8]), torch.tensor(0.9))},
        "1-element",
    ),  # torch raises an accidental RuntimeError
    ("SGD", {"momentum": 0.9, "dampening": 0.1, "lr_in_velocity": True}, "lr_in_velocity"),
    ("SGD", {"momentum": 0.9, "dampening": 0.1, "fused_unscale": True}, "fused_unscale"),
    ("Rprop", {"variant": "rprop+"}, "variant"),
]


@pytest.mark.parametrize(("key", "kwargs", "word"), OURS, ids=str)
def test_wrong_arguments_of_ours(key, kwargs, word):
    with pytest.raises(ValueError, match=word):
        RULES[key].ours([parameter(torch.zeros(2))], **kwargs)


NO_NUMBERS = [
    (option, value)
    for option in (
        "lr",
        "eps",
        "weight_decay",
        "momentum",
        "dampening",
        "alpha",
        "lr_decay",
        "momentum_decay",
        "max_norm",
    )
    for value in ("3e-4", None, [1e-3])
    if (option, value) != ("max_norm", None)
]


@pytest.mark.parametrize(("option", "value"), NO_NUMBERS, ids=str)
@EVERY_RULE
def test_an_argument_that_is_no_number_is_named(rule, option, value):
    """Also in a group dict, and when a group is added."""
    if option not in {*rule.options, "max_norm"}:
        pytest.skip("not an argument of this optimizer")
    text = f"^{re.escape(f'{option} is {value!r} ({type(value).__name__}); a number or a tensor of one element')}"
    with pytest.raises(TypeError, match=text):
        rule.ours([parameter(torch.zeros(2))], **{option: value})
    with pytest.raises(TypeError, match=text):
        rule.ours([{"params": [parameter(torch.zeros(2))], option: value}])


@pytest.mark.parametrize("option", ["betas", "etas", "step_sizes"])
@EVERY_RULE
def test_an_argument_that_is_no_pair_is_named(rule, option):
    if option not in rule.options:
        pytest.skip("not an argument of this optimizer")
    for value in (0.9, (0.9,), (0.5, 1.2, 1.3), None):
        with pytest.raises(TypeError, match=rf"^{option} is {re.escape(repr(value))} .*two numbers are expected"):
            rule.ours([parameter(torch.zeros(2))], **{option: value})
    with pytest.raises(TypeError, match=rf"^{option}\[1\] is '0.9' \(str\); a number"):
        rule.ours([parameter(torch.zeros(2))], **{option: (0.5, "0.9")})


@EVERY_RULE
def test_a_max_norm_of_zero_warns(rule):
    """It follows the formula, as torch's function does, and trains nothing; some frameworks mean "off" by it."""
    p = parameter(torch.zeros(2))
    with pytest.warns(UserWarning, match="^max_norm=0 makes every gradient 0") as caught:
        optimizer = rule.ours([p], max_norm=0)
    assert len(caught) == 1
    for _ in range(2):
        p.grad = torch.ones(2)
        optimizer.step()  # does not warn again: a warning is an error here
    with pytest.warns(UserWarning, match="max_norm=0"):
        optimizer.add_param_group({"params": [parameter(torch.zeros(2))]})


@pytest.mark.parametrize("arguments", [{"max_norm": 1.0}, {"normalize_grads": True}], ids=str)
@EVERY_RULE
def test_groups_that_disagree_on_the_norm(rule, arguments):
    """Both apply to the whole optimizer; a group that disagrees is refused when created, added or changed."""
    params = good_parameters()
    (word,) = arguments
    with pytest.raises(ValueError, match=word):
        rule.ours([{"params": params[:2], **arguments}, {"params": params[2:]}])

    optimizer = rule.ours(params[:2], **rule.usual)
    with pytest.raises(ValueError, match=word):
        optimizer.add_param_group({"params": params[2:], **arguments})
    assert len(optimizer.param_groups) == 1, "the refused group was added"
    optimizer.step()

    optimizer = rule.ours([{"params": params[:2]}, {"params": params[2:]}], **rule.usual)
    optimizer.step()
    before = snapshot(optimizer)
    optimizer.param_groups[1].update(arguments)
    with pytest.raises(ValueError, match=word):
        optimizer.step()
    assert_same(snapshot(optimizer), before, "after the error")


@EVERY_RULE
def test_one_parameter_in_two_groups(rule):
    p = parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=r"^some parameters appear in more than one parameter group"):
        rule.ours([{"params": [p]}, {"params": [p]}])


@EVERY_RULE
def test_what_the_base_class_refuses(rule):
    """torch's own checks still apply."""
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        rule.ours([])
    with pytest.raises(TypeError, match="params argument given to the optimizer should be an iterable"):
        rule.ours(torch.zeros(2))
    with pytest.raises(ValueError, match=r"^can't optimize a non-leaf Tensor"):
        rule.ours([parameter(torch.zeros(2)) * 2])
    with pytest.raises(TypeError, match="optimizer can only optimize Tensors"):
        rule.ours([1.0])


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@EVERY_RULE
def test_checkpoint_of_other_shapes(rule):
    """Refused when loaded or at the next step; the parameters do not change."""
    params, others = good_parameters(), good_parameters((5, 3, 8, 7))
    names = ["first.weight", "first.bias", "second.weight", "bad.weight"]
    name = names[3] if has_named_parameters else "parameter 3 of group 0"
    optimizer = rule.ours(list(zip(names, params, strict=True)) if has_named_parameters else params, **rule.usual)
    saving = rule.ours(others, **rule.usual)
    for o in (optimizer, saving):
        o.step()
    before = [p.detach().clone() for p in params]

    def load_and_step():
        optimizer.load_state_dict(saving.state_dict())
        optimizer.step()

    with pytest.raises((RuntimeError, ValueError), match=re.escape(name)):
        load_and_step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True)), "parameters were written"


@pytest.mark.parametrize("lecture", [False, True])
def test_checkpoint_of_the_other_sgd(lecture):
    """A velocity that contains lr is not torch's momentum buffer: loading is refused, nothing changes."""
    p = parameter(torch.randn(4))
    p.grad = torch.randn(4)
    optimizers = {form: RULES["SGD"].ours([p], lr=0.1, momentum=0.9, lr_in_velocity=form) for form in (False, True)}
    for optimizer in optimizers.values():
        optimizer.step()
    loading, saving = optimizers[lecture], optimizers[not lecture]
    before = snapshot(loading)
    with pytest.raises(ValueError, match="lr_in_velocity"):
        loading.load_state_dict(saving.state_dict())
    assert_same(snapshot(loading), before, "after the refusal")
    assert loading.param_groups[0]["lr_in_velocity"] is lecture
    if lecture:
        theirs = torch.optim.SGD([p], lr=0.1, momentum=0.9)
        theirs.step()
        before = snapshot(loading)
        with pytest.raises(ValueError, match="lr_in_velocity"):
            loading.load_state_dict(theirs.state_dict())
        assert_same(snapshot(loading), before, "after refusing torch's")


@EVERY_RULE
def test_checkpoint_of_another_number_of_groups(rule):
    """torch's own sentences."""
    params = good_parameters()
    optimizer = rule.ours(params)
    with pytest.raises(ValueError, match=r"^loaded state dict has a different number of parameter groups"):
        optimizer.load_state_dict(rule.ours([{"params": params[:1]}, {"params": params[1:]}]).state_dict())
    with pytest.raises(ValueError, match=r"^loaded state dict contains a parameter group that doesn't match the size"):
        optimizer.load_state_dict(rule.ours(params[:2]).state_dict())
