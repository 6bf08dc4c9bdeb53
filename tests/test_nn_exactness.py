"""Results have the same bits for any number of threads and in any run; dropout also on every instruction set, norms nearly."""

from collections.abc import Callable

import onepass
import pytest
import torch
from layers import affine, gradients, leaf, running_statistics
from onepass.nn import functional as OF
from support import assert_close, assert_same, bits

ISAS = onepass._native.isas()
Results = dict[str, torch.Tensor]


def row_norm(function, kind="weight and bias") -> Callable[..., Results]:
    def run(shape, dtype) -> Results:
        x, dy = leaf(torch.randn(shape).to(dtype)), torch.randn(shape).to(dtype)
        weight, bias = map(leaf, affine(kind, True, shape[-1:], dtype, "cpu"))
        arguments = (weight, bias) if function is OF.layer_norm else (weight,)
        y = function(x, shape[-1:], *arguments)
        found = gradients(y, (x, *arguments), dy)
        return dict(zip(("y", "dx", "dweight", "dbias"), (y, *found), strict=False))

    return run


def of_batches(memory_format=torch.contiguous_format, training=True) -> Callable[..., Results]:
    def run(shape, dtype) -> Results:
        x = torch.randn(shape).to(dtype).to(memory_format=memory_format)
        x, dy = leaf(x), torch.randn(shape).to(dtype)
        weight, bias = map(leaf, affine("weight and bias", True, shape[1:2], dtype, "cpu"))
        mean, var = running_statistics(shape[1], dtype)
        y = OF.batch_norm(x, mean, var, weight, bias, training)
        dx, dweight, dbias = gradients(y, (x, weight, bias), dy)
        return {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias, "running_mean": mean, "running_var": var}

    return run


def of_dropout(shape, dtype) -> Results:
    x, dy = leaf(torch.randn(shape).to(dtype)), torch.randn(shape).to(dtype)
    y = OF.dropout(x, 0.3, seed=7)
    n = shape[0] * shape[1]
    masks = OF.dropout_mask((n,), 0.3, 7), OF.dropout_mask((n,), 0.3, 7, packed=True)
    return {"y": y, "dx": gradients(y, (x,), dy)[0], "mask": masks[0], "packed mask": masks[1]}


def of_dropout_add_norm(function) -> Callable[..., Results]:
    def run(shape, dtype) -> Results:
        x, residual, dy, dsum = (torch.randn(shape).to(dtype) for _ in range(4))
        weight, bias = map(leaf, affine("weight and bias", True, shape[-1:], dtype, "cpu"))
        arguments = (weight, bias) if function is OF.dropout_add_layer_norm else (weight,)
        inputs = leaf(x), leaf(residual), *arguments
        y, total = function(*inputs[:2], shape[-1:], *arguments, p=0.3, seed=7)
        found = torch.autograd.grad((y, total), inputs, (dy, dsum))
        names = "y", "sum", "dx", "dresidual", "dweight", "dbias"
        return dict(zip(names, (y, total, *found), strict=False))

    return run


def of_batches_activated(memory_format=torch.contiguous_format) -> Callable[..., Results]:
    def run(shape, dtype) -> Results:
        x, residual = (torch.randn(shape).to(dtype).to(memory_format=memory_format) for _ in range(2))
        weight, bias = affine("weight and bias", True, shape[1:2], dtype, "cpu")
        inputs = [leaf(t) for t in (x, residual, weight, bias)]
        y = OF.batch_norm_activation(inputs[0], None, None, *inputs[2:], training=True, residual=inputs[1])
        found = gradients(y, inputs, torch.randn(shape).to(dtype))
        return dict(zip(("y", "dx", "dresidual", "dweight", "dbias"), (y, *found), strict=True))

    return run


