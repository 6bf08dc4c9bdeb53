"""What the layers refuse, in torch's exception types and, where torch has a sentence, beginning with it.

Every check is made before memory is touched, a seed is drawn or a counter rises.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ._dispatch import wide

FLOATS = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
_HALF = frozenset((torch.bfloat16, torch.float16))
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
    """What torch's messages call a dtype."""
    return _SCALAR_NAMES.get(dtype) or str(dtype).removeprefix("torch.").capitalize()


def _not_implemented(kernel: str, dtype: torch.dtype) -> NoReturn:
    raise NotImplementedError(
        f"\"{kernel}\" not implemented for '{scalar_name(dtype)}': input has dtype {dtype}; float32, float64, bfloat16 and "
        f"float16 are supported."
    )


def check_tensor(function: str, name: str, position: int, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{function}(): argument '{name}' (position {position}) must be Tensor, not {type(value).__name__}"
        )


def check_device(name: str, tensor: Tensor, input: Tensor) -> None:
    if tensor.device != input.device:
        if "meta" in (tensor.device.type, input.device.type):
            raise RuntimeError(
                f"Tensor on device {tensor.device} is not on the expected device {input.device}! It is the {name}."
            )
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {input.device} and "
            f"{tensor.device}! The second is that of {name}."
        )


