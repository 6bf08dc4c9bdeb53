"""Lookahead (Zhang et al. 2019, alg. 1), and the step along the parabola of alpha="quadratic"."""

from collections.abc import Callable

import numpy as np

from .common import Array, Reference

Evaluate = Callable[[list[Array]], tuple[float, list[Array | None]]]


class Lookahead:
    """Around a reference of a rule. evaluate(params), for the quadratic form, gives loss and gradients there."""

    def __init__(self, inner: Reference, k: int = 5, alpha: float | str = 0.5) -> None:
        self.inner, self.k, self.alpha = inner, k, alpha
        self.slow: dict[int, Array] = {}
        self.steps = 0

    def step(self, params: list[Array], grads: list[Array | None], evaluate: Evaluate | None = None) -> None:
        self.begin(params)
        self.inner.step(params, grads)
        self.finish(params, evaluate)

    def begin(self, params: list[Array]) -> None:
        for i, w in enumerate(params):
            self.slow.setdefault(i, w.copy())

    def finish(self, params: list[Array], evaluate: Evaluate | None = None) -> None:
        self.steps += 1
        if self.steps % self.k == 0:
            alpha = self.quadratic(params, evaluate) if self.alpha == "quadratic" else self.alpha
            for i, w in enumerate(params):
                self.slow[i] = self.slow[i] + alpha * (w - self.slow[i])
                w[...] = self.slow[i]

    def quadratic(self, params: list[Array], evaluate: Evaluate) -> float:
        last, grads = evaluate(params)
        first, _ = evaluate([self.slow[i] for i in range(len(params))])
        slope = sum(np.sum(g * (w - self.slow[i])) for i, (w, g) in enumerate(zip(params, grads, strict=True)))
        return minimum(first, last, float(slope))


def minimum(first: float, last: float, slope: float) -> float:
    """Where in [0, 1] q(x) = a·x² + b·x + c is smallest, with q(0) = first, q(1) = last, q'(1) = slope."""
    a, b = slope - (last - first), 2 * (last - first) - slope
    if not np.isfinite([first, last, slope]).all():
        return 0.5
    if a > 0:
        return float(np.clip(-b / (2 * a), 0, 1))
    return 1.0 if last <= first else 0.5
