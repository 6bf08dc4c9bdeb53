"""Bad input raises an error of torch's type that names the parameter, before anything is written."""

import re

import pytest
import torch
from rules import RULES
from support import assert_same, bits, has_named_parameters, needs_named_parameters, parameter, snapshot
from torch._subclasses.fake_tensor import FakeTensorMode

EVERY_RULE = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
NAMES = ["first.weight", "first.bias", "second.weight", "bad.weight"]
BAD = 3  # the position of the bad parameter
NAMED = pytest.param(True, id="named", marks=needs_named_parameters)
NUMBERED = pytest.param(False, id="numbered")


def good_parameters() -> list[torch.nn.Parameter]:
    params = [parameter(torch.randn(n)) for n in (5, 3, 8, 6)]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def bad_step(rule, params, *, named: bool, two_groups: bool = False, usual: bool = True):
    """An optimizer over three good parameters and a bad one, and the name of the bad one in messages."""
    entries = list(zip(NAMES, params, strict=True)) if named else params
    groups = [{"params": entries[:BAD]}, {"params": entries[BAD:]}] if two_groups else [{"params": entries}]
    optimizer = rule.ours(groups, **(rule.usual if usual else {}))
    position = "parameter 0 of group 1" if two_groups else f"parameter {BAD} of group 0"
    return optimizer, NAMES[BAD] if named else position


def assert_refused(optimizer, label: str, errors, text: str = "") -> None:
    """Assert that step() raises, that the message starts with `text` and names the parameter, and that nothing changed."""
    readable = [p for g in optimizer.param_groups for p in g["params"] if not is_opaque(p)]
    before = [bits(p) for p in readable]
    states = snapshot_states(optimizer)
    with pytest.raises(errors) as caught:
        optimizer.step()
    message = str(caught.value)
    assert message.startswith(text), f"the message should start with {text!r}, came: {message}"
    assert label in message, f"the message should name {label!r}, came: {message}"
    for i, p in enumerate(readable):
        assert bits(p) == before[i], f"parameter {i} was written before the error"
    assert_same(snapshot_states(optimizer), states, "states after the error")


def is_opaque(p: torch.Tensor) -> bool:
    """Whether the tensor has no values that a test can compare."""
    if p.device.type != "cpu" or p.layout != torch.strided or type(p.data) is not torch.Tensor:
        return True
    return torch._is_functional_tensor(p) or p.untyped_storage().nbytes() == 0


def snapshot_states(optimizer) -> dict[str, bytes]:
    content = {}
    for i, state in enumerate(optimizer.state.values()):
        content |= {f"{key} {i}": repr((v.dtype, v.shape, v.tolist())).encode() for key, v in state.items()}
    return content


# ---- gradients and parameters that became wrong after a good step ----------------------------------------------------


def other_dtype(p, optimizer):
    p.data = p.data.double()  # the gradient stays float32


def other_shape(p, optimizer):
    p.data = p.data[:4].clone()


def other_rank(p, optimizer):
    p.data = p.data.view(2, 3)


def expanded(p, optimizer):
    p.data = torch.ones(1).expand(6)


def overlapping(p, optimizer):
    p.data = torch.ones(6).as_strided((3, 2), (1, 1))
    p.grad = torch.ones(3, 2)
    optimizer.state.pop(p, None)


def freed(p, optimizer):
    p.data.untyped_storage().resize_(0)


def state_of_other_shape(p, optimizer):
    for key, value in optimizer.state[p].items():
        if value.dim():
            optimizer.state[p][key] = value[:2].clone()


def state_of_other_dtype(p, optimizer):
    for key, value in optimizer.state[p].items():
        if value.dim():
            optimizer.state[p][key] = value.half()


def state_on_meta(p, optimizer):
    for key, value in optimizer.state[p].items():
        if value.dim():
            optimizer.state[p][key] = value.to("meta")


SPOILED = [
    freed,
    other_dtype,
    other_shape,
    other_rank,
    expanded,
    overlapping,
    state_of_other_shape,
    state_of_other_dtype,
]


