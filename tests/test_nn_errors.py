"""Bad input raises torch's exception with torch's sentence, before anything is written or drawn."""

from collections.abc import Callable
from dataclasses import dataclass, field

import onepass
import pytest
import torch
from onepass.nn import functional as OF
from support import bits
from torch.nn import functional as F

X = torch.arange(12.0).view(3, 4)
W = torch.ones(4)
Call = Callable[[object], object]


@dataclass(frozen=True)
class Bad:
    call: Call  # called with the module of functions, torch's or ours
    error: type[Exception] | tuple[type[Exception], ...]
    text: str = ""  # the beginning of the message, in torch and here
    names: str = ""  # what the message also has to mention
    in_torch: bool = field(default=True)  # whether torch refuses it too


def norms(name: str) -> dict[str, Bad]:
    """Calls that both norms refuse."""

    def call(*args, x=X, **kwargs) -> Call:
        return lambda f: getattr(f, name)(x, *args, **kwargs)

    cpu = "Tensor on device meta is not on the expected device cpu!"
    kernel = {"layer_norm": "LayerNormKernelImpl", "rms_norm": "rms_norm"}[name]
    given = "[*, 5]" if name == "layer_norm" else "[*5]"
    same_shape = "Expected weight to be of same shape as normalized_shape, but got weight of shape [3] and normalized_shape = [4]"
    cases = {
        "normalized_shape": Bad(
            call((5,)),
            RuntimeError,
            f"Given normalized_shape=[5], expected input with shape {given}, but got input of size[3, 4]",
        ),
        "empty normalized_shape": Bad(call(()), RuntimeError, "Expected normalized_shape to be at least 1-dimensional"),
        "normalized_shape longer than x": Bad(
            call((2, 3, 4)),
            *(
                (
                    RuntimeError,
                    "Given normalized_shape=[2, 3, 4], expected input with shape [*, 2, 3, 4], but got input",
                )
                if name == "layer_norm"
                else (ValueError, "Input tensor must have at least 3 dimensions, but got 2")
            ),
        ),
        "normalized_shape no tuple": Bad(call(4), TypeError, names="normalized_shape"),
        "weight's shape": Bad(call((4,), torch.ones(3)), RuntimeError, same_shape),
        "weight of as many elements": Bad(
            call((4,), torch.ones(2, 2)), RuntimeError, "Expected weight to be of same shape as normalized_shape"
        ),
        "weight of one element": Bad(
            call((4,), torch.ones(1)), RuntimeError, "Expected weight to be of same shape as normalized_shape"
        ),
        "weight's device": Bad(call((4,), W.to("meta")), RuntimeError, cpu, "weight"),
        "0-d input": Bad(call((1,), x=torch.tensor(1.0)), (RuntimeError, ValueError)),
        "a list": Bad(call((2,), x=[1.0, 2.0]), TypeError, names="input"),
        "eps": Bad(call((4,), eps="small"), TypeError, names="eps"),
        "sparse input": Bad(call((4,), x=X.to_sparse()), RuntimeError),
    }
    for dtype, letter in ((torch.int32, "Int"), (torch.int64, "Long"), (torch.bool, "Bool"), (torch.uint8, "Byte")):
        cases[f"{dtype} input"] = Bad(
            call((4,), x=X.to(dtype)), NotImplementedError, f"\"{kernel}\" not implemented for '{letter}'"
        )
    cases["float8 input"] = Bad(
        call((4,), x=X.to(torch.float8_e5m2)), NotImplementedError, f'"{kernel}" not implemented for'
    )
    return {f"{name}: {key}": case for key, case in cases.items()}


def layer_norm(*args, x=X) -> Call:
    return lambda f: f.layer_norm(x, (4,), *args)


LAYER_NORM = {
    "bias's shape": Bad(
        layer_norm(W, torch.ones(3)),
        RuntimeError,
        "Expected bias to be of same shape as normalized_shape, but got bias of shape [3] and normalized_shape = [4]",
    ),
    "bias's device": Bad(layer_norm(W, W.to("meta")), RuntimeError, "Tensor on device meta is not on", "bias"),
    "weight wider than x": Bad(layer_norm(W.double()), RuntimeError, names="weight"),
    "weight narrower than x": Bad(layer_norm(W.bfloat16()), RuntimeError, names="weight"),
    "weight of another 16 bits": Bad(layer_norm(W.half(), x=X.bfloat16()), RuntimeError, names="weight"),
    "float32 weight beside float64": Bad(layer_norm(W, x=X.double()), RuntimeError, names="weight"),
    "bias of another dtype than the weight": Bad(
        layer_norm(W, W.bfloat16(), x=X.bfloat16()), RuntimeError, names="bias"
    ),
    "integer weight": Bad(layer_norm(W.int()), RuntimeError, names="weight"),
    "complex input": Bad(
        layer_norm(x=X.to(torch.complex64)), NotImplementedError, '"LayerNormKernelImpl" not implemented for'
    ),
}


