"""The layers' references are right: they agree with torch in float64, published numbers and arithmetic by hand."""

from functools import partial

import numpy as np
import pytest
import torch
from reference import batch_norm, dropout, norm, philox
from torch.nn import functional as F

assert_close = partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-12)
WEIGHTS = pytest.mark.parametrize("weights", ["none", "weight", "both"])


def with_gradients(*arrays):
    return [None if a is None else torch.tensor(a, requires_grad=True) for a in arrays]


def affine(weights: str, size: int, rng: np.random.Generator):
    weight = None if weights == "none" else rng.standard_normal(size)
    return weight, rng.standard_normal(size) if weights == "both" else None


# ---- Philox and the mask ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("counter", "key", "expected"), philox.KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    came = philox.philox4x32(np.array(counter, dtype=np.uint64), key)
    assert [hex(word) for word in came] == [hex(word) for word in expected]


def test_words_are_numbered_by_counter_and_position():
    """Word 0 of seed 0 is the first known answer; the key words are the seed's halves; the counter's upper half is word 1."""
    assert philox.words(0, 4).tolist() == list(philox.KNOWN_ANSWERS[0][2])
    assert philox.words(-1, 4).tolist() == philox.philox4x32(np.zeros(4), (2**32 - 1, 2**32 - 1)).tolist()
    seed = 5 + 7 * 2**32
    far = philox.words(seed, 3, start=4 * (2**32 + 9) + 1)
    assert far.tolist() == philox.philox4x32(np.array([9, 1, 0, 0]), (5, 7)).tolist()[1:]
    assert philox.words(seed, 10, start=3).tolist() == philox.words(seed, 13)[3:].tolist()


def test_threshold_and_packing_by_hand():
    assert [philox.threshold(p) for p in (0.0, 0.5, 1.0, 2.0**-32, 2.0**-34)] == [0, 2**31, 2**32, 1, 0]
    assert philox.keep_mask((2, 5), 0.0, 3).all()
    assert not philox.keep_mask((2, 5), 1.0, 3).any()
    mask = np.array([[True, False, True], [True, False, False], [False, True, True]])
    assert philox.pack(mask).tolist() == [0b10001101, 0b1]
    assert philox.pack(np.zeros((0, 3), dtype=bool)).tolist() == []


def test_dropout_by_hand():
    x = np.array([1.0, -2.0, np.nan, np.inf, 5.0, 6.0])
    keep = philox.keep_mask(x.shape, 0.5, 1)
    came = dropout.dropout(x, 0.5, 1)
    assert keep.tolist() == (philox.words(1, 6) >= 2**31).tolist()
    assert_close(came, [2 * value if kept else 0.0 for value, kept in zip(x, keep, strict=True)])
    assert_close(dropout.dropout(x, 0.25, 1, training=False, inverted=False), 0.75 * x)
    assert_close(dropout.dropout(x, 0.25, 1, training=False), x)
    assert_close(dropout.dropout(x, 1.0, 1), np.zeros(6))
    assert_close(dropout.dropout(x, 0.0, 1, inverted=False), x)
    paper = dropout.dropout(x, 0.25, 1, inverted=False)
    assert_close(paper, np.where(philox.keep_mask(x.shape, 0.25, 1), x, 0.0))


# ---- norms -----------------------------------------------------------------------------------------------------------

NORMS = {
    "layer_norm": (norm.layer_norm, norm.layer_norm_backward, F.layer_norm),
    "rms_norm": (norm.rms_norm, norm.rms_norm_backward, F.rms_norm),
}


@WEIGHTS
@pytest.mark.parametrize("shape", [(4, 7), (1, 5), (3, 1), (0, 4), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_norm_agrees_with_torch(name, shape, weights):
    forward, backward, theirs = NORMS[name]
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, *shape))
    weight, bias = affine(weights, shape[-1], rng)
    bias = None if name == "rms_norm" else bias
    tensors = with_gradients(x, weight, bias)
    arguments = tensors if name == "layer_norm" else tensors[:2]
    y = theirs(arguments[0], shape[-1:], *arguments[1:], eps=1e-3)
    y.backward(torch.tensor(dy))
    rows = (-1, shape[-1])
    assert_close(forward(x.reshape(rows), weight, bias, 1e-3).reshape(shape), y.detach())
    came = backward(dy.reshape(rows), x.reshape(rows), weight, bias, 1e-3)
    assert_close(came.x.reshape(shape), tensors[0].grad)
    for gradient, tensor in ((came.weight, tensors[1]), (came.bias, tensors[2])):
        assert (gradient is None) == (tensor is None)
        if tensor is not None:
            assert_close(gradient, tensor.grad)


