"""RMSprop (Tieleman & Hinton 2012), centered (Graves 2013), with momentum."""

from typing import ClassVar

import numpy as np

from .common import DECAY, SHARED_OPTIONS, Array, Case, Reference, Rule


class RMSprop(Reference):
    DEFAULTS: ClassVar[Case] = {
        "lr": 1e-2,
        "alpha": 0.99,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "momentum": 0.0,
        "centered": False,
        "capturable": False,
        "eps_inside_sqrt": False,
    }

    def update(self, w: Array, g: Array, state: dict[str, Array], o: Case) -> None:
        alpha, mu, eps = o["alpha"], o["momentum"], o["eps"]
        if not state:
            state.update(step=np.zeros(()), square_avg=np.zeros_like(w))
            if mu > 0:
                state["momentum_buffer"] = np.zeros_like(w)
            if o["centered"]:
                state["grad_avg"] = np.zeros_like(w)

        state["step"] = state["step"] + 1
        variance = state["square_avg"] = alpha * state["square_avg"] + (1 - alpha) * g**2
        if o["centered"]:
            mean = state["grad_avg"] = alpha * state["grad_avg"] + (1 - alpha) * g
            variance = np.maximum(variance - mean**2, 0)  # a rounding below 0 is 0; NaN stays
        d = np.sqrt(variance + eps) if o["eps_inside_sqrt"] else np.sqrt(variance) + eps
        if mu > 0:
            b = state["momentum_buffer"] = mu * state["momentum_buffer"] + g / d
            w[...] = w - o["lr"] * b
        else:
            w[...] = w - o["lr"] * g / d


# alpha near 1: in twenty steps G - a^2 does not cancel so far that float32 keeps no digits of it.
OPTIONS = {
    "lr": (0.1,),
    "alpha": (0.99, 0.9),
    "eps": (1e-2, 0.5),
    "momentum": (0.0, 0.9),
    "centered": (False, True),
    "capturable": (False, True),
    "eps_inside_sqrt": (False, True),
    **DECAY,
    **SHARED_OPTIONS,
}

RULES = [
    Rule(
        RMSprop,
        OPTIONS,
        usual={"lr": 0.1, "eps": 2e-2, "momentum": 0.9, "centered": True, "weight_decay": 0.1},
        only_ours={"eps_inside_sqrt": False},
    )
]
