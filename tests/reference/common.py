"""What every optimizer shares, in this order: unscale, global norm, scale and sign, weight decay, then the rule."""

from collections.abc import Callable, Iterable
from itertools import combinations, product
from typing import ClassVar

import numpy as np

Array = np.ndarray
Case = dict[str, object]

SHARED_DEFAULTS: ClassVar[Case] = {
    "maximize": False,
    "max_norm": None,
    "normalize_grads": False,
    "fused_unscale": False,
}
# The values of the arguments that every rule has; a rule adds its own.
SHARED_OPTIONS: dict[str, tuple] = {
    "maximize": (False, True),
    "max_norm": (None, 0.5),
    "normalize_grads": (False, True),
    "fused_unscale": (False, True),
}
DECAY: dict[str, tuple] = {"weight_decay": (0.0, 0.1)}  # every rule's but Rprop's


def total_norm(grads: Iterable[Array | None]) -> float:
    """N: the Euclidean norm of all gradients together."""
    return float(np.sqrt(sum(np.sum(np.square(g)) for g in grads if g is not None)))


def norm_scale(norm: float, max_norm: float | None, normalize_grads: bool) -> float:
    """s: the factor on every gradient. A NaN norm gives NaN."""
    if max_norm is not None:
        return float(np.minimum(1.0, max_norm / (norm + 1e-6)))
    if normalize_grads:
        return 0.0 if norm == 0 else 1.0 / norm
    return 1.0


class Reference:
    """A rule derives from this class and fills in DEFAULTS and `update`.

    params and grads are lists of float64 arrays; the parameters are written in place, the gradients never; None stands
    for a gradient that is not there. `overrides[i]` replaces options for parameter i, as a param group does.
    """

    DEFAULTS: ClassVar[Case] = {}

    def __init__(self, overrides: dict[int, Case] | None = None, **options: object) -> None:
        unknown = options.keys() - self.DEFAULTS.keys() - SHARED_DEFAULTS.keys()
        assert not unknown, f"{type(self).__name__} has no options {sorted(unknown)}"
        self.options = {**SHARED_DEFAULTS, **self.DEFAULTS, **options}
        self.overrides = overrides or {}
        self.state: dict[int, dict[str, Array]] = {}
        self.grad_norm: float | None = None

    def step(
        self, params: list[Array], grads: list[Array | None], *, grad_scale: float = 1.0, found_inf: bool = False
    ) -> None:
        if found_inf:
            return
        with np.errstate(all="ignore"):
            grads = [None if g is None else g / grad_scale for g in grads]
            max_norm, normalize = self.options["max_norm"], self.options["normalize_grads"]
            scale = 1.0
            if max_norm is not None or normalize:
                self.grad_norm = total_norm(grads)
                scale = norm_scale(self.grad_norm, max_norm, normalize)
            for i, (w, g) in enumerate(zip(params, grads, strict=True)):
                if g is None:
                    continue
                o = {**self.options, **self.overrides.get(i, {})}
                g = g * (-scale if o["maximize"] else scale)
                if o.get("weight_decay", 0) != 0:
                    if self.decoupled(o):
                        w[...] = w * (1.0 - o["lr"] * o["weight_decay"])
                    else:
                        g = g + o["weight_decay"] * w
                self.update(w, g, self.state.setdefault(i, {}), o)

    def decoupled(self, o: Case) -> bool:
        """Whether the decay is taken from the weights and not added to the gradient."""
        return False

    def update(self, w: Array, g: Array, state: dict[str, Array], o: Case) -> None:
        raise NotImplementedError


def every(options: dict[str, tuple], valid: Callable[[Case], bool]) -> list[Case]:
    """The full product of the options, without what the constructor refuses."""
    cases = [dict(zip(options, values, strict=True)) for values in product(*options.values())]
    return [case for case in cases if not (case.get("max_norm") and case.get("normalize_grads")) and valid(case)]


def pairs_of(case: Case) -> set[tuple]:
    return set(combinations(case.items(), 2))


def pairwise(cases: list[Case]) -> list[Case]:
    """A short list in which every pair of two arguments' values that occurs in `cases` occurs at least once."""
    pairs = [pairs_of(case) for case in cases]
    missing = set().union(*pairs)
    chosen = []
    while missing:
        best = max(range(len(cases)), key=lambda i: len(pairs[i] & missing))
        chosen.append(cases[best])
        missing -= pairs[best]
    return chosen


def name(case: Case, options: dict[str, tuple]) -> str:
    """A readable test id: the arguments that differ from the first value listed."""
    parts = (f"{key}={value}" for key, value in case.items() if value != options[key][0])
    return ",".join(parts).replace(" ", "") or "plain"
