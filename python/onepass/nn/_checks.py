"""The checks of the layers' arguments, with torch's exception types. Where torch has a message, ours begins with it.

All checks precede the first write to memory, the drawing of a seed and the counting of a batch.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from .._dtypes import FLOATS, SIXTEEN_BITS, compute_dtype
from ._nested import refuse_nested

_FLOAT_EPS, _DOUBLE_EPS = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
_SCALAR_NAMES = {
    torch.float32: "Float",
    torch.float64: "Double",
    torch.bfloat16: "BFloat16",
    torch.float16: "Half",
    torch.int64: "Long",
    torch.int32: "Int",
    torch.int16: "Short",
    torch.int8: "Char",
    torch.uint8: "Byte",
    torch.bool: "Bool",
    torch.complex64: "ComplexFloat",
    torch.complex128: "ComplexDouble",
    torch.complex32: "ComplexHalf",
}


def scalar_name(dtype: torch.dtype) -> str:
    """The name of a dtype in torch's messages."""
    return _SCALAR_NAMES.get(dtype) or str(dtype).removeprefix("torch.").capitalize()


def not_implemented(kernel: str, dtype: torch.dtype) -> NoReturn:
    is_quantized = str(dtype).startswith(("torch.qint", "torch.quint"))
    hint = " Quantization needs torch's layers: onepass.restore(model) brings them back." if is_quantized else ""
    raise NotImplementedError(
        f"\"{kernel}\" not implemented for '{scalar_name(dtype)}': input has dtype {dtype}; float32, float64, bfloat16 and "
        f"float16 are supported.{hint}"
    )


def _format_shape(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def check_tensor(function: str, name: str, position: int, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{function}(): argument '{name}' (position {position}) must be Tensor, not {type(value).__name__}"
        )
    if value.is_nested and value.layout is torch.strided:
        refuse_nested(function, name)


def as_float(function: str, name: str, position: int, value: object) -> float:
    """`value` as a float, from what torch accepts: Python and numpy numbers, and 0-d tensors that need no gradient."""
    if isinstance(value, (float, torch.SymFloat)):
        return cast(float, value)
    if isinstance(value, numbers.Real) or (
        isinstance(value, Tensor) and value.dim() == 0 and not value.requires_grad and not value.is_complex()
    ):
        return float(value)
    raise TypeError(f"{function}(): argument '{name}' (position {position}) must be float, not {type(value).__name__}")


def check_device(name: str, tensor: Tensor, input: Tensor) -> None:
    if tensor.device != input.device:
        if "meta" in (tensor.device.type, input.device.type):
            raise RuntimeError(
                f"Tensor on device {tensor.device} is not on the expected device {input.device}! It is the {name}."
            )
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {input.device} and "
            f"{tensor.device}! The second is the device of {name}."
        )


