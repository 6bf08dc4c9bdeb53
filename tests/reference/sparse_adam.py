"""SparseAdam: Adam on the rows that a sparse gradient has, with eps before the correction (Kingma & Ba 2015, section 2)."""

from typing import ClassVar

import numpy as np

from .common import Array, Case, Reference


class SparseAdam(Reference):
    DEFAULTS: ClassVar[Case] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}

    def update(self, w: Array, g: Array, state: dict[str, Array], o: Case) -> None:
        b1, b2 = o["betas"]
        if not state:
            state.update(step=np.zeros(()), exp_avg=np.zeros_like(w), exp_avg_sq=np.zeros_like(w))

        t = state["step"] = state["step"] + 1
        m = state["exp_avg"] = b1 * state["exp_avg"] + (1 - b1) * g
        v = state["exp_avg_sq"] = b2 * state["exp_avg_sq"] + (1 - b2) * g**2
        step_size = o["lr"] * np.sqrt(1 - b2**t) / (1 - b1**t)
        w[...] = w - step_size * m / (np.sqrt(v) + o["eps"])