def batch_norm(mean=W, var=W, weight=None, bias=None, training=True, x=X, **kwargs) -> Call:
    return lambda f: f.batch_norm(x, mean, var, weight, bias, training, **kwargs)


def of_three(**kwargs) -> Call:
    return batch_norm(
        **{key: torch.ones(3) for key in kwargs if kwargs[key] is ...}, training=kwargs.get("training", True)
    )


one_value = "Expected more than 1 value per channel when training, got input size torch.Size("
differentiable = "The function 'native_batch_norm' is not differentiable with respect to argument 'running_mean'"
BATCH_NORM = {
    "one value a channel": Bad(batch_norm(x=X[:1]), ValueError, one_value + "[1, 4])"),
    "one value a channel, 4-d": Bad(batch_norm(x=torch.ones(1, 4, 1, 1)), ValueError, one_value + "[1, 4, 1, 1])"),
    "no statistics in evaluation": Bad(
        batch_norm(None, None, training=False), RuntimeError, "running_mean must be defined in evaluation mode"
    ),
    "no variance in evaluation": Bad(
        batch_norm(W, None, training=False), RuntimeError, "running_var must be defined in evaluation mode"
    ),
    "no variance in training": Bad(
        batch_norm(W, None), ValueError, "running_mean and running_var must either both be None or neither be None"
    ),
    "running_mean's size": Bad(of_three(mean=...), RuntimeError, "running_mean should contain 4 elements not 3"),
    "running_var's size": Bad(of_three(var=...), RuntimeError, "running_var should contain 4 elements not 3"),
    "running_var's size in evaluation": Bad(
        of_three(var=..., training=False), RuntimeError, "running_var should contain 4 elements not 3"
    ),
    "weight's size": Bad(of_three(weight=...), RuntimeError, "weight should contain 4 elements not 3"),
    "bias's size": Bad(of_three(bias=...), RuntimeError, "bias should contain 4 elements not 3"),
    "0-d weight": Bad(batch_norm(weight=torch.tensor(1.0)), RuntimeError, "weight should contain 4 elements not 1"),
    "weight's dtype": Bad(batch_norm(weight=W.double(), bias=W.double()), RuntimeError, names="weight"),
    "integer statistics": Bad(batch_norm(W.int(), W.int()), RuntimeError, names="running_mean"),
    "running_mean's device": Bad(
        batch_norm(W.to("meta")), RuntimeError, "Tensor on device meta is not on", "running_mean"
    ),
    "weight's device": Bad(batch_norm(weight=W.to("meta")), RuntimeError, "Tensor on device meta is not on", "weight"),
    "integer input": Bad(batch_norm(x=X.int()), NotImplementedError, "\"batch_norm\" not implemented for 'Int'"),
    "integer input in evaluation": Bad(
        batch_norm(x=X.long(), training=False), NotImplementedError, "\"batch_norm\" not implemented for 'Long'"
    ),
    "complex input": Bad(batch_norm(x=X.to(torch.complex64)), NotImplementedError, '"batch_norm" not implemented for'),
    "eps of 0 in training": Bad(
        batch_norm(eps=0.0), ValueError, "batch_norm eps must be positive during training, but got 0.0"
    ),
    "negative eps": Bad(batch_norm(eps=-1.0, training=False), ValueError, "batch_norm eps must be non-negative"),
    "1-d input": Bad(batch_norm(x=W), (RuntimeError, ValueError, IndexError)),
    "0-d input": Bad(batch_norm(x=W[0]), (RuntimeError, ValueError, IndexError)),
    "a list": Bad(batch_norm(x=[1.0, 2.0]), (TypeError, AttributeError)),
    "statistics that require a gradient": Bad(batch_norm(W.clone().requires_grad_()), RuntimeError, differentiable),
    "statistics that require a gradient, evaluation": Bad(
        batch_norm(W.clone().requires_grad_(), training=False), RuntimeError, differentiable
    ),
    "sparse input": Bad(batch_norm(x=X.to_sparse()), RuntimeError),
}