def _check_affine_dtypes(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """Weight and bias of one dtype: the input's, or float32 beside 16 bits."""
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        raise RuntimeError(
            f"expected scalar type {scalar_name(weight.dtype)} but found {scalar_name(bias.dtype)}: weight has dtype "
            f"{weight.dtype}, bias {bias.dtype}."
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None or tensor.dtype == input.dtype:
            continue
        if tensor.dtype != torch.float32 or input.dtype not in _HALF:
            raise RuntimeError(
                f"mixed dtype (CPU): expect parameter to have scalar type of Float. {name} has dtype {tensor.dtype} beside "
                f"an input of {input.dtype}; it may have the input's dtype, or float32 if that has 16 bits."
            )


# --- norms over rows --------------------------------------------------------------------------------------------------


def _shown(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def norm_operands(
    function: str,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
) -> tuple[int, Tensor | None, Tensor | None]:
    """Elements in a row, and weight and bias as kernels take them: alike, of a dtype that goes with the input's."""
    if not isinstance(eps, (int, float)) and (eps is not None or function == "layer_norm"):
        raise TypeError(f"{function}(): argument 'eps' must be float, not {type(eps).__name__}")
    if type(normalized_shape) is not tuple:
        if isinstance(normalized_shape, int):
            raise TypeError(
                f"{function}(): argument 'normalized_shape' (position 2) must be tuple of ints, not "
                f"{type(normalized_shape).__name__}"
            )
        normalized_shape = tuple(normalized_shape)
    check_tensor(function, "input", 1, input)
    dtype = input.dtype
    plain = (
        dtype in FLOATS
        and normalized_shape
        and input.shape[-len(normalized_shape) :] == normalized_shape
        and (weight is not None or bias is None)
    )
    for tensor in (weight, bias):
        if tensor is not None and plain:
            plain = tensor.dtype == dtype and tensor.shape == normalized_shape and tensor.device == input.device
    if not plain:
        weight, bias = _settle_norm(function, input, normalized_shape, weight, bias)
    return (normalized_shape[0] if len(normalized_shape) == 1 else math.prod(normalized_shape)), weight, bias


def _settle_norm(
    function: str, input: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    if not shape:
        raise RuntimeError(
            "Expected normalized_shape to be at least 1-dimensional, i.e., containing at least one element, but got "
            "normalized_shape = []"
        )
    for position, (name, tensor) in enumerate((("weight", weight), ("bias", bias)), 3):
        if tensor is None:
            continue
        check_tensor(function, name, position, tensor)
        if tensor.shape != shape and tensor.dim() != 0:
            raise RuntimeError(
                f"Expected {name} to be of same shape as normalized_shape, but got {name} of shape {_shown(tensor.shape)} "
                f"and normalized_shape = {_shown(shape)} (0-d is allowed, too)"
            )
    if function == "rms_norm" and input.dim() < len(shape):
        raise ValueError(f"Input tensor must have at least {len(shape)} dimensions, but got {input.dim()}")
    if input.shape[-len(shape) :] != shape:
        star = "*" if function == "rms_norm" else "*, "
        raise RuntimeError(
            f"Given normalized_shape={_shown(shape)}, expected input with shape [{star}{', '.join(map(str, shape))}], but "
            f"got input of size{_shown(input.shape)}"
        )
    if input.dtype not in FLOATS:
        _not_implemented("rms_norm" if "rms" in function else "LayerNormKernelImpl", input.dtype)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_device(name, tensor, input)
    if function == "rms_norm" and weight is not None:  # takes any
        if not weight.is_floating_point():
            _not_implemented("rms_norm", weight.dtype)
        if weight.dtype != input.dtype and (weight.dtype != torch.float32 or input.dtype not in _HALF):
            weight = weight.to(wide(input.dtype))
    _check_affine_dtypes(input, weight, bias)
    if bias is not None and (weight is None or weight.shape != bias.shape):  # one of them 0-d: both in full
        bias = bias.expand(shape).reshape(-1)
        weight = None if weight is None else weight.expand(shape).reshape(-1)
    return weight, bias


# --- dropout ----------------------------------------------------------------------------------------------------------


def check_p(p: float) -> None:
    if p < 0.0 or p > 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    if p != p:
        raise RuntimeError(f"dropout probability has to be between 0 and 1, but got {p}")


def check_dropout_input(input: Tensor) -> None:
    if input.layout is not torch.strided:
        raise RuntimeError(f"dropout(): argument 'input' has the layout {input.layout}; a dense tensor is expected")
    if input.dtype in FLOATS:
        return
    if input.dtype.is_complex or input.dtype.is_floating_point:
        _not_implemented("bernoulli_scalar_cpu_", input.dtype)
    raise RuntimeError(
        f"result type Float can't be cast to the desired output type {scalar_name(input.dtype)}: input has dtype "
        f"{input.dtype}; dropout needs a floating dtype."
    )


def check_seed(seed: object, generator: object) -> None:
    if seed is not None and generator is not None:
        raise ValueError("seed and generator exclude each other: a seed gives the mask, a generator draws one")
    if seed is None or isinstance(seed, torch.SymInt):
        return
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"dropout(): argument 'seed' must be int, not {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed has to fit into 64 bits with a sign, but got {seed}")


def check_in_place(input: Tensor) -> None:
    """What autograd would refuse only after the kernel has written."""
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


# --- BatchNorm --------------------------------------------------------------------------------------------------------


def batch_norm_operands(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
    momentum: float | Tensor,
    eps: float,
) -> None:
    """Raises for operands that do not go together, in the order in which torch asks."""
    usual = residual is None and type(momentum) is float and eps > 0 and (training or running_mean is not None)
    if usual and _is_usual(input, running_mean, running_var, weight, bias):
        return
    check_tensor("batch_norm", "input", 1, input)
    if training and eps <= 0.0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    if eps < 0.0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")
    if training and (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must either both be None or neither be None")
    if not isinstance(momentum, (int, float, Tensor)):
        raise TypeError(f"batch_norm(): argument 'momentum' (position 7) must be float, not {type(momentum).__name__}")
    if input.dim() < 2:
        if running_mean is not None:
            raise RuntimeError(
                f"running_mean should contain 0 elements not {running_mean.numel()}: input has {input.dim()} dimensions, "
                f"at least [N, C] is expected"
            )
        raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")
    channels = input.shape[1]
    operands = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for position, (name, tensor) in enumerate(operands.items(), 2):
        if tensor is None:
            if not training and name.startswith("running"):
                raise RuntimeError(f"{name} must be defined in evaluation mode")
            continue
        check_tensor("batch_norm", name, position, tensor)
        if tensor.numel() != channels:
            raise RuntimeError(f"{name} should contain {channels} elements not {tensor.numel()}")
        check_device(name, tensor, input)
        if name.startswith("running"):
            _check_statistic(name, tensor, input)
    if input.dtype not in FLOATS:
        _not_implemented("batch_norm", input.dtype)
    _check_affine_dtypes(input, weight, bias)
    if residual is not None:
        check_alike("residual", residual, input)
        if residual.dtype != input.dtype:
            raise RuntimeError(
                f"expected scalar type {scalar_name(input.dtype)} but found {scalar_name(residual.dtype)}: residual and "
                f"input need one dtype."
            )


def _is_usual(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> bool:
    """All of the input's dtype and device, in pairs: nothing to complain about. Saves the questions below 3 us."""
    if not isinstance(input, Tensor) or input.dtype not in FLOATS or input.dim() < 2:
        return False
    dtype, device, shape = input.dtype, input.device, (input.shape[1],)
    for pair in ((running_mean, running_var), (weight, bias)):
        first, second = pair
        if first is None and second is None:
            continue
        if not isinstance(first, Tensor) or not isinstance(second, Tensor):
            return False
        if first.dtype != dtype or second.dtype != dtype or first.device != device or second.device != device:
            return False
        if first.shape != shape or second.shape != shape:
            return False
    return running_mean is None or not (
        running_mean.requires_grad or (running_var is not None and running_var.requires_grad)
    )


def check_batch_size(input: Tensor) -> None:
    """More than one value in a channel; none at all is an empty batch and fine."""
    shape = input.shape
    if len(shape) > 1 and shape[0] * math.prod(shape[2:]) == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape}")


def _check_statistic(name: str, tensor: Tensor, input: Tensor) -> None:
    if not tensor.is_floating_point():
        raise RuntimeError(
            f"expected scalar type {scalar_name(input.dtype)} but found {scalar_name(tensor.dtype)}: {name} has dtype "
            f"{tensor.dtype}; any floating dtype will do."
        )
    if tensor.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"The function 'native_batch_norm' is not differentiable with respect to argument '{name}'. This input cannot "
            f"have requires_grad True."
        )


def check_alike(name: str, tensor: Any, input: Tensor) -> None:
    """The same shape on the same device."""
    check_tensor("forward", name, 2, tensor)
    if tensor.shape != input.shape:
        raise RuntimeError(
            f"Expected {name} to be of same shape as input, but got {name} of shape {_shown(tensor.shape)} and input of "
            f"shape {_shown(input.shape)}"
        )
    check_device(name, tensor, input)