def check_affine_dtypes(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """Weight and bias must share a dtype: the input's, or float32 with a 16-bit input."""
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        raise RuntimeError(
            f"expected scalar type {scalar_name(weight.dtype)} but found {scalar_name(bias.dtype)}: weight has dtype "
            f"{weight.dtype}, bias {bias.dtype}."
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None or tensor.dtype == input.dtype:
            continue
        if tensor.dtype != torch.float32 or input.dtype not in SIXTEEN_BITS:
            raise RuntimeError(
                f"mixed dtype (CPU): expect parameter to have scalar type of Float. {name} has dtype {tensor.dtype} with "
                f"an input of {input.dtype}; it must have the input's dtype, or float32 with a 16-bit input."
            )


def check_alike(name: str, tensor: Any, input: Tensor) -> None:
    """The tensor must have the input's shape and device."""
    check_tensor("forward", name, 2, tensor)
    if tensor.shape != input.shape:
        raise RuntimeError(
            f"Expected {name} to be of same shape as input, but got {name} of shape {_format_shape(tensor.shape)} and input of "
            f"shape {_format_shape(input.shape)}"
        )
    check_device(name, tensor, input)


# --- norms over rows --------------------------------------------------------------------------------------------------


def default_eps(input: Tensor) -> float:
    """RMSNorm's default eps: the machine epsilon of the compute dtype."""
    return _DOUBLE_EPS if input.dtype is torch.float64 else _FLOAT_EPS


def check_norm_operands(
    function: str,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
) -> tuple[int, Tensor | None, Tensor | None, float]:
    """(elements per row, weight, bias, eps) as kernels need them: weight and bias of one shape, or a bias [size] alone.

    Raises for operands that do not fit together, checking in torch's order.
    """
    check_tensor(function, "input", 1, input)
    if type(normalized_shape) is not tuple:
        if isinstance(normalized_shape, str) or not isinstance(normalized_shape, Sequence):
            raise TypeError(
                f"{function}(): argument 'normalized_shape' (position 2) must be tuple of ints, not "
                f"{type(normalized_shape).__name__}"
            )
        normalized_shape = tuple(normalized_shape)
    for position, (name, tensor) in enumerate((("weight", weight), ("bias", bias)), 3):
        if tensor is not None:
            check_tensor(function, name, position, tensor)
    if eps is None and function == "rms_norm":
        eps = default_eps(input)
    elif type(eps) is not float:
        eps = as_float(function, "eps", 4 if function == "rms_norm" else 5, eps)
    dtype = input.dtype
    is_usual = (
        dtype in FLOATS
        and normalized_shape
        and input.shape[-len(normalized_shape) :] == normalized_shape
        and (weight is not None or bias is None)
    )
    for tensor in (weight, bias):
        if tensor is not None and is_usual:
            is_usual = tensor.dtype == dtype and tensor.shape == normalized_shape and tensor.device == input.device
    if not is_usual:
        weight, bias = _check_norm(function, input, normalized_shape, weight, bias)
    size = normalized_shape[0] if len(normalized_shape) == 1 else math.prod(normalized_shape)
    if type(size) is not int:
        _check_shape_elements(function, normalized_shape)
    return size, weight, bias, eps


def _check_shape_elements(function: str, shape: tuple[Any, ...]) -> None:
    for position, size in enumerate(shape):
        if not hasattr(size, "__index__"):
            raise TypeError(
                f"{function}(): argument 'normalized_shape' (position 2) must be tuple of ints, but found element of type "
                f"{type(size).__name__} at pos {position}"
            )


def _check_norm(
    function: str, input: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """All checks of a norm's operands. Returns weight and bias, converted and expanded as kernels need them."""
    _check_shape_elements(function, shape)
    if not shape:
        raise RuntimeError(
            "Expected normalized_shape to be at least 1-dimensional, i.e., containing at least one element, but got "
            "normalized_shape = []"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.shape != shape and tensor.dim() != 0:
            raise RuntimeError(
                f"Expected {name} to be of same shape as normalized_shape, but got {name} of shape {_format_shape(tensor.shape)} "
                f"and normalized_shape = {_format_shape(shape)} (0-d is allowed, too)"
            )
    if function == "rms_norm" and input.dim() < len(shape):
        raise ValueError(f"Input tensor must have at least {len(shape)} dimensions, but got {input.dim()}")
    if input.shape[-len(shape) :] != shape:
        star = "*" if function == "rms_norm" else "*, "
        raise RuntimeError(
            f"Given normalized_shape={_format_shape(shape)}, expected input with shape [{star}{', '.join(map(str, shape))}], but "
            f"got input of size{_format_shape(input.shape)}"
        )
    if input.dtype not in FLOATS:
        not_implemented("rms_norm" if "rms" in function else "LayerNormKernelImpl", input.dtype)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_device(name, tensor, input)
    if function == "rms_norm" and weight is not None:  # of any floating dtype
        if not weight.is_floating_point():
            not_implemented("rms_norm", weight.dtype)
        if weight.dtype != input.dtype and (weight.dtype != torch.float32 or input.dtype not in SIXTEEN_BITS):
            weight = weight.to(compute_dtype(input.dtype))
    check_affine_dtypes(input, weight, bias)
    if bias is not None and (weight is None or weight.shape != bias.shape):  # one of them is 0-d: expand both
        bias = bias.expand(shape).contiguous() if weight is not None else bias.expand(shape).reshape(-1)
        weight = None if weight is None else weight.expand(shape).contiguous()
    return weight, bias


# --- dropout ----------------------------------------------------------------------------------------------------------


def check_p(p: float) -> float:
    if type(p) is not float:
        p = as_float("dropout", "p", 2, p)
    if p < 0.0 or p > 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    if p != p:
        raise RuntimeError(f"dropout probability has to be between 0 and 1, but got {p}")
    return p


def check_dropout_input(input: Tensor) -> None:
    if input.layout is not torch.strided and not input.is_nested:
        raise RuntimeError(f"dropout(): argument 'input' has the layout {input.layout}; a dense tensor is expected")
    if input.dtype in FLOATS:
        return
    if input.dtype.is_complex or input.dtype.is_floating_point:
        not_implemented("bernoulli_scalar_cpu_", input.dtype)
    raise RuntimeError(
        f"result type Float can't be cast to the desired output type {scalar_name(input.dtype)}: input has dtype "
        f"{input.dtype}; dropout needs a floating dtype."
    )


def check_seed(seed: Any, generator: object) -> int | None:
    """The seed as a Python int, also from a numpy integer; None to draw one."""
    if seed is not None and generator is not None:
        raise ValueError("seed and generator exclude each other: a seed determines the mask, a generator draws a seed")
    if seed is None or isinstance(seed, torch.SymInt):
        return cast("int | None", seed)
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
        raise TypeError(f"dropout(): argument 'seed' must be int, not {type(seed).__name__}")
    value = operator.index(seed)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"seed has to fit into a signed 64-bit integer, but got {value}")
    return value


def check_in_place(input: Tensor) -> None:
    """Raise, before the kernel writes, for what autograd would refuse only afterwards."""
    if input.requires_grad and input.is_leaf and torch.is_grad_enabled():
        raise RuntimeError("a leaf Variable that requires grad is being used in an in-place operation.")
    if any(stride == 0 and size > 1 for stride, size in zip(input.stride(), input.shape, strict=True)):
        raise RuntimeError(
            "unsupported operation: more than one element of the written-to tensor refers to a single memory location. "
            "Please clone() the tensor before performing the operation."
        )
    if input.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            "Inplace update to inference tensor outside InferenceMode is not allowed. You can make a clone to get a normal "
            "tensor before doing inplace update."
        )
