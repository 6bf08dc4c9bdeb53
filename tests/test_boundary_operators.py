"""Operators called by name with arguments that do not match: an error that names both, in the kernel and its fake."""

from collections.abc import Callable

import onepass  # noqa: F401
import pytest
import torch
from support import bits
from torch._subclasses.fake_tensor import FakeTensorMode

OPS = torch.ops.onepass
Make = Callable[[], object]


def t(*shape: int, dtype=torch.float32) -> Make:
    return lambda: torch.arange(1.0, torch.Size(shape).numel() + 1).reshape(shape).to(dtype)


def zeros(*shape: int, dtype=torch.float32, device="cpu") -> Make:
    return lambda: torch.zeros(shape, dtype=dtype, device=device)


def value(v: object) -> Make:
    return lambda: v


SEED = zeros(dtype=torch.int64)
MASK = zeros(3, dtype=torch.uint8)  # 24 bits
NOTHING = value(None)
X, C = t(4, 6), t(6)
P = {"p": value(0.5), "inverted": value(True)}
ROW = {"size": value(6), "eps": value(1e-5), "rms": value(False)}

# Valid arguments of every operator.
GOOD: dict[str, dict[str, Make]] = {
    "norm": {"x": X, "weight": C, "bias": C, **ROW},
    "norm_backward": {
        "dy": X,
        "x": X,
        "weight": C,
        "stats": t(3, 4),
        **ROW,
        "want": value([True] * 3),
    },
    "dropout": {"x": X, "seed": SEED, **P, "keep_mask": value(True)},
    "dropout_backward": {"dy": X, "seed": SEED, **P, "mask": MASK},
    "dropout_mask": {"seed": SEED, "shape": value([4, 6]), "p": value(0.5), "packed": value(False)},
    "dropout_add_norm": {
        "x": X,
        "residual": X,
        "weight": C,
        "bias": C,
        "seed": SEED,
        **P,
        **ROW,
        "keep_mask": value(True),
    },
    "dropout_add_norm_backward": {
        "dy": X,
        "dsum": X,
        "sum": X,
        "weight": C,
        "stats": t(3, 4),
        "mask": MASK,
        "seed": SEED,
        **P,
        **ROW,
        "want": value([True] * 4),
    },
    "batch_norm": {
        "x": t(4, 6, 2, 2),
        "residual": t(4, 6, 2, 2),
        "weight": C,
        "bias": C,
        "eps": value(1e-5),
        "slope": value(0.0),
        "channels_last": value(False),
    },
    "batch_norm_apply": {
        "x": t(4, 6, 2, 2),
        "residual": t(4, 6, 2, 2),
        "weight": C,
        "bias": C,
        "stats": t(3, 6),
        "eps": value(1e-5),
        "slope": NOTHING,
        "channels_last": value(True),
    },
    "batch_norm_backward": {
        "dy": t(4, 6, 2, 2),
        "x": t(4, 6, 2, 2),
        "y": t(4, 6, 2, 2),
        "weight": C,
        "stats": t(3, 6),
        "eps": value(1e-5),
        "slope": value(0.1),
        "channels_last": value(False),
        "training": value(True),
        "want": value([True] * 4),
    },
}


LIKE_THE_FIRST = ("x", "residual", "dy", "dsum", "sum", "y")


def bad_values(operator: str, name: str, good: Make) -> dict[str, Make]:
    """Values that an argument must not have."""
    if name in LIKE_THE_FIRST:
        return unlike(good().shape, alone=len(GOOD[operator].keys() & set(LIKE_THE_FIRST)) == 1)
    if name in ("weight", "bias"):
        return {
            **{f"{size} elements": t(size) for size in (0, 5, 7)},
            **{str(d): zeros(6, dtype=d) for d in (torch.int32, torch.float64, torch.float16)},
            "device": zeros(6, device="meta"),
        }
    if name == "stats":
        shape = tuple(good().shape)
        return {
            "flat": t(torch.Size(shape).numel()),
            "short": t(3, 2),
            "two rows": t(2, shape[1]),
            **{str(d): zeros(*shape, dtype=d) for d in (torch.float64, torch.bfloat16)},
            "device": zeros(*shape, device="meta"),
        }
    if name == "seed":
        anywhere = operator == "dropout_mask"  # the mask is created on its seed's device
        return {
            "int32": zeros(dtype=torch.int32),
            "float": zeros(),
            "1-d": zeros(1, dtype=torch.int64),
            "empty": zeros(0, dtype=torch.int64),
            **({} if anywhere else {"device": zeros(dtype=torch.int64, device="meta")}),
        }
    return BAD_VALUES.get(name, {})


