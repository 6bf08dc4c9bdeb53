"""An optimizer stepped beside its reference, or beside torch's, and compared after every step."""

import copy
from collections.abc import Callable, Iterable

import torch
from reference import RULES
from reference.common import Case, Rule
from support import ARITHMETIC, arithmetic_dtype, assert_close, rounding, to_numpy

__all__ = ["RULES", "BesideReference", "BesideTorch", "Rule", "loss_of"]


class BesideReference:
    """An optimizer and its float64 reference, stepped together and compared after every step, or every few.

    A 16-bit parameter must be the reference's result rounded to its dtype. After each comparison the reference continues from
    the stored parameters, so that a tie rounded the other way, or a rounding that weight decay feeds back, is no error.
    """

    def __init__(self, rule: Rule, case: Case, params: list[torch.nn.Parameter], every: int = 1) -> None:
        self.params = params
        self.optimizer = rule.ours(params, **case)
        self.reference = rule.reference(**case)
        self.expected = [to_numpy(p) for p in params]
        self.case, self.every = case, every
        self.steps = 0

    def step(self, grads: Iterable[torch.Tensor | None], grad_scale: float | None = None) -> None:
        self.steps += 1
        grads = list(grads)
        for p, g in zip(self.params, grads, strict=True):
            p.grad = g
        if grad_scale is not None:
            self.optimizer.grad_scale = torch.tensor(grad_scale, device=self.params[0].device)
            self.optimizer.found_inf = torch.tensor(0.0, device=self.params[0].device)
        self.optimizer.step()
        self.reference.step(
            self.expected, [None if g is None else to_numpy(g) for g in grads], grad_scale=grad_scale or 1.0
        )
        if self.steps % self.every == 0:
            self.compare()

    def compare(self) -> None:
        where = f"after step {self.steps} with {self.case}"
        for i, (p, expected) in enumerate(zip(self.params, self.expected, strict=True)):
            dtype = arithmetic_dtype(p.dtype)
            tolerance = ARITHMETIC[dtype]
            assert_close(p, expected, tolerance, f"parameter {i} {where}", rounding(p.dtype))
            expected[...] = to_numpy(p)
            came, states = self.optimizer.state.get(p, {}), self.reference.state.get(i, {})
            assert came.keys() == states.keys(), (
                f"state of parameter {i} {where}: {list(states)} expected, {list(came)} came"
            )
            for key, value in states.items():
                assert_close(came[key], value, tolerance, f"{key} of parameter {i} {where}")
                right = torch.float32 if key in self.optimizer.scalar_states else p.dtype if p.is_complex() else dtype
                assert came[key].dtype == right, f"{key} of parameter {i} should be {right}, is {came[key].dtype}"
        self.compare_norm(where)

    def compare_norm(self, where: str) -> None:
        norm, expected = self.optimizer.grad_norm, self.reference.grad_norm
        if expected is None:
            assert norm is None, f"grad_norm {where}: expected None, came {norm}"
        else:
            assert isinstance(norm, torch.Tensor), f"grad_norm {where}: a tensor expected, came {norm!r}"
            assert norm.shape == (), f"grad_norm {where}: 0-d expected, came {norm!r}"
            assert_close(norm, expected, ARITHMETIC[norm.dtype], f"grad_norm {where}")


class BesideTorch:
    """A small model trained by our optimizer, and its copy trained by torch's on the same data; compared every step."""

    def __init__(self, rule: Rule, case: Case | None = None, dtype: torch.dtype = torch.float64, device="cpu") -> None:
        self.rule, self.case = rule, case or rule.usual
        layers = [torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)]
        self.model = torch.nn.Sequential(*layers).to(device, dtype)
        self.twin = copy.deepcopy(self.model)
        self.ours = rule.ours(self.model.parameters(), **self.case)
        self.theirs = rule.theirs(self.twin.parameters(), **self.case)
        self.steps = 0

    def batch(self) -> torch.Tensor:
        p = next(self.model.parameters())
        return torch.randn(5, 6, device=p.device, dtype=p.dtype)

    def train(self, steps: int, after_step: Callable[[], None] = lambda: None) -> None:
        for _ in range(steps):
            x = self.batch()
            for model, optimizer in ((self.model, self.ours), (self.twin, self.theirs)):
                optimizer.zero_grad()
                loss_of(model, x).backward()
                optimizer.step()
            after_step()
            self.steps += 1
            self.compare()

    def compare(self, tolerance: float | None = None) -> None:
        for (name, p), twin in zip(self.model.named_parameters(), self.twin.parameters(), strict=True):
            # Training feeds differences back, hence ten times the tolerance of one step.
            allowed = tolerance or 10 * ARITHMETIC[arithmetic_dtype(p.dtype)]
            assert_close(p, twin, allowed, f"{name} after {self.steps} steps", rounding(p.dtype))


def loss_of(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (model(x) - x[:, :3].sin()).square().mean()
