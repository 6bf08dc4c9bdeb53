"""Updates inside backward: the bits of backward() and step(), and one gradient at a time."""

import copy

import onepass
import pytest
import torch
from onepass.optim import step_in_backward
from processes import run
from rules import RULES
from support import assert_same, needs_named_parameters, parameter, snapshot

DENSE = {key: rule for key, rule in RULES.items() if key != "SparseAdam"}
EVERY_RULE = pytest.mark.parametrize("rule", DENSE.values(), ids=DENSE)


class Tied(torch.nn.Module):
    """A weight that is used twice, one that is frozen, and one that not every loss uses."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = torch.nn.Linear(6, 6), torch.nn.Linear(6, 3)
        self.frozen, self.rare = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor, rare: bool) -> torch.Tensor:
        x = self.first(torch.tanh(self.first(self.frozen(x))))
        return self.head(self.rare(x) if rare else x).square().mean()


def models(dtype=torch.float32) -> tuple[Tied, Tied]:
    torch.manual_seed(0)
    model = Tied().to(dtype)
    return model, copy.deepcopy(model)


def case_of(rule) -> dict:
    return {**rule.usual, "max_norm": None, "normalize_grads": False}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@EVERY_RULE
def test_the_bits_of_a_plain_step(rule, dtype):
    """A scheduler changes lr meanwhile; every gradient is gone after backward()."""
    model, twin = models(dtype)
    ours, plain = (rule.ours(m.parameters(), **case_of(rule)) for m in (model, twin))
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (ours, plain)]
    step_in_backward(ours)
    for t in range(5):
        x = torch.randn(4, 6, dtype=dtype)
        model(x, t % 2 == 1).backward()
        assert all(p.grad is None for p in model.parameters())
        twin(x, t % 2 == 1).backward()
        plain.step()
        plain.zero_grad()
        assert_same(snapshot(ours), snapshot(plain), f"after step {t}")
        for m in (model, twin):
            m.frozen.requires_grad_(t >= 2)
        for scheduler in schedulers:
            with (
                pytest.warns(UserWarning, match="before `optimizer.step")
                if t == 0 and scheduler is schedulers[0]
                else nothing()
            ):
                scheduler.step()


class nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


def test_each_gradient_is_freed_before_the_next_is_complete():
    model, _ = models()
    optimizer = onepass.optim.SGD(model.parameters(), lr=0.1)
    alive = []
    handle = step_in_backward(optimizer)
    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(
                lambda _: alive.append(sum(q.grad is not None for q in model.parameters()))
            )
    model(torch.randn(4, 6), True).backward()
    assert alive == [0] * 6
    handle.remove()
    model(torch.randn(4, 6), True).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_accumulation_is_exact():
    model, twin = models()
    ours, plain = (onepass.optim.AdamW(m.parameters(), lr=0.1) for m in (model, twin))
    handle = step_in_backward(ours)
    for _ in range(3):
        batches = torch.randn(3, 4, 6)
        with handle.accumulate():
            for x in batches[:-1]:
                (model(x, True) / 3).backward()
        (model(batches[-1], True) / 3).backward()
        for x in batches:
            (twin(x, True) / 3).backward()
        plain.step()
        plain.zero_grad()
        assert_same(snapshot(ours), snapshot(plain), "after an accumulated step")


def test_clipping_each_parameter():
    model, twin = models()
    ours, plain = (onepass.optim.AdamW(m.parameters(), lr=0.1, weight_decay=0.1) for m in (model, twin))
    step_in_backward(ours, max_norm_each=0.01)
    for _ in range(3):
        x = torch.randn(4, 6)
        model(x, True).backward()
        twin(x, True).backward()
        for p in twin.parameters():
            if p.grad is not None:
                torch.nn.utils.clip_grad_norm_([p], 0.01)
        plain.step()
        plain.zero_grad()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q)


@pytest.mark.parametrize("option", [torch.bfloat16, "8bit"], ids=str)
def test_with_smaller_states_and_a_checkpoint(option):
    model, twin = models()
    ours = onepass.optim.AdamW(model.parameters(), lr=0.1, state_dtype=option)
    step_in_backward(ours)
    model(torch.ones(4, 6), True).backward()
    twin.load_state_dict(model.state_dict())
    plain = onepass.optim.AdamW(twin.parameters(), lr=0.1, state_dtype=option)
    plain.load_state_dict(copy.deepcopy(ours.state_dict()))
    ours.load_state_dict(copy.deepcopy(ours.state_dict()))  # whose groups and states are new objects
    model(torch.ones(4, 6), True).backward()
    twin(torch.ones(4, 6), True).backward()
    plain.step()
    assert_same(snapshot(ours), snapshot(plain), "after a checkpoint")


@pytest.mark.filterwarnings("ignore:max_norm=0")
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_norm": 0.0}, "max_norm"),
        ({"normalize_grads": True}, "normalize_grads"),
        ({"fused_unscale": True}, "fused"),
    ],
)
def test_options_that_need_all_gradients(options, text):
    model, _ = models()
    with pytest.raises(ValueError, match=text):
        step_in_backward(onepass.optim.Adam(model.parameters(), **options))
    optimizer = onepass.optim.Adam(model.parameters())
    step_in_backward(optimizer)
    optimizer.param_groups[0].update(options)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=text):
        model(torch.randn(4, 6), True).backward()
    assert all(map(torch.equal, before, model.parameters()))


def test_other_optimizers():
    p = parameter(torch.ones(3))
    for wrong in (torch.optim.Adam([p]), onepass.optim.SAM([p], onepass.optim.SGD, lr=0.1), None):
        with pytest.raises(TypeError, match="that is no wrapper"):
            step_in_backward(wrong)
    with pytest.raises(ValueError, match="Invalid max_norm_each"):
        step_in_backward(onepass.optim.SGD([p], lr=0.1), max_norm_each=-1.0)


@needs_named_parameters
def test_errors_name_the_parameter():
    model, _ = models()
    step_in_backward(onepass.optim.Adam(model.named_parameters(), state_dtype="8bit"))
    model.double()
    with pytest.raises(ValueError, match=r"parameter '(head|rare|first)"):
        model(torch.randn(4, 6, dtype=torch.float64), True).backward()


def several_processes() -> None:
    p = parameter(torch.ones(3))
    with pytest.raises(RuntimeError, match="before gradients of several processes are averaged"):
        step_in_backward(onepass.optim.SGD([p], lr=0.1))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_several_processes():
    run(2, several_processes)


def test_the_groups_are_the_truth():
    """A parameter that is listed twice is updated twice, one that was removed keeps its gradient, one that was added is noticed."""
    model, twin = models()
    with pytest.warns(UserWarning, match="duplicate parameters"):
        ours, plain = (onepass.optim.SGD([m.head.weight, *m.parameters()], lr=0.1, momentum=0.9) for m in (model, twin))
    step_in_backward(ours)
    for _ in range(2):
        x = torch.randn(4, 6)
        model(x, True).backward()
        twin(x, True).backward()
        plain.step()
        plain.zero_grad()
        assert_same(snapshot(ours), snapshot(plain), "with a parameter that is listed twice")
    removed = ours.param_groups[0]["params"].pop()  # rare.bias
    before = removed.detach().clone()
    model(torch.randn(4, 6), True).backward()
    assert torch.equal(removed, before)
    assert removed.grad is not None
    assert model.head.weight.grad is None
    ours.add_param_group({"params": [removed, parameter(torch.ones(2))]})
    with pytest.raises(RuntimeError, match="parameters were added to the optimizer"):
        model(torch.randn(4, 6), True).backward()