def dropout(*args, x=X, **kwargs) -> Call:
    return lambda f: f.dropout(x, *args, **kwargs)


probability = "dropout probability has to be between 0 and 1, but got "
cast = "result type Float can't be cast to the desired output type "
DROPOUT = {
    **{f"p={p}": Bad(dropout(p), ValueError, f"{probability}{p}") for p in (-0.1, 1.1, 2, float("inf"))},
    "p=nan": Bad(dropout(float("nan")), (ValueError, RuntimeError), f"{probability}nan"),
    "p outside in evaluation": Bad(dropout(1.5, False), ValueError, f"{probability}1.5"),
    "p no number": Bad(dropout("half"), TypeError),
    "int32": Bad(dropout(0.5, x=X.int()), RuntimeError, cast + "Int"),
    "int64": Bad(dropout(0.5, x=X.long()), RuntimeError, cast + "Long"),
    "bool": Bad(dropout(0.5, x=X.bool()), RuntimeError, cast + "Bool"),
    "a list": Bad(dropout(0.5, x=[1.0]), TypeError, names="input"),
    "a leaf in place": Bad(
        lambda f: f.dropout(torch.ones(3, requires_grad=True), 0.5, True, True),
        RuntimeError,
        "a leaf Variable that requires grad is being used in an in-place operation.",
    ),
    "expanded in place": Bad(
        dropout(0.5, True, True, x=torch.ones(3, 1).expand(3, 3)),
        RuntimeError,
        "unsupported operation: more than one element of the written-to tensor refers to a single memory location.",
    ),
    "sparse": Bad(dropout(0.5, x=X.to_sparse()), RuntimeError),
    "seed and generator": Bad(
        dropout(0.5, seed=1, generator=torch.Generator()), (ValueError, RuntimeError), names="generator", in_torch=False
    ),
    "seed above int64": Bad(
        dropout(0.5, seed=2**63), (ValueError, RuntimeError, OverflowError), names="seed", in_torch=False
    ),
    "seed below int64": Bad(
        dropout(0.5, seed=-(2**63) - 1), (ValueError, RuntimeError, OverflowError), names="seed", in_torch=False
    ),
    "seed no integer": Bad(dropout(0.5, seed=1.5), TypeError, names="seed", in_torch=False),
    "generator none": Bad(dropout(0.5, generator=3), TypeError, names="generator", in_torch=False),
    "mask's p": Bad(lambda f: f.dropout_mask((3,), 1.5, 1), ValueError, f"{probability}1.5", in_torch=False),
    "mask's seed": Bad(
        lambda f: f.dropout_mask((3,), 0.5, 2**64),
        (ValueError, RuntimeError, OverflowError),
        names="seed",
        in_torch=False,
    ),
    "mask's shape": Bad(lambda f: f.dropout_mask((-3,), 0.5, 1), (ValueError, RuntimeError), in_torch=False),
}


def prefixed(name: str, cases: dict[str, Bad]) -> dict[str, Bad]:
    return {f"{name}: {key}": case for key, case in cases.items()}


TABLE = {
    **norms("layer_norm"),
    **norms("rms_norm"),
    **prefixed("layer_norm", LAYER_NORM),
    **prefixed("batch_norm", BATCH_NORM),
    **prefixed("dropout", DROPOUT),
}
EVERY_CASE = pytest.mark.parametrize("bad", TABLE.values(), ids=TABLE)


def content() -> dict[str, bytes]:
    return {"X": bits(X), "W": bits(W), "generator": bits(torch.get_rng_state())}


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@EVERY_CASE
def test_refused(bad):
    before = content()
    with pytest.raises(bad.error) as caught:
        bad.call(OF)
    message = str(caught.value)
    assert message.startswith(bad.text), f"the message should begin with {bad.text!r}, came: {message}"
    assert bad.names in message, f"the message should name {bad.names!r}, came: {message}"
    assert content() == before, "something was written before the error"


# What older torch accepts, or refuses in other words.
NEWER = {
    "rms_norm: normalized_shape",
    "rms_norm: normalized_shape longer than x",
    "batch_norm: no variance in training",
    "batch_norm: eps of 0 in training",
    "batch_norm: negative eps",
}


