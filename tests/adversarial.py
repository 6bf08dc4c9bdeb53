"""The worker of test_boundary.py: every public function on every kind of tensor; each cell is reported as a line of JSON.

    python adversarial.py layer_norm

A cell has to be right (equal to the same call on an ordinary copy of the tensor) or a clear error.
"""

import json
import sys
import warnings
from collections.abc import Callable

import onepass
import torch
from onepass.nn import functional as OF
from rules import RULES

warnings.simplefilter("ignore")
Tensors = dict[str, torch.Tensor]
CLEAR = (TypeError, ValueError, RuntimeError, NotImplementedError)
# Errors of torch itself, of other types: real tensors beside fake ones, too few dimensions, a nested weight of rms_norm.
TORCHS = ("convert all Tensors to FakeTensors", "at least [N, C] is expected", "no attribute '_ragged_idx'")


# ---- tensors ---------------------------------------------------------------------------------------------------------


class Plain(torch.Tensor):
    pass


def misaligned(t: torch.Tensor) -> torch.Tensor:
    return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)


def overlapping(t: torch.Tensor) -> torch.Tensor:
    return t.reshape(-1).clone().as_strided(t.shape, (1,) * t.dim())


def expanded(t: torch.Tensor) -> torch.Tensor:
    return t[:1].expand(t.shape) if t.dim() else t.clone()


def channels_last(t: torch.Tensor) -> torch.Tensor:
    return (
        t.clone().to(memory_format=torch.channels_last)
        if t.dim() == 4
        else t.clone().transpose(0, -1).contiguous().transpose(0, -1)
    )


def in_inference(t: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return t.clone()


def fake(t: torch.Tensor) -> torch.Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode().from_tensor(t)


def functional(t: torch.Tensor) -> torch.Tensor:
    return torch._to_functional_tensor(t.clone())


def nested(t: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor([t.clone()], layout=torch.jagged) if t.dim() else t.to("meta")


def freed(t: torch.Tensor) -> torch.Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


# Kinds that hold values: an ordinary copy of them gives the expected result.
VALUES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "plain": torch.clone,
    "subclass": lambda t: t.clone().as_subclass(Plain),
    "neg": lambda t: torch._neg_view(t.neg()),
    "imaginary of a conjugate": lambda t: torch.complex(t, t.neg()).conj().imag,
    "channels_last": channels_last,
    "misaligned": misaligned,
    "every second": lambda t: torch.stack((t, t), -1)[..., 0],
    "expanded": expanded,
    "overlapping": overlapping,
    "inference": in_inference,
    "empty": lambda t: t[:0].clone() if t.dim() else t.new_empty(0),
    "0-d": lambda t: t.reshape(-1)[0].clone(),
    "one element": lambda t: t.reshape(-1)[:1].clone(),
    "one more": lambda t: torch.cat((t, t[..., :1]), -1) if t.dim() else t.reshape(1),
    "flat": lambda t: t.reshape(-1).clone(),
    "float64": lambda t: t.double(),
    "bfloat16": lambda t: t.bfloat16(),
    "float16": lambda t: t.half(),
    "nan": lambda t: torch.full_like(t, float("nan")),
}
# Kinds that must be refused, or whose result has no values.
OTHERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "meta": lambda t: t.to("meta"),
    "fake": fake,
    "functional": functional,
    "nested": nested,
    "freed": freed,
    "sparse": lambda t: t.to_sparse(),
    "conj": lambda t: torch.complex(t, t).conj(),
    "complex": lambda t: t.to(torch.complex64),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "int32": lambda t: t.int(),
    "int64": lambda t: t.long(),
    "bool": lambda t: t.bool(),
    "uint8": lambda t: t.to(torch.uint8),
}


def ordinary(t: torch.Tensor) -> torch.Tensor:
    copy = torch.empty(t.shape, dtype=t.dtype).copy_(t.detach().as_subclass(torch.Tensor))
    if t.is_inference():
        copy.has_no_gradient = True
    return copy


# ---- functions -------------------------------------------------------------------------------------------------------


def rand(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape))) + 0.5


def with_gradients(call: Callable[[Tensors], object]) -> Callable[[Tensors], list[torch.Tensor]]:
    """The results, and the gradients of all operands that can have one."""

    def run(tensors: Tensors) -> list[torch.Tensor]:
        leaves = {
            k: t.detach().requires_grad_()
            if k not in ("running_mean", "running_var")
            and t.is_floating_point()
            and not t.is_inference()
            and not hasattr(t, "has_no_gradient")
            else t
            for k, t in tensors.items()
        }
        results = call(leaves)
        results = [*results] if isinstance(results, tuple) else [results]
        wanted = [t for t in leaves.values() if t.requires_grad]
        outputs = [r for r in results if r.requires_grad]
        if outputs and wanted:
            dys = [torch.ones_like(r) for r in outputs]
            found = torch.autograd.grad(outputs, wanted, dys, allow_unused=True)
            results += [g for g in found if g is not None]
        return results + [tensors[k] for k in ("running_mean", "running_var") if k in tensors]

    return run


