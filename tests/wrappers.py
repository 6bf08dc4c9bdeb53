"""Lookahead and SAM stepped beside their references, over our optimizers and torch's."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import onepass
import torch
from reference import adam, lookahead, sam, sgd
from reference.common import Case, Reference
from support import ARITHMETIC, HALF, arithmetic_dtype, assert_close, bits, rounding, to_numpy

Gradients = Iterable[torch.Tensor | None]


@dataclass(frozen=True)
class Base:
    """An optimizer to wrap, and the reference of its rule."""

    optimizer: Callable[..., torch.optim.Optimizer]
    reference: Callable[..., Reference]
    case: Case = field(default_factory=dict)


_sgd, _adam = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}, {"lr": 0.1, "eps": 1e-4, "amsgrad": True}
OURS = {"SGD": Base(onepass.optim.SGD, sgd.SGD, _sgd), "Adam": Base(onepass.optim.Adam, adam.Adam, _adam)}
THEIRS = {"torch SGD": Base(torch.optim.SGD, sgd.SGD, _sgd), "torch Adam": Base(torch.optim.Adam, adam.Adam, _adam)}
BASES = {**OURS, **THEIRS}


def exact(base: Base, dtype: torch.dtype) -> bool:
    """torch keeps 16-bit states for 16-bit parameters: the references describe ours."""
    return base in OURS.values() or dtype not in HALF


class Beside:
    """What both share: parameters, their float64 twins, and the comparison after every step.

    As in rules.BesideReference, a 16-bit parameter must be the reference's result rounded, and both continue from it.
    """

    def __init__(self, params: list[torch.nn.Parameter]) -> None:
        self.params, self.expected = params, [to_numpy(p) for p in params]
        self.steps = 0

    def set_grads(self, grads: Gradients) -> list[np.ndarray | None]:
        grads = list(grads)
        for p, g in zip(self.params, grads, strict=True):
            p.grad = g
        return [None if g is None else to_numpy(g) for g in grads]

    def compare(self, what: str, kept: Callable[[torch.Tensor], torch.Tensor | None], expected: Iterable) -> None:
        for i, (p, w, slow) in enumerate(zip(self.params, self.expected, expected, strict=True)):
            tolerance = ARITHMETIC[arithmetic_dtype(p.dtype)]
            assert_close(p, w, tolerance, f"parameter {i} {what}", rounding(p.dtype))
            w[...] = to_numpy(p)
            if slow is not None:
                came = kept(p)
                wanted = p.dtype if p.is_complex() else arithmetic_dtype(p.dtype)
                assert came.dtype == wanted, f"the state of parameter {i} should be {wanted}, is {came.dtype}"
                assert_close(came, slow, tolerance, f"slow weights of parameter {i} {what}")


class BesideLookahead(Beside):
    def __init__(self, base: Base, params: list[torch.nn.Parameter], k: int = 3, alpha: float = 0.25) -> None:
        super().__init__(params)
        self.optimizer = onepass.optim.Lookahead(base.optimizer(params, **base.case), k, alpha)
        self.reference = lookahead.Lookahead(base.reference(**base.case), k, alpha)

    def step(self, grads: Gradients) -> None:
        """The wrapped optimizer's result is compared too, and the reference continues from the stored (rounded) values."""
        self.steps += 1
        self.reference.begin(self.expected)
        self.reference.inner.step(self.expected, self.set_grads(grads))
        handle = self.optimizer.base_optimizer.register_step_post_hook(
            lambda *_: self.compare(f"inside step {self.steps}", lambda p: None, [None] * len(self.params))
        )
        self.optimizer.step()
        handle.remove()
        self.reference.finish(self.expected)
        slow = [self.reference.slow[i] for i in range(len(self.params))]
        self.compare(f"after step {self.steps}", lambda p: self.optimizer.state[p]["slow_param"], slow)


class BesideSAM(Beside):
    """Takes the second gradients as well: the perturbed weights are compared when the closure asks for them."""

    def __init__(self, base: Base, params: list[torch.nn.Parameter], groups: list[dict] | None = None, **case) -> None:
        super().__init__(params)
        self.optimizer = onepass.optim.SAM(groups or params, base.optimizer, **case, **base.case)
        rhos = {}
        for group in groups or []:
            for p in group["params"]:
                rhos[next(i for i, q in enumerate(params) if q is p)] = group.get("rho", case.get("rho", 0.05))
        self.reference = sam.SAM(base.reference(**base.case), rhos=rhos, **case)

    def step(self, grads: Gradients, second: Gradients) -> None:
        self.steps += 1
        before = [bits(p) for p in self.params]
        grads, second = list(grads), list(second)
        self.set_grads(grads)
        self.optimizer.first_step(zero_grad=True)
        self.compare_perturbed([None if g is None else to_numpy(g) for g in grads])
        there = self.set_grads(second)
        self.reference.inner.step(self.expected, there)
        at_base = []
        handle = self.optimizer.base_optimizer.register_step_pre_hook(
            lambda *_: at_base.extend(bits(p) for p in self.params)
        )
        self.optimizer.second_step()
        handle.remove()
        assert at_base == before, f"step {self.steps}: the base optimizer did not find the weights bit for bit"
        self.compare(f"after step {self.steps}", lambda p: None, [None] * len(self.params))

    def compare_perturbed(self, grads: list[np.ndarray | None]) -> None:
        for i, (p, w) in enumerate(zip(self.params, self.reference.perturbed(self.expected, grads), strict=True)):
            tolerance = ARITHMETIC[arithmetic_dtype(p.dtype)]
            assert_close(p, w, tolerance, f"perturbed parameter {i} in step {self.steps}", rounding(p.dtype))


class Bowl:
    """A loss with an analytic gradient, in torch and in NumPy: ½(w - t)² + 0.3·cos 2w, summed; not convex."""

    def __init__(self, params: list[torch.nn.Parameter]) -> None:
        self.params = params
        self.targets = [torch.linspace(-2, 2, p.numel(), dtype=torch.float64).reshape(p.shape) for p in params]

    def loss(self) -> torch.Tensor:
        losses = []
        for p, t in zip(self.params, self.targets, strict=True):
            losses.append((0.5 * (p - t.to(p)).square() + 0.3 * torch.cos(2 * p)).sum())
        return torch.stack(losses).sum()

    def evaluate(self, params: list[np.ndarray]) -> tuple[float, list[np.ndarray | None]]:
        ways = [w - t.numpy() for w, t in zip(params, self.targets, strict=True)]
        loss = sum(np.sum(0.5 * d**2 + 0.3 * np.cos(2 * w)) for d, w in zip(ways, params, strict=True))
        return float(loss), [d - 0.6 * np.sin(2 * w) for d, w in zip(ways, params, strict=True)]