@pytest.mark.parametrize("name", NORMS)
def test_scalar_affine_is_one_number_for_all(name):
    forward, backward, theirs = NORMS[name]
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 4, 7))
    weight, bias = np.array(0.7), np.array(-0.3) if name == "layer_norm" else None
    tensors = with_gradients(x, weight, bias)
    y = theirs(tensors[0], (7,), eps=1e-3) * tensors[1] + (0 if bias is None else tensors[2])
    y.backward(torch.tensor(dy))
    came = backward(dy, x, weight, bias, 1e-3)
    assert_close(forward(x, weight, bias, 1e-3), y.detach())
    assert_close(came.x, tensors[0].grad)
    assert_close(came.weight, tensors[1].grad)
    if bias is not None:
        assert_close(came.bias, tensors[2].grad)


def test_layer_norm_by_hand():
    """Mean 2, variance 1: x̂ = ±1, whatever the weights."""
    x = np.array([[1.0, 3.0, 1.0, 3.0]])
    assert_close(norm.layer_norm(x, None, None, 0.0), [[-1, 1, -1, 1]])
    assert_close(norm.layer_norm(x, np.array([2.0, 2, 3, 3]), np.ones(4), 3.0), [[0, 2, -0.5, 2.5]])
    assert_close(norm.rms_norm(x, None, None, 0.0), x / np.sqrt(5))


# ---- batch norm ------------------------------------------------------------------------------------------------------

SHAPES = [(5, 3), (2, 3, 4), (1, 2, 3, 2), (2, 2, 2, 1, 3)]


@WEIGHTS
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_batch_norm_agrees_with_torch(shape, training, weights):
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, *shape))
    weight, bias = affine(weights, shape[1], rng)
    mean, var = rng.standard_normal(shape[1]), rng.random(shape[1]) + 0.5
    tensors = with_gradients(x, weight, bias)
    running = [torch.tensor(mean), torch.tensor(var)]
    y = F.batch_norm(tensors[0], *running, *tensors[1:], training=training, momentum=0.3, eps=1e-3)
    y.backward(torch.tensor(dy))
    statistics = None if training else (mean, var)
    assert_close(batch_norm.batch_norm(x, weight, bias, 1e-3, statistics), y.detach())
    came = batch_norm.batch_norm_backward(dy, x, weight, bias, 1e-3, statistics)
    for gradient, tensor in zip((came.x, came.weight, came.bias), tensors, strict=True):
        assert (gradient is None) == (tensor is None)
        if tensor is not None:
            assert_close(gradient, tensor.grad)
    if training:
        for expected, value in zip(running, batch_norm.running_statistics(x, mean, var, 0.3), strict=True):
            assert_close(value, expected)


@pytest.mark.parametrize("slope", [None, 0.0, 0.2])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_with_residual_and_activation(training, with_residual, slope):
    rng = np.random.default_rng(1)
    x, dy, residual = rng.standard_normal((3, 4, 3, 5))
    residual = residual if with_residual else None
    weight, bias = affine("both", 3, rng)
    mean, var = rng.standard_normal(3), rng.random(3) + 0.5
    tensors = with_gradients(x, weight, bias, residual)
    z = F.batch_norm(tensors[0], torch.tensor(mean), torch.tensor(var), *tensors[1:3], training=training)
    z = z if residual is None else z + tensors[3]
    out = z if slope is None else F.leaky_relu(z, slope)
    out.backward(torch.tensor(dy))
    arguments = (x, weight, bias, 1e-5, None if training else (mean, var), residual, slope)
    assert_close(batch_norm.batch_norm(*arguments), out.detach())
    came = batch_norm.batch_norm_backward(dy, *arguments)
    for gradient, tensor in zip((came.x, came.weight, came.bias, came.residual), tensors, strict=True):
        assert (gradient is None) == (tensor is None)
        if tensor is not None:
            assert_close(gradient, tensor.grad)


def test_empty_batch_changes_no_statistics():
    mean, var = np.array([1.0, 2.0]), np.array([3.0, 4.0])
    for x in (np.zeros((0, 2)), np.zeros((3, 2, 0))):
        assert_close(batch_norm.running_statistics(x, mean, var, 0.5), (mean, var))
        assert batch_norm.batch_norm(x).shape == x.shape
