"""Rprop: iRprop- (Igel & Huesken 2003) and Rprop- without weight backtracking (Riedmiller & Braun 1993)."""

from typing import ClassVar

import numpy as np

from .common import SHARED_OPTIONS, Array, Case, Reference, Rule


class Rprop(Reference):
    DEFAULTS: ClassVar[Case] = {
        "lr": 1e-2,
        "etas": (0.5, 1.2),
        "step_sizes": (1e-6, 50.0),
        "capturable": False,
        "variant": "irprop-",
    }

    def update(self, w: Array, g: Array, state: dict[str, Array], o: Case) -> None:
        (eta_minus, eta_plus), irprop = o["etas"], o["variant"] == "irprop-"
        if not state:
            state.update(step=np.zeros(()), prev=np.zeros_like(w), step_size=np.full_like(w, o["lr"]))

        first = state["step"] == 0
        state["step"] = state["step"] + 1
        agreement = np.nan_to_num(np.sign(g * state["prev"]), nan=0.0)
        shrinks = agreement < 0 if irprop or first else agreement <= 0
        factor = np.where(agreement > 0, eta_plus, np.where(shrinks, eta_minus, 1.0))
        delta = state["step_size"] = np.clip(state["step_size"] * factor, *o["step_sizes"])
        if irprop:
            g = np.where(agreement < 0, 0.0, g)
        w[...] = w - np.nan_to_num(np.sign(g), nan=0.0) * delta
        state["prev"] = g


# Limits of the step size that are reached within a few steps, from both sides.
OPTIONS = {
    "lr": (0.1,),
    "etas": ((0.5, 1.2), (0.6, 1.5)),
    "step_sizes": ((1e-6, 50.0), (0.05, 0.2)),
    "capturable": (False, True),
    "variant": ("irprop-", "rprop-"),
    **SHARED_OPTIONS,
}

RULES = [Rule(Rprop, OPTIONS, usual={"lr": 0.1}, only_ours={"variant": "irprop-"})]