def operator(name: str, *rest: object) -> Callable[[Tensors], list[torch.Tensor]]:
    def run(tensors: Tensors) -> list[torch.Tensor]:
        results = getattr(torch.ops.onepass, name)(*tensors.values(), *rest)
        return [*results] if isinstance(results, tuple) else [results]

    return run


def module(make: Callable[[], torch.nn.Module]) -> Callable[[Tensors], object]:
    """The other tensors replace the module's parameters and buffers."""

    def run(tensors: Tensors) -> object:
        layer = make()
        for name, tensor in tensors.items():
            if name in layer._parameters:
                layer._parameters[name] = (
                    torch.nn.Parameter(tensor.detach()) if type(tensor) is torch.Tensor else tensor
                )
            elif name in layer._buffers:
                layer._buffers[name] = tensor
        return layer(tensors["input"])

    return run


def step(make: Callable[[list], torch.optim.Optimizer]) -> Callable[[Tensors], list[torch.Tensor]]:
    """A step; a given `state` replaces the first state that the optimizer creates."""

    def run(tensors: Tensors) -> list[torch.Tensor]:
        parameter = torch.nn.Parameter(tensors["parameter"], requires_grad=tensors["parameter"].is_floating_point())
        optimizer = make([parameter])
        parameter.grad = tensors["gradient"]
        if "state" in tensors:
            like = torch.nn.Parameter(rand(4, 6))
            other = make([like])
            like.grad = rand(4, 6)
            other.step()
            optimizer.state[parameter] = {**other.state[like]}
            name = next(k for k, v in other.state[like].items() if v.dim())
            optimizer.state[parameter][name] = tensors["state"]
        optimizer.step()
        return [parameter.detach(), *(v for v in optimizer.state[parameter].values() if v.dim())]

    return run


def clip(function: Callable[[torch.Tensor], object]) -> Callable[[Tensors], list[torch.Tensor]]:
    def run(tensors: Tensors) -> list[torch.Tensor]:
        parameter = torch.nn.Parameter(torch.empty_like(tensors["gradient"]), requires_grad=False)
        parameter.grad = tensors["gradient"]
        function(parameter)
        return [parameter.grad]

    return run


X, C = (4, 6), (6,)
IMAGE = (4, 6, 2, 3)
OPTIM = onepass.optim
SEED = torch.tensor(5)


def operands(**shapes: tuple[int, ...]) -> Tensors:
    return {name: rand(*shape) for name, shape in shapes.items()}


FUNCTIONS: dict[str, tuple[Callable[[Tensors], object], Tensors]] = {
    "layer_norm": (
        with_gradients(lambda t: OF.layer_norm(t["input"], C, t["weight"], t["bias"])),
        operands(input=X, weight=C, bias=C),
    ),
    "rms_norm": (with_gradients(lambda t: OF.rms_norm(t["input"], C, t["weight"])), operands(input=X, weight=C)),
    "dropout": (with_gradients(lambda t: OF.dropout(t["input"], 0.5, seed=3)), operands(input=X)),
    "dropout_add_layer_norm": (
        with_gradients(lambda t: OF.dropout_add_layer_norm(*list(t.values())[:2], C, t["weight"], t["bias"], seed=3)),
        operands(input=X, residual=X, weight=C, bias=C),
    ),
    "dropout_add_rms_norm": (
        with_gradients(lambda t: OF.dropout_add_rms_norm(t["input"], t["residual"], C, t["weight"], seed=3)),
        operands(input=X, residual=X, weight=C),
    ),
    "batch_norm": (
        with_gradients(lambda t: OF.batch_norm(*t.values(), training=True)),
        operands(input=IMAGE, running_mean=C, running_var=C, weight=C, bias=C),
    ),
    "batch_norm in evaluation": (
        with_gradients(lambda t: OF.batch_norm(*t.values())),
        operands(input=IMAGE, running_mean=C, running_var=C, weight=C, bias=C),
    ),
    "batch_norm_activation": (
        with_gradients(
            lambda t: OF.batch_norm_activation(t["input"], None, None, training=True, residual=t["residual"])
        ),
        operands(input=IMAGE, residual=IMAGE),
    ),
    "LayerNorm": (module(lambda: onepass.nn.LayerNorm(6)), operands(input=X, weight=C, bias=C)),
    "RMSNorm": (module(lambda: onepass.nn.RMSNorm(6)), operands(input=X, weight=C)),
    "BatchNorm2d": (
        module(lambda: onepass.nn.BatchNorm2d(6)),
        operands(input=IMAGE, weight=C, bias=C, running_mean=C, running_var=C),
    ),
    "BatchNormAct2d": (module(lambda: onepass.nn.BatchNormAct2d(6)), operands(input=IMAGE, weight=C, bias=C)),
    "ops.norm": (operator("norm", 6, 1e-5, False), operands(x=X, weight=C, bias=C)),
    "ops.dropout": (operator("dropout", 0.5, True, True), {**operands(x=X), "seed": SEED}),
    "ops.dropout_backward": (
        lambda t: [torch.ops.onepass.dropout_backward(t["dy"], t["seed"], 0.5, True, t["mask"])],
        {**operands(dy=X), "seed": SEED, "mask": torch.full((3,), 37, dtype=torch.uint8)},
    ),
    "ops.norm_backward": (
        lambda t: [*torch.ops.onepass.norm_backward(*t.values(), 6, 1e-5, False, [True] * 3)],
        operands(dy=X, x=X, weight=C, stats=(3, 4)),
    ),
    "ops.batch_norm_apply": (
        lambda t: [
            torch.ops.onepass.batch_norm_apply(t["x"], None, t["weight"], t["bias"], t["stats"], 1e-5, None, False)
        ],
        operands(x=IMAGE, weight=C, bias=C, stats=(3, 6)),
    ),
    **{
        f"{name}.step": (
            step(lambda params, rule=rule, more=more: rule.ours(params, **{**rule.usual, **more})),
            operands(parameter=X, gradient=X, state=X),
        )
        for name, rule, more in (
            *((name, rule, {}) for name, rule in RULES.items()),
            ("AdamW clipped", RULES["AdamW"], {"max_norm": 0.5}),
        )
    },
    "clip_grad_norm_": (clip(lambda p: OPTIM.clip_grad_norm_([p], 0.5)), operands(gradient=X)),
    "clip_grad_value_": (clip(lambda p: OPTIM.clip_grad_value_([p], 0.7)), operands(gradient=X)),
}


