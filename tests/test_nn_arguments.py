"""Arguments that are not Python floats or tensors: accepted where torch accepts them, refused with torch's sentences."""

import numpy as np
import onepass
import pytest
import torch
from onepass.nn import functional as OF
from support import assert_close
from torch import nn
from torch.nn import functional as F

C = 6
X = torch.randn(4, C)
NUMBERS = {
    "np.float32": np.float32,
    "np.float64": np.float64,
    "np.float16": np.float16,
    "0-d array's item": lambda value: np.array(value, dtype=np.float32)[()],
    "0-d tensor": torch.tensor,
    "0-d float64 tensor": lambda value: torch.tensor(value, dtype=torch.float64),
}

# Modules made with a number, and the same module made with a Python float.
TAKES = {
    "LayerNorm's eps": lambda lib, v: lib.LayerNorm(C, eps=v),
    "RMSNorm's eps": lambda lib, v: lib.RMSNorm(C, eps=v),
    "BatchNorm1d's eps": lambda lib, v: lib.BatchNorm1d(C, eps=v),
    "BatchNorm1d's momentum": lambda lib, v: lib.BatchNorm1d(C, momentum=v),
}


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("name", TAKES)
def test_numbers(name, kind):
    """Outputs and statistics are those of a float, and torch's."""
    value = NUMBERS[kind](0.25)
    theirs, ours, plain = TAKES[name](nn, value), TAKES[name](onepass.nn, value), TAKES[name](onepass.nn, 0.25)
    for x in (X, X.double()):
        expected, came, like = (module.to(x.dtype)(x) for module in (theirs, ours, plain))
        assert_close(came, expected, 1e-5, name)
        assert torch.equal(came, like)
    for (key, came), like in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(came, like), key


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_in_our_own_arguments(kind):
    value = NUMBERS[kind](0.25)
    pairs = {
        "p": (lambda v: OF.dropout(X, v, seed=1)),
        "p of a mask": (lambda v: OF.dropout_mask((9,), v, 1)),
        "p of a sum": (lambda v: OF.dropout_add_layer_norm(X, X, (C,), p=v, seed=1)[0]),
        "eps of a sum": (lambda v: OF.dropout_add_rms_norm(X, X, (C,), eps=v, seed=1)[0]),
        "negative_slope": (
            lambda v: OF.batch_norm_activation(X, None, None, training=True, activation="leaky_relu", negative_slope=v)
        ),
        "Dropout": (lambda v: onepass.nn.Dropout(v).eval()(X)),
    }
    for name, call in pairs.items():
        assert torch.equal(call(value), call(0.25)), name


@pytest.mark.parametrize("seed", [np.int64(5), np.uint32(5), np.int8(5)], ids=lambda s: type(s).__name__)
def test_seeds(seed):
    assert torch.equal(OF.dropout(X, seed=seed), OF.dropout(X, seed=5))
    with pytest.raises(TypeError, match="argument 'seed' must be int, not float"):
        OF.dropout(X, seed=np.float32(5).item())


def test_shapes_from_numpy():
    expected = F.layer_norm(X, (C,))
    for shape in ((np.int64(C),), [np.int32(C)], torch.Size([C])):
        assert_close(OF.layer_norm(X, shape), expected, 1e-6, str(shape))
    assert_close(OF.layer_norm(X, (np.int64(4), np.int64(C))), F.layer_norm(X, (4, C)), 1e-6, "two dimensions")


