"""Regression tests for faults found in review."""

import copy
import gc
import itertools
import math
import pickle
import threading
import time

import onepass
import pytest
import torch
from onepass import _compat, _native
from onepass.optim import SGD, Adam, AdamW, clip_grad_norm_
from rules import RULES
from support import assert_close, assert_same, snapshot
from torch.nn import Parameter


def with_grad(values: torch.Tensor, grad: torch.Tensor | None = None) -> Parameter:
    p = Parameter(values)
    p.grad = torch.ones_like(p) if grad is None else grad
    return p


@pytest.mark.parametrize("norm_type", [1.0, 3.0, math.inf])
def test_norms_of_complex_gradients_are_of_magnitudes(norm_type: float) -> None:
    ours, theirs = (with_grad(torch.zeros(2, dtype=torch.complex64), torch.tensor([3 + 4j, 1j])) for _ in range(2))
    expected = torch.nn.utils.clip_grad_norm_([theirs], 1.0, norm_type)
    assert_close(clip_grad_norm_([ours], 1.0, norm_type), expected, 1e-6, f"{norm_type}-norm")
    assert_close(ours.grad, theirs.grad, 1e-6, "clipped gradient")


@pytest.mark.parametrize("max_norm", [math.nan, -1.0, math.inf])
def test_odd_max_norms_of_clip_grad_norm(max_norm: float) -> None:
    """As in torch: a factor of max_norm / norm, whatever its value."""
    for grad in ([3.0, 4.0], [math.inf, 1.0]):
        ours, theirs = (with_grad(torch.zeros(2), torch.tensor(grad)) for _ in range(2))
        clip_grad_norm_([ours], max_norm)
        torch.nn.utils.clip_grad_norm_([theirs], max_norm)
        assert_close(ours.grad, theirs.grad, 1e-6, f"gradient {grad} clipped to {max_norm}")


def test_parameter_list_changed_by_another_thread() -> None:
    params = [with_grad(torch.ones(1 << 20)) for _ in range(6)]
    optimizer = SGD(params, lr=0.1)
    del params
    thread = threading.Thread(target=lambda: (time.sleep(0.0005), optimizer.param_groups[0]["params"].clear()))
    thread.start()
    for _ in range(20):
        optimizer.step()
    thread.join()


def test_parameter_list_changed_by_python_code_on_the_way() -> None:
    class Nasty(torch.Tensor):
        @property
        def grad(self):
            optimizer.param_groups[0]["params"].clear()
            gc.collect()
            return None

    params = [with_grad(torch.ones(3)) for _ in range(50)]
    optimizer = SGD([Parameter(torch.ones(3)), *params], lr=0.1)
    optimizer.param_groups[0]["params"][0] = torch.ones(3).as_subclass(Nasty)
    optimizer.step()
    assert_close(params[-1], torch.full((3,), 0.9), 1e-6, "the last parameter of the list as it was")


def test_state_whose_elements_share_memory() -> None:
    p, q = (with_grad(torch.ones(4)) for _ in range(2))
    optimizer = Adam([q, p], lr=0.1)
    optimizer.step()
    optimizer.state[p]["exp_avg"] = torch.ones(1).expand(4)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"parameter 1 of group 0.*'exp_avg'.*share memory"):
        optimizer.step()
    assert_same(snapshot(optimizer), before, "after the error")


@pytest.mark.parametrize("which", ["parameter", "gradient"])
def test_negated_view_of_one_element(which: str) -> None:
    def negated() -> torch.Tensor:
        return torch.tensor([1 + 2j]).conj().imag

    def stepped(cls: type) -> torch.Tensor:
        p = with_grad(negated()) if which == "parameter" else with_grad(torch.ones(1), negated())
        cls([p], lr=0.1).step()
        return p

    assert_close(stepped(SGD), stepped(torch.optim.SGD), 1e-6, f"negated {which}")


def test_negated_parameter_of_several_elements_is_refused() -> None:
    with pytest.raises(RuntimeError, match="parameter 0 of group 0 is a lazily negated view"):
        SGD([Parameter(torch._neg_view(torch.ones(3)))], lr=0.1)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize("cls", [SGD, Adam])
def test_strided_parameter_listed_twice(cls: type) -> None:
    torch.manual_seed(0)
    values = torch.randn(10)
    ours, theirs = (with_grad(values.clone()[::2]) for _ in range(2))
    first, second = (
        cls([ours, ours], lr=0.1),
        getattr(torch.optim, cls.__name__)([theirs, theirs], lr=0.1, foreach=False),
    )
    for _ in range(3):
        first.step()
        second.step()
    assert_close(ours, theirs, 1e-6, "updated twice in order")


@pytest.mark.parametrize("key", ["step", "exp_avg_sq"])
def test_incomplete_checkpoint(key: str) -> None:
    p = with_grad(torch.ones(3))
    optimizer = AdamW([p])
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    del state["state"][0][key]
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"parameter 0 of group 0.*needs"):
        optimizer.load_state_dict(state)
    assert_same(snapshot(optimizer), before, "after the error")