def unlike(shape: torch.Size, alone: bool) -> dict[str, Make]:
    """Tensors that do not match the others of a call; if there is only one, of another dtype or device."""
    wrong = {str(d): zeros(*shape, dtype=d) for d in (torch.int32, torch.complex64, torch.float8_e5m2)}
    if not alone:
        wrong |= {
            "float64": zeros(*shape, dtype=torch.float64),
            "shape": t(*shape[:-1], shape[-1] + 1),
            "one element": t(),
            "flat": t(shape.numel()),
        }
    return {**wrong, "device": zeros(*shape, device="meta")}


BAD_VALUES: dict[str, dict[str, Make]] = {
    "mask": {
        "short": zeros(1, dtype=torch.uint8),
        "long": zeros(4, dtype=torch.uint8),
        "bool": zeros(3, dtype=torch.bool),
        "unpacked": zeros(4, 6, dtype=torch.uint8),
        "device": zeros(3, dtype=torch.uint8, device="meta"),
    },
    "size": {"0": value(0), "negative": value(-6), "no divisor": value(7), "larger": value(48)},
    "p": {"negative": value(-0.1), "above 1": value(1.5), "nan": value(float("nan"))},
    "slope": {"negative": value(-0.5), "nan": value(float("nan"))},
    "want": {"short": value([True]), "long": value([True] * 5), "empty": value([])},
    "shape": {"negative": value([4, -1])},
}

TABLE = {
    f"{operator}: {name} {what}": (operator, name, bad)
    for operator, arguments in GOOD.items()
    for name, good in arguments.items()
    for what, bad in bad_values(operator, name, good).items()
}
MORE = {
    "batch_norm: x 1-d": ("batch_norm", "x", {"x": C, "residual": NOTHING}),
    "batch_norm: channels_last 3-d": (
        "batch_norm",
        "channels_last",
        {"x": t(4, 6, 2), "residual": NOTHING, "channels_last": value(True)},
    ),
    "batch_norm_backward: y missing": ("batch_norm_backward", "y", {"y": NOTHING}),
    "norm: lone bias 0-d": ("norm", "bias", {"weight": NOTHING, "bias": t()}),
    "norm: bias unlike weight": ("norm", "bias", {"bias": t()}),
    "dropout_add_norm: everything empty but the weight": (
        "dropout_add_norm",
        "weight",
        {"x": t(0, 6), "residual": t(0, 6), "weight": t(5), "bias": NOTHING},
    ),
}


def call(operator: str, changes: dict[str, Make]):
    arguments = {**GOOD[operator], **changes}
    return getattr(OPS, operator)(*(make() for make in arguments.values()))


@pytest.mark.parametrize("operator", GOOD)
def test_valid_arguments(operator):
    """They are accepted, and kernel and fake agree; the tests below change one of them at a time."""
    came = call(operator, {})
    with FakeTensorMode():
        expected = call(operator, {})
    as_tuple = (came,) if isinstance(came, torch.Tensor) else came
    for real, fake in zip(as_tuple, (expected,) if isinstance(expected, torch.Tensor) else expected, strict=True):
        assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())


def assert_refused(operator: str, name: str, changes: dict[str, Make]) -> None:
    with pytest.raises(RuntimeError) as caught:
        call(operator, changes)
    text = str(caught.value)
    assert text.startswith(f"onepass::{operator}: "), text
    assert name in text, f"the message should name {name}, came: {text}"
    assert "expected is" in text, text


@pytest.mark.parametrize(("operator", "name", "bad"), TABLE.values(), ids=TABLE)
def test_refused(operator, name, bad):
    assert_refused(operator, name, {name: bad})
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert_refused(operator, name, {name: bad})


@pytest.mark.parametrize(("operator", "name", "changes"), MORE.values(), ids=MORE)
def test_combinations_are_refused(operator, name, changes):
    assert_refused(operator, name, changes)
    with FakeTensorMode():
        assert_refused(operator, name, changes)


def twice(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with a stride of 2."""
    return torch.stack((tensor, tensor), -1)[..., 0]


def negated(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, with the negative bit set."""
    return torch._neg_view(tensor.neg()) if tensor.dtype.is_signed else tensor


@pytest.mark.parametrize("view", [twice, negated])
@pytest.mark.parametrize("operator", GOOD)
def test_any_strides_and_signs(operator, view):
    """Every tensor argument, including statistics, seeds and masks."""
    expected = call(operator, {})
    changes = {
        name: (lambda made=made: view(made))
        for name, make in GOOD[operator].items()
        if isinstance(made := make(), torch.Tensor)
    }
    came = call(operator, changes)
    for a, b in zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (came, expected)), strict=True):
        assert bits(a) == bits(b)