# ---- cells -----------------------------------------------------------------------------------------------------------


def has_values(results: list[torch.Tensor]) -> bool:
    return all(type(r) in (torch.Tensor, torch.nn.Parameter, Plain) and r.device.type == "cpu" for r in results)


def same(came: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    if len(came) != len(expected):
        return False
    for a, b in zip(came, expected, strict=True):
        a, b = ordinary(a), ordinary(b)
        tolerance = max(1e-5, 4 * torch.finfo(b.dtype).eps) if b.dtype.is_floating_point else 0
        if (a.shape, a.dtype) != (b.shape, b.dtype) or not torch.allclose(a, b, tolerance, tolerance, equal_nan=True):
            return False
    return True


def attempt(call: Callable[[Tensors], object], tensors: Tensors) -> list[torch.Tensor] | BaseException:
    try:
        results = call(tensors)
    except Exception as error:
        return error
    return [*results] if isinstance(results, (tuple, list)) else [results]


def cell(call: Callable[[Tensors], object], good: Tensors, name: str, kind: str) -> str:
    """What is wrong with a cell; empty if nothing."""
    make = VALUES.get(kind) or OTHERS[kind]
    tensors = {k: make(t) if k == name else t.clone() for k, t in good.items()}
    copies = {k: ordinary(t) for k, t in tensors.items()} if kind in VALUES else None
    came = attempt(call, tensors)
    if isinstance(came, BaseException):
        if any(text in str(came) for text in TORCHS):
            return ""
        if not isinstance(came, CLEAR):
            return f"{type(came).__name__}: {came}"
        if not str(came).strip() or "Internal error" in str(came) or "INTERNAL ASSERT" in str(came):
            return f"unclear: {came}"
        if kind in ("plain", "subclass", "misaligned", "every second", "neg") and "lazily negated view" not in str(
            came
        ):
            return f"refused: {type(came).__name__}: {came}"
        return ""
    if copies is None or not has_values(came):
        return ""
    expected = attempt(call, copies)
    if isinstance(expected, BaseException):
        return f"taken, an ordinary copy is refused: {expected}"
    return "" if same(came, expected) else "other values than with an ordinary copy"


def main(function: str) -> None:
    call, good = FUNCTIONS[function]
    for name, tensor in good.items():
        for kind in [*VALUES, *OTHERS]:
            if not tensor.is_floating_point() and kind in (
                "imaginary of a conjugate",
                "conj",
                "nan",
                "functional",
                "nested",
            ):
                continue
            print(json.dumps({"cell": f"{function}, {name}: {kind}", "begins": True}), flush=True)
            print(
                json.dumps({"cell": f"{function}, {name}: {kind}", "wrong": cell(call, good, name, kind)}), flush=True
            )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for function in sys.argv[1:]:
        main(function)