# Enough elements for two threads; numbers of rows and blocks that no number of threads divides.
CASES: dict[str, tuple[Callable[..., Results], tuple]] = {
    "layer_norm, many rows": (row_norm(OF.layer_norm), ((20011, 67),)),
    "layer_norm": (row_norm(OF.layer_norm), ((1501, 1027),)),
    "layer_norm, few rows": (row_norm(OF.layer_norm), ((5, 250_001),)),
    "layer_norm, scalar affine": (row_norm(OF.layer_norm, "scalar"), ((1501, 1027),)),
    "rms_norm, many rows": (row_norm(OF.rms_norm), ((20011, 67),)),
    "rms_norm, few rows": (row_norm(OF.rms_norm), ((3, 400_003),)),
    "batch_norm": (of_batches(), ((7, 19, 101, 97),)),
    "batch_norm, two channels": (of_batches(), ((5, 2, 331, 313),)),
    "batch_norm, channels_last": (of_batches(torch.channels_last), ((7, 19, 101, 97),)),
    "batch_norm, rows": (of_batches(), ((20011, 67),)),
    "batch_norm, evaluation": (of_batches(training=False), ((7, 19, 101, 97),)),
    "batch_norm_activation": (of_batches_activated(), ((7, 19, 101, 97),)),
    "batch_norm_activation, channels_last": (of_batches_activated(torch.channels_last), ((7, 19, 101, 97),)),
    "dropout": (of_dropout, ((1301, 1009),)),
    "dropout_add_layer_norm": (of_dropout_add_norm(OF.dropout_add_layer_norm), ((1301, 1009),)),
    "dropout_add_rms_norm, few rows": (of_dropout_add_norm(OF.dropout_add_rms_norm), ((3, 400_003),)),
}
EVERY_CASE = pytest.mark.parametrize(("run", "arguments"), CASES.values(), ids=CASES)


def with_seed(run, *arguments, **kwargs) -> Results:
    torch.manual_seed(1)
    return run(*arguments, **kwargs)


def as_bits(results: Results) -> dict[str, bytes]:
    return {key: bits(value) for key, value in results.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@EVERY_CASE
def test_same_bits_for_any_thread_count(run, arguments, dtype):
    """One, two and three threads: the shape alone determines the partial sums."""
    results = {}
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results[threads] = as_bits(with_seed(run, *arguments, dtype))
    for threads in (2, 3):
        assert_same(results[threads], results[1], f"{threads} threads against 1")


@EVERY_CASE
def test_same_bits_from_run_to_run(run, arguments):
    torch.set_num_threads(2)
    first, second = (as_bits(with_seed(run, *arguments, torch.float32)) for _ in range(2))
    assert_same(second, first, "second run")


SMALL = [(1, 1), (3, 7), (5, 16), (9, 33), (4, 129), (33, 65)]


def test_dropout_has_the_same_bits_on_every_isa(dtype):
    """Also what the fused function adds to the residual."""
    for shape in [*SMALL, (301, 1009)]:
        results = {}
        for isa in ISAS:
            with onepass._native.use_isa(isa):
                results[isa] = as_bits(with_seed(of_dropout, shape, dtype))
                zeros = torch.zeros(shape, dtype=dtype)
                results[isa]["sum"] = bits(OF.dropout_add_layer_norm(zeros + 1, zeros, shape[1:], p=0.3, seed=7)[1])
        for isa in ISAS:
            assert_same(results[isa], results["baseline"], f"{isa} against baseline, {shape}")


@pytest.mark.parametrize(
    "case",
    [
        "layer_norm",
        "layer_norm, scalar affine",
        "rms_norm, few rows",
        "batch_norm",
        "batch_norm, channels_last",
        "batch_norm_activation",
        "dropout_add_layer_norm",
    ],
)
def test_every_isa_is_close_to_the_baseline(case, dtype):
    """Only the last places differ, because sums have another order. (test_nn_norm and test_nn_batch_norm check values.)"""
    run = CASES[case][0]
    batches = "batch_norm" in case
    for shape in [(3, 7, 5, 3), (2, 17, 3, 11), (2, 64, 4, 4)] if batches else SMALL[1:]:
        results = {}
        for isa in ISAS:
            with onepass._native.use_isa(isa):
                results[isa] = with_seed(run, shape, dtype)
        for isa in ISAS:
            for key, value in results[isa].items():
                tolerance = 1e-12 if dtype == torch.float64 else 2e-5
                last_place = 0.0 if dtype == torch.float64 else torch.finfo(value.dtype).eps
                assert_close(value, results["baseline"][key], tolerance, f"{key} of {shape} on {isa}", last_place)
