"""SGD: plain, with momentum in PyTorch's and in the lecture's form, with Nesterov's look-ahead."""

from typing import ClassVar

from .common import DECAY, SHARED_OPTIONS, Array, Case, Reference, Rule


class SGD(Reference):
    DEFAULTS: ClassVar[Case] = {
        "lr": 1e-3,
        "momentum": 0.0,
        "dampening": 0.0,
        "weight_decay": 0.0,
        "nesterov": False,
        "lr_in_velocity": False,
    }

    def update(self, w: Array, g: Array, state: dict[str, Array], o: Case) -> None:
        lr, mu, tau = o["lr"], o["momentum"], o["dampening"]
        if mu == 0:  # nothing is stored, dampening is ignored
            w[...] = w - lr * g
        elif o["lr_in_velocity"]:
            h = state["momentum_buffer"] = mu * state.get("momentum_buffer", 0.0) + lr * g
            w[...] = w - (mu * h + lr * g if o["nesterov"] else h)
        else:
            fresh = "momentum_buffer" not in state
            v = state["momentum_buffer"] = g.copy() if fresh else mu * state["momentum_buffer"] + (1.0 - tau) * g
            w[...] = w - lr * (g + mu * v if o["nesterov"] else v)


OPTIONS = {
    "lr": (0.1,),
    "momentum": (0.0, 0.9),
    "dampening": (0.0, 0.3),
    "nesterov": (False, True),
    "lr_in_velocity": (False, True),
    **DECAY,
    **SHARED_OPTIONS,
}


def valid(case: Case) -> bool:
    """What SGD's constructor accepts."""
    if case["nesterov"] and (case["momentum"] == 0 or case["dampening"] != 0):
        return False
    return case["dampening"] == 0 or not (case["lr_in_velocity"] or case["fused_unscale"])


RULES = [
    Rule(
        SGD,
        OPTIONS,
        usual={"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
        only_ours={"lr_in_velocity": False},
        valid=valid,
    )
]