GRAD = torch.tensor(1e-5, requires_grad=True)
ones = torch.ones
# Calls that torch refuses with a TypeError, as (function, arguments).
REFUSED = [
    ("layer_norm", (None, (C,))),
    ("layer_norm", ("x", (C,))),
    ("layer_norm", (X, (C,), "w")),
    ("layer_norm", (X, (C,), None, "b")),
    ("layer_norm", (X, (C,), 1.0)),
    ("layer_norm", (X, (C,), ones(C), [0.0] * C)),
    ("layer_norm", (X, (float(C),))),
    ("layer_norm", (X, [float(C)])),
    ("layer_norm", (X, float(C))),
    ("layer_norm", (X, C)),
    ("layer_norm", (X, None)),
    ("layer_norm", (X, "6")),
    ("layer_norm", (X, (C,), None, None, "e")),
    ("layer_norm", (X, (C,), None, None, None)),
    ("layer_norm", (X, (C,), None, None, ones(2))),
    ("layer_norm", (X, (C,), None, None, GRAD)),
    ("rms_norm", (None, (C,))),
    ("rms_norm", (X, (C,), "w")),
    ("rms_norm", (X, (float(C),))),
    ("rms_norm", (X, C)),
    ("rms_norm", (X, (C,), None, "e")),
    ("batch_norm", (None, None, None)),
    ("batch_norm", (X, "m", ones(C))),
    ("batch_norm", (X, ones(C), "v")),
    ("batch_norm", (X, None, None, "w", None, True)),
    ("batch_norm", (X, None, None, ones(C), "b", True)),
    ("batch_norm", (X, None, None, None, None, True, "m")),
    ("batch_norm", (X, None, None, None, None, True, None)),
    ("batch_norm", (X, None, None, None, None, True, ones(2))),
    ("dropout", (None,)),
    ("dropout", ("x",)),
    ("dropout", (X, ones(1) * 0.5)),
]


@pytest.mark.parametrize(("function", "arguments"), REFUSED, ids=[f"{f}-{i}" for i, (f, _) in enumerate(REFUSED)])
def test_types_that_torch_refuses(function, arguments):
    """torch's sentence, word for word: the function, the argument and its position."""
    with pytest.raises(TypeError) as expected:
        getattr(F, function)(*arguments)
    with pytest.raises(TypeError) as came:
        getattr(OF, function)(*arguments)
    assert str(came.value).startswith(str(expected.value).split("\n")[0])


# Calls for which torch has no sentence, or another one.
NAMED = {
    "a later element": (lambda: OF.layer_norm(X, (4, "a")), "but found element of type str at pos 1"),
    "no input in training": (lambda: OF.batch_norm(None, None, None, training=True), "'input' (position 1)"),
    "eps of BatchNorm": (lambda: OF.batch_norm(X, None, None, training=True, eps="e"), "'eps' (position 8)"),
    "p": (lambda: OF.dropout(X, "p"), "'p' (position 2)"),
    "weight of a sum": (lambda: OF.dropout_add_layer_norm(X, X, (C,), "w"), "'weight' (position 3)"),
    "residual": (lambda: OF.dropout_add_rms_norm(X, None, (C,)), "'residual' (position 2)"),
    "negative_slope": (
        lambda: OF.batch_norm_activation(X, None, None, training=True, negative_slope="s"),
        "'negative_slope' (position 2)",
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_types_that_only_we_refuse(name):
    call, text = NAMED[name]
    with pytest.raises(TypeError) as caught:
        call()
    assert text in str(caught.value)


# --- fewer than two dimensions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0,), (3,), ()], ids=str)
@pytest.mark.parametrize("statistics", [None, 0, 3])
def test_batch_norm_of_few_dimensions(shape, statistics, training):
    """torch accepts an empty vector only; the errors for the rest are the same."""
    x = torch.zeros(shape)
    running = (None, None) if statistics is None else (torch.zeros(statistics), torch.ones(statistics))
    if shape == () and not training and statistics == 0:
        pytest.skip("torch fails to allocate an absurd amount of memory")
    error = None
    try:
        expected = F.batch_norm(x, *running, training=training)
    except (RuntimeError, IndexError) as caught:
        error = caught
    if error is None:
        came = OF.batch_norm(x, *running, training=training)
        assert (came.shape, came.dtype) == (expected.shape, expected.dtype)
        return
    with pytest.raises((RuntimeError, IndexError)) as came:
        OF.batch_norm(x, *running, training=training)
    if shape != () or not training:  # torch's own check of the batch's size fails there
        assert type(came.value) is type(error)
        assert str(came.value).startswith(str(error).split("\n")[0])