@pytest.mark.parametrize(("saved", "loading"), list(itertools.permutations(RULES, 2)))
def test_checkpoint_of_another_optimizer(saved: str, loading: str) -> None:
    if {saved, loading} == {"Adam", "AdamW"}:
        return  # the same state, as in torch
    p = with_grad(torch.ones(3))
    source, optimizer = (RULES[key].ours([p], **RULES[key].usual) for key in (saved, loading))
    source.step()
    optimizer.step()
    before, groups = snapshot(optimizer), copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(ValueError, match="another optimizer"):
        optimizer.load_state_dict(source.state_dict())
    assert_same(snapshot(optimizer), before, "after the error")
    assert optimizer.state_dict()["param_groups"] == groups, "the refused checkpoint left its options"


def test_change_of_memory_format_moves_the_state_once(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = torch.nn.Conv2d(4, 4, 3)
    optimizer = Adam(conv.parameters(), lr=0.1)
    conv.weight.grad = torch.randn_like(conv.weight)
    optimizer.step()
    conv.to(memory_format=torch.channels_last)
    conv.weight.grad = torch.randn_like(conv.weight)
    optimizer.step()
    state = optimizer.state[conv.weight]["exp_avg"]
    assert state.stride() == conv.weight.stride(), "the state has the parameter's strides from now on"
    monkeypatch.setattr(onepass.optim._staging, "STRICT", True)
    optimizer.step()
    assert optimizer.state[conv.weight]["exp_avg"] is state


def test_error_in_clipping_leaves_no_state() -> None:
    p = with_grad(torch.ones(2))
    optimizer = SGD([p], lr=0.1, momentum=0.9, dampening=0.5)
    optimizer.param_groups[0]["max_norm"] = torch.tensor([1.0, 2.0])
    with pytest.raises(ValueError, match="max_norm"):
        optimizer.step()
    assert not optimizer.state, f"no state expected, came {dict(optimizer.state)}"


@pytest.mark.parametrize("option", [{"max_norm": -1.0}, {"max_norm": math.nan}, {"differentiable": True}])
def test_options_changed_between_steps(option: dict) -> None:
    optimizer = Adam([with_grad(torch.ones(2))], lr=0.1)
    optimizer.param_groups[0].update(option)
    with pytest.raises((ValueError, RuntimeError), match=next(iter(option))):
        optimizer.step()


def test_normalizing_denormal_gradients_stays_finite() -> None:
    p = with_grad(torch.ones(2), torch.full((2,), 1e-44))
    SGD([p], lr=0.1, normalize_grads=True).step()
    assert torch.isfinite(p).all(), f"finite parameters expected, came {p}"


def test_checkpoint_does_not_undo_fused_unscale() -> None:
    p = with_grad(torch.ones(2))
    saved = Adam([p], lr=0.1, max_norm=2.0)
    saved.step()
    optimizer = Adam([p], lr=0.1, fused_unscale=True)
    optimizer.load_state_dict(saved.state_dict())
    assert optimizer.param_groups[0]["fused_unscale"]
    assert optimizer._step_supports_amp_scaling
    optimizer.add_param_group({"params": [with_grad(torch.ones(2))]})  # takes over the loaded max_norm
    assert optimizer.param_groups[1]["max_norm"] == 2.0


def test_pickle_of_an_older_version() -> None:
    optimizer = Adam([with_grad(torch.ones(2))], lr=0.1)
    optimizer.step()
    content = optimizer.__getstate__()
    for options in (content["defaults"], content["param_groups"][0]):
        del options["eps_inside_sqrt"]
    old = Adam.__new__(Adam)
    old.__setstate__(pickle.loads(pickle.dumps(content)))
    old.step()
    assert old.param_groups[0]["eps_inside_sqrt"] is False


def test_collector_is_as_it_was_after_an_error() -> None:
    p = Parameter(torch.ones(2))
    p.grad = torch.ones(2).to_sparse()
    with pytest.raises(RuntimeError):
        Adam([p], lr=0.1).step()
    assert gc.isenabled()


def test_reader_by_attributes_in_several_threads() -> None:
    _native._C.set_reader(None, _compat.describe)
    try:
        optimizers = [Adam([with_grad(torch.ones(n, 2, 3)) for n in range(1, 30)], lr=0.1) for _ in range(4)]
        threads = [threading.Thread(target=lambda o=o: [o.step() for _ in range(20)]) for o in optimizers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        _native._C.set_reader(_compat.exchange_api(), _compat.describe)
    for optimizer in optimizers[1:]:
        assert_same(snapshot(optimizer), snapshot(optimizers[0]), "the same steps in every thread")


def test_step_of_none() -> None:
    p = with_grad(torch.ones(2))
    optimizer = Adam([p], lr=0.1)
    optimizer.step()
    optimizer.state[p]["step"] = None
    optimizer.step()
    assert float(optimizer.state[p]["step"]) == 1, "the count starts again"
