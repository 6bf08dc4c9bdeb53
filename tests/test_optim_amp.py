"""Gradient scaling gives the same numbers inside the step (fused_unscale) and around it."""

import copy
import inspect
import math

import pytest
import torch
from rules import RULES, BesideReference, BesideTorch, loss_of
from support import assert_same, parameter, snapshot

EVERY_RULE = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
FUSED = pytest.mark.parametrize("fused_unscale", [True, False], ids=["fused", "around"])
TOLERANCE = 2e-5  # training in float32 amplifies differences


class Scaled(BesideTorch):
    """Both sides trained, each with its own GradScaler; some batches are infinite."""

    def __init__(self, rule, device, **ours) -> None:
        super().__init__(rule, {**rule.usual, "lr": 0.01}, torch.float32, device)
        self.ours = rule.ours(self.model.parameters(), **self.case, **ours)
        self.max_norm = ours.get("max_norm")
        self.scalers = [torch.amp.GradScaler(device.type, init_scale=2.0**12, growth_interval=3) for _ in range(2)]

    def train_scaled(self, bad: bool, unscale_first: bool = False) -> None:
        x = self.batch()
        if bad:
            x[0, 0] = math.inf
        pairs = ((self.model, self.ours), (self.twin, self.theirs))
        for scaler, (model, optimizer) in zip(self.scalers, pairs, strict=True):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, x)).backward()
            if unscale_first:
                scaler.unscale_(optimizer)
            if optimizer is self.theirs and self.max_norm is not None:
                if not unscale_first:
                    scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), self.max_norm)
            scaler.step(optimizer)
            scaler.update()
        self.steps += 1
        self.compare(TOLERANCE)
        scales = [scaler.get_scale() for scaler in self.scalers]
        assert scales[0] == scales[1], f"the scales are {scales}"


@pytest.mark.parametrize("unscale_first", [False, True], ids=["", "unscaled before"])
@pytest.mark.parametrize("max_norm", [None, 0.05])
@FUSED
@EVERY_RULE
def test_training_with_a_scaler(rule, fused_unscale, max_norm, unscale_first, device):
    """As in torch, with infinite batches: at the start, one, and two in a row."""
    both = Scaled(rule, device, fused_unscale=fused_unscale, max_norm=max_norm)
    for bad in (True, False, False, True, True, False, False, False, False):
        both.train_scaled(bad, unscale_first)
    for p, twin in zip(both.model.parameters(), both.twin.parameters(), strict=True):
        ours, theirs = both.ours.state[p], both.theirs.state[twin]
        if "step" in theirs:
            assert ours["step"].item() == theirs["step"].item() == 6, f"6 steps expected, {ours['step']} came"


@EVERY_RULE
def test_skipped_step_changes_nothing(rule, device):
    """found_inf: parameters, states, counts and gradients stay bit for bit."""
    both = Scaled(rule, device, fused_unscale=True)
    both.train_scaled(bad=False)
    before = snapshot(both.ours)
    both.train_scaled(bad=True)
    assert_same(snapshot(both.ours), before, "after a skipped step")


@pytest.mark.parametrize("form", [{}, {"lr_in_velocity": True}, {"nesterov": True}], ids=str)
def test_sgd_skipped_before_its_first_step(form, device):
    """No partly initialised buffer is left: the first real step starts from v = g."""
    rule = RULES["SGD"]
    p = parameter(torch.randn(9, device=device))
    case = {**rule.usual, **form, "fused_unscale": True}
    both = BesideReference(rule, case, [p])
    both.optimizer.grad_scale = torch.tensor(4.0, device=device)
    both.optimizer.found_inf = torch.tensor(1.0, device=device)
    p.grad = torch.full((9,), math.inf, device=device)
    before = p.detach().clone()
    both.optimizer.step()
    assert torch.equal(p, before), "a skipped step wrote the parameter"
    for _ in range(3):
        both.step([torch.randn(9, device=device)], grad_scale=4.0)


@pytest.mark.parametrize("scale", [1.0, 65536.0, 3.0, 0.25])
@EVERY_RULE
def test_unscaling_inside_is_division_first(rule, scale, dtype, device):
    """u = g / grad_scale comes before norm, decay and rule."""
    params = [parameter(torch.randn(20, device=device).to(dtype))]
    both = BesideReference(rule, {**rule.usual, "fused_unscale": True, "max_norm": 0.5}, params)
    for _ in range(3):
        both.step([torch.randn(20, device=device).to(dtype)], grad_scale=scale)


@EVERY_RULE
def test_attributes_that_a_scaler_leaves(rule, device):
    """found_inf without grad_scale, and neither of them, as outside a scaler."""
    params = [parameter(torch.randn(20, device=device))]
    both = BesideReference(rule, {**rule.usual, "fused_unscale": True}, params)
    both.step([torch.randn(20, device=device)])
    both.optimizer.grad_scale = None
    both.optimizer.found_inf = torch.tensor(0.0, device=device)
    both.step([torch.randn(20, device=device)])
    before = snapshot(both.optimizer)
    both.optimizer.found_inf = torch.tensor(1.0, device=device)
    both.optimizer.step()
    assert_same(snapshot(both.optimizer), before, "found_inf without a grad_scale")
    both.optimizer.found_inf = None
    both.step([torch.randn(20, device=device)])


@EVERY_RULE
def test_amp_scaling_is_opt_in(rule):
    """GradScaler unscales by itself unless fused_unscale is set; the hint fused=True does not change that."""
    p = [parameter(torch.zeros(3))]
    hints = [{"fused": True}] if "fused" in inspect.signature(rule.ours).parameters else []
    for kwargs in ({}, *hints, {"fused_unscale": False}):
        optimizer = rule.ours(p, **kwargs)
        assert not getattr(optimizer, "_step_supports_amp_scaling", False), f"set by {kwargs}"
    optimizer = rule.ours(p, fused_unscale=True)
    assert optimizer._step_supports_amp_scaling is True
    assert copy.deepcopy(optimizer)._step_supports_amp_scaling is True, "lost by deepcopy"


@FUSED
def test_disabled_scaler(fused_unscale):
    both = BesideTorch(RULES["Adam"])
    both.ours = RULES["Adam"].ours(both.model.parameters(), **both.case, fused_unscale=fused_unscale)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    plain = both.ours.step
    both.ours.step = lambda: plain()
    x = both.batch()
    for model, optimizer in ((both.model, both.ours), (both.twin, both.theirs)):
        scaler.scale(loss_of(model, x)).backward()
        scaler.step(optimizer)
        scaler.update()
    both.compare()


def test_autocast_training(device):
    """bfloat16 autocast gives float32 gradients, so nothing special happens."""
    both = BesideTorch(RULES["AdamW"], {"lr": 0.01}, torch.float32, device)
    for _ in range(3):
        x = both.batch()
        for model, optimizer in ((both.model, both.ours), (both.twin, both.theirs)):
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
    both.compare(1e-3)