@pytest.mark.parametrize("options", [{}, {"max_norm": 1.0}], ids=["plain", "clip"])
@pytest.mark.parametrize("form", [pytest.param("named", marks=needs_named_parameters), "numbered", "second group"])
@pytest.mark.parametrize("spoil", SPOILED)
@EVERY_RULE
def test_spoiled_after_a_good_step(rule, spoil, form, options):
    params = good_parameters()
    optimizer, label = bad_step(rule, params, named=form == "named", two_groups=form == "second group")
    for group in optimizer.param_groups:
        group.update(options)
    optimizer.step()
    spoil(params[BAD], optimizer)
    assert_refused(optimizer, label, RuntimeError)


@EVERY_RULE
def test_state_without_memory(rule):
    """A state on the meta device has no memory, so no pointer to it may reach a kernel."""
    params = good_parameters()
    optimizer, label = bad_step(rule, params, named=has_named_parameters)
    optimizer.step()
    state_on_meta(params[BAD], optimizer)
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match=re.escape(label)):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


# ---- parameters that are wrong from the beginning --------------------------------------------------------------------


def of_integers():
    p = torch.nn.Parameter(torch.ones(6, dtype=torch.int64), requires_grad=False)
    p.grad = torch.ones_like(p)
    return p


def of_booleans():
    p = torch.nn.Parameter(torch.ones(6, dtype=torch.bool), requires_grad=False)
    p.grad = torch.ones_like(p)
    return p


def of_eight_bits():
    p = torch.nn.Parameter(torch.ones(6).to(torch.float8_e4m3fn), requires_grad=False)
    p.grad = torch.ones(6).to(torch.float8_e4m3fn)
    return p


def on_meta():
    p = torch.nn.Parameter(torch.empty(6, device="meta"))
    p.grad = torch.empty_like(p)
    return p


def fake():
    with FakeTensorMode():
        p = torch.nn.Parameter(torch.empty(6))
        p.grad = torch.empty(6)
    return p


def functional():
    p = torch._to_functional_tensor(torch.ones(6))
    p.grad = torch._to_functional_tensor(torch.ones(6))
    return p


def expanded_from_the_start():
    p = torch.nn.Parameter(torch.ones(1).expand(6))
    p.grad = torch.ones(6)
    return p


@pytest.mark.parametrize("named", [NAMED, NUMBERED])
@pytest.mark.parametrize(
    "make", [of_integers, of_booleans, of_eight_bits, on_meta, fake, functional, expanded_from_the_start]
)
@EVERY_RULE
def test_parameters_without_real_floating_values(rule, make, named):
    optimizer, label = bad_step(rule, [*good_parameters()[:BAD], make()], named=named)
    assert_refused(optimizer, label, (RuntimeError, TypeError, NotImplementedError))


def torchs_sentence_about_sparse(rule) -> str:
    p = parameter(torch.zeros(3))
    p.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match="sparse") as caught:
        rule.theirs([p], **rule.usual).step()
    return str(caught.value)


@pytest.mark.parametrize("named", [NAMED, NUMBERED])
@pytest.mark.parametrize("key", RULES)
def test_sparse_gradients(key, named):
    params = good_parameters()
    params[BAD].grad = params[BAD].grad.to_sparse()
    optimizer, label = bad_step(RULES[key], params, named=named)
    assert_refused(optimizer, label, RuntimeError, torchs_sentence_about_sparse(RULES[key]))
    params[BAD].grad = None
    optimizer.step()


@EVERY_RULE
def test_an_error_in_the_closure_changes_nothing(rule):
    optimizer = rule.ours(good_parameters(), **rule.usual)
    optimizer.step()
    before = snapshot(optimizer)

    def closure():
        raise KeyError("from the closure")

    with pytest.raises(KeyError, match="from the closure"):
        optimizer.step(closure)
    assert_same(snapshot(optimizer), before, "after the error")