def error_of(call: Callable[[], object]) -> Exception | None:
    try:
        call()
    except Exception as error:  # any type: the callers compare them
        return error
    return None


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("key", [key for key, bad in TABLE.items() if bad.in_torch])
def test_torch_refuses_it_too(key):
    bad, matrix = TABLE[key], torch.ones(2, 2, dtype=torch.bool)
    came = error_of(lambda: bad.call(F))
    no_kernel = type(error_of(lambda: matrix @ matrix))  # a RuntimeError in older torch
    same = isinstance(came, no_kernel if bad.error is NotImplementedError else bad.error)
    same &= str(came).startswith(bad.text)
    if key in NEWER and not same:
        pytest.skip("this torch accepts it, or refuses it in other words")
    assert same, f"torch's answer: {came!r}"


# ---- tensors without memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freed", ["x", "weight"])
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "batch_norm", "dropout"])
def test_freed_storage(name, freed):
    """An error, not a crash."""
    tensors = {"x": torch.ones(3, 4), "weight": torch.ones(4)}
    tensors[freed].untyped_storage().resize_(0)
    x, weight = tensors.values()
    if name == "dropout" and freed == "weight":
        pytest.skip("dropout has no weight")
    calls = {
        "layer_norm": lambda: OF.layer_norm(x, (4,), weight),
        "rms_norm": lambda: OF.rms_norm(x, (4,), weight),
        "batch_norm": lambda: OF.batch_norm(x, None, None, weight, training=True),
        "dropout": lambda: OF.dropout(x, seed=1),
    }
    with pytest.raises((RuntimeError, ValueError)):
        calls[name]()


# ---- modules ---------------------------------------------------------------------------------------------------------

MODULES = {
    "Dropout(2.0)": (lambda nn: nn.Dropout(2.0), ValueError, probability + "2.0"),
    "BatchNorm1d of 4-d": (
        lambda nn: nn.BatchNorm1d(4)(torch.ones(2, 4, 2, 2)),
        ValueError,
        "expected 2D or 3D input (got 4D input)",
    ),
    "BatchNorm2d of 3-d": (
        lambda nn: nn.BatchNorm2d(4)(torch.ones(2, 4, 2)),
        ValueError,
        "expected 4D input (got 3D input)",
    ),
    "BatchNorm3d of 4-d": (
        lambda nn: nn.BatchNorm3d(4)(torch.ones(2, 4, 2, 2)),
        ValueError,
        "expected 5D input (got 4D input)",
    ),
    "SyncBatchNorm of 1-d": (
        lambda nn: nn.SyncBatchNorm(4)(torch.ones(4)),
        ValueError,
        "expected at least 2D input (got 1D input)",
    ),
    "BatchNorm2d's channels": (
        lambda nn: nn.BatchNorm2d(4)(torch.ones(2, 3, 2, 2)),
        RuntimeError,
        "running_mean should contain 3 elements not 4",
    ),
    "one value a channel": (lambda nn: nn.BatchNorm1d(4)(torch.ones(1, 4)), ValueError, one_value),
    "LayerNorm's shape": (lambda nn: nn.LayerNorm(5)(torch.ones(3, 4)), RuntimeError, "Given normalized_shape=[5]"),
}


@pytest.mark.parametrize(("call", "error", "text"), MODULES.values(), ids=MODULES)
def test_modules_refuse(call, error, text):
    for nn in (torch.nn, onepass.nn):
        with pytest.raises(error) as caught:
            call(nn)
        assert str(caught.value).startswith(text), f"{nn.__name__}: {caught.value}"


def test_a_refused_batch_is_not_counted():
    bn = onepass.nn.BatchNorm1d(4)
    for x in (torch.ones(1, 4), torch.ones(3, 5), torch.ones(3, 4).int(), torch.ones(2, 4, 2, 2)):
        before = {key: bits(value) for key, value in bn.state_dict().items()}
        with pytest.raises((ValueError, RuntimeError)):
            bn(x)
        assert {key: bits(value) for key, value in bn.state_dict().items()} == before, f"changed by {x.shape} {x.dtype}"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs two kinds of device")
def test_generator_of_another_device():
    for x, generator in ((X, torch.Generator("cuda")), (X.cuda(), torch.Generator())):
        with pytest.raises(
            RuntimeError, match=r"^Expected a '(cpu|cuda)' device type for generator but found '(cpu|cuda)'"
        ):
            OF.dropout(x, generator=generator)
