"""The part that all rules share (unscale, global norm, scale and sign, weight decay, in this order), and `Rule`."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations, product
from typing import ClassVar

import numpy as np
import onepass
import torch

Array = np.ndarray
Case = dict[str, object]

SHARED_DEFAULTS: Case = {
    "maximize": False,
    "max_norm": None,
    "normalize_grads": False,
    "fused_unscale": False,
}
# The values of the arguments that all rules have; each adds its own.
SHARED_OPTIONS: dict[str, tuple] = {
    "maximize": (False, True),
    "max_norm": (None, 0.5),
    "normalize_grads": (False, True),
    "fused_unscale": (False, True),
}
DECAY: dict[str, tuple] = {"weight_decay": (0.0, 0.1)}  # of every rule but Rprop


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

    params and grads are lists of float64 arrays. Parameters are written in place, gradients never; None stands for a missing
    gradient. `overrides[i]` replaces options for parameter i, as a param group does.
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
        """Whether decay scales the weights instead of adding to the gradient."""
        return False

    def update(self, w: Array, g: Array, state: dict[str, Array], o: Case) -> None:
        raise NotImplementedError


def every(options: dict[str, tuple], valid: Callable[[Case], bool] = lambda case: True) -> list[Case]:
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


@dataclass(frozen=True)
class Rule:
    """What the tests need to know of one optimizer: its reference, its counterparts by the same name, its cases."""

    reference: type[Reference]
    options: dict[str, tuple]  # every argument and the values worth testing
    usual: Case  # arguments under which every state of the rule exists
    only_ours: Case = field(default_factory=dict)  # arguments that torch lacks, with the values that change nothing
    valid: Callable[[Case], bool] = lambda case: True  # whether the constructor accepts the arguments together
    pairs_only: bool = False  # the full product is another rule's
    stand_in: type[torch.optim.Optimizer] | None = None  # in place of torch's, where torch has no such rule

    @property
    def name(self) -> str:
        return self.reference.__name__

    @property
    def ours(self) -> type[torch.optim.Optimizer]:
        return getattr(onepass.optim, self.name)

    @property
    def theirs(self) -> type[torch.optim.Optimizer]:
        return self.stand_in or getattr(torch.optim, self.name)

    @cached_property
    def product(self) -> list[Case]:
        """All combinations of the arguments' values; none where `pairs_only`."""
        return [] if self.pairs_only else every(self.options, self.valid)

    @cached_property
    def cases(self) -> list[Case]:
        """A short list with every pair of two arguments' values."""
        return pairwise(self.product or every(self.options, self.valid))

    @property
    def no_decay(self) -> Case:
        """weight_decay=0, explicitly, where the rule has it, and ASGD's other one."""
        return {name: 0.0 for name in ("weight_decay", "lambd") if name in self.options}

    def to_torch(self, case: Case) -> Case | None:
        """The arguments of the same form in torch.optim; None where torch has no such form.

        torch clips outside the step (the caller does, by `max_norm`), and its capturable is for accelerators only.
        """
        neutral = {**self.only_ours, "normalize_grads": False}
        if any(case.get(name, value) != value for name, value in neutral.items()):
            return None
        dropped = {*neutral, "max_norm", "fused_unscale", "capturable"}
        return {name: value for name, value in case.items() if name not in dropped}

    def torch_forms(self, cases: list[Case]) -> list[Case]:
        """The forms among the cases that torch has, once each, in torch's arguments."""
        forms = {str(form): form for case in cases if (form := self.to_torch(case)) is not None}
        return list(forms.values())
