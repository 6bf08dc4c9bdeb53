"""A parameter listed twice, and two parameters that share memory, are updated one after the other, as in torch's loop."""

import pytest
import torch
from rules import RULES
from support import assert_close, parameter

pytestmark = pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")


def cases():
    """Every case of a rule that torch also has. Its loop accepts capturable on CUDA only."""
    dampened = {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}
    for name, rule in RULES.items():
        for number, case in enumerate((rule.usual, *rule.cases, *([dampened] if name == "SGD" else []))):
            clips = case.get("max_norm") is not None or case.get("normalize_grads") or case.get("fused_unscale")
            if rule.to_torch(case) is not None and not clips and not case.get("capturable"):
                yield pytest.param(rule, case, id=f"{name}-{number}")


CASES = list(cases())


def compare(rule, case, ours: list, theirs: list, grads: list, steps: int = 4) -> None:
    """Step both with the same gradients and compare parameters and states after every step."""
    optimizer = rule.ours(ours, **case)
    other = rule.theirs(theirs, foreach=False, **rule.to_torch(case))
    for t in range(steps):
        for p, q, shape in zip(ours, theirs, grads, strict=True):
            if t >= shape[0]:
                p.grad = torch.randn(
                    shape[1], dtype=p.dtype, generator=torch.Generator().manual_seed(10 * t + shape[0])
                )
                q.grad = p.grad.clone()
        optimizer.step()
        other.step()
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            tolerance = 1e-5 if p.dtype == torch.float32 else 1e-12
            assert_close(p, q, tolerance, f"parameter {i} after step {t + 1}")
            assert p.grad is None or not other.state[q] or optimizer.state[p]
            for name, state in optimizer.state[p].items():
                expected = torch.as_tensor(other.state[q][name])
                assert_close(state, expected, tolerance, f"{name} of parameter {i} after step {t + 1}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("rule", "case"), CASES)
def test_listed_twice(rule, case, dtype):
    """Also with other parameters before, between and after, and with one that joins at the third step."""
    values = [torch.randn(n, dtype=dtype) for n in (5, 3, 4)]
    lists = []
    for _ in range(2):
        a, b, late = (parameter(v.clone()) for v in values)
        lists.append([b, a, late, a, late])
    compare(rule, case, *lists, [(0, 3), (0, 5), (2, 4), (0, 5), (2, 4)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("rule", "case"), CASES)
def test_two_parameters_over_one_memory(rule, case, dtype):
    """Each has its own states, which start with its first gradient; here the second one's comes one step later."""
    values = torch.randn(5, dtype=dtype)
    lists = []
    for _ in range(2):
        memory = values.clone()
        lists.append([parameter(memory), parameter(torch.ones(2, dtype=dtype)), parameter(memory)])
    compare(rule, case, *lists, [(0, 5), (0, 2), (0, 5)])
    lists = []
    for _ in range(2):
        memory = values.clone()
        lists.append([parameter(memory), parameter(torch.ones(2, dtype=dtype)), parameter(memory)])
    compare(rule, case, *lists, [(0, 5), (0, 2), (1, 5)])


@pytest.mark.parametrize(("rule", "case"), CASES)
def test_listed_twice_with_strides(rule, case):
    """Both updates share one temporary copy."""
    values = torch.randn(10)
    lists = []
    for _ in range(2):
        p = parameter(values.clone()[::2])
        lists.append([p, p])
    compare(rule, case, *lists, [(0, 5), (0, 5)])


def test_torch_warns_and_so_do_we():
    p = parameter(torch.ones(3))
    for cls in (torch.optim.SGD, RULES["SGD"].ours):
        with pytest.warns(UserWarning, match="duplicate parameters"):
            cls([p, p], lr=0.1)
