"""ASGD (Polyak & Juditsky 1992), with torch's schedules of the step size and of the average."""

from typing import ClassVar

import numpy as np

from .common import DECAY, SHARED_OPTIONS, Array, Case, Reference, Rule


class ASGD(Reference):
    DEFAULTS: ClassVar[Case] = {
        "lr": 1e-2,
        "lambd": 1e-4,
        "alpha": 0.75,
        "t0": 1e6,
        "weight_decay": 0.0,
        "capturable": False,
    }

    def update(self, w: Array, g: Array, state: dict[str, Array], o: Case) -> None:
        # Both numbers are float32 whatever the parameter, in torch and here: their rounding is part of the definition.
        if not state:
            state.update(step=np.zeros(()), eta=np.float32(o["lr"]), mu=np.float32(1), ax=np.zeros_like(w))

        eta, mu = float(state["eta"]), float(state["mu"])
        w[...] = (1 - o["lambd"] * eta) * w - eta * g
        state["ax"] = state["ax"] + mu * (w - state["ax"])

        t = state["step"] = state["step"] + 1
        state["eta"] = np.float32(o["lr"] / (1 + o["lambd"] * o["lr"] * t) ** o["alpha"])
        state["mu"] = np.float32(1 / max(1, t - o["t0"]))


# Within twenty steps the average begins and the step size falls, by a half or by more.
OPTIONS = {
    "lr": (0.1,),
    "lambd": (0.5, 1e-4),
    "alpha": (0.75, 2.0),
    "t0": (5, 1e6),
    "capturable": (False, True),
    **DECAY,
    **SHARED_OPTIONS,
}

RULES = [Rule(ASGD, OPTIONS, usual={"lr": 0.1, "lambd": 0.5, "t0": 2, "weight_decay": 0.1})]
