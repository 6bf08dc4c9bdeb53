"""Dropout with a mask that depends on nothing but the seed and the element index. Formulas: docs/layers.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function_unary

from .. import _compat, _native
from .._native import layers as native
from .._native.layers import DropoutOptions
from . import _formula
from . import _operator_checks as checks
from ._checks import check_dropout_input, check_in_place, check_p, check_seed, check_tensor
from ._dispatch import (
    FORMULA,
    KERNEL,
    OPERATOR,
    TORCH,
    choose_backward_route,
    choose_route,
    for_kernel,
    for_kernel_or_none,
    never_kernel,
    wants_grad,
)
from ._library import define
from ._sharding import find_unwrapper, has_dtensor, local_seed, replicate_tensor


def dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    seed: int | None = None,
    generator: Generator | None = None,
    inverted: bool = True,
) -> Tensor:
    """Zero each element with probability p and multiply the others by 1 / (1 - p), as torch.nn.functional.dropout.

    Sources: Srivastava et al. 2014; masks by Philox4x32-10, Salmon et al. 2011. A seed always gives the same mask,
    whatever the device, the dtype, the strides and the number of threads. Backward needs at most one bit per element.

    Args:
        input: any shape and strides, float32, float64, bfloat16 or float16.
        p: probability of dropping, in [0, 1].
        training: False returns the input itself.
        inplace: write into input.
        seed: determines the mask; no generator is used. None draws one from `generator` or torch's for the device.
        generator: on the input's device; excludes seed.
        inverted: False is the paper's form: no scaling in training, (1 - p) * input otherwise.

    Returns:
        A tensor of the input's shape, dtype and memory format. A dropped infinity or NaN becomes 0 (in torch NaN).

    Raises:
        ValueError: p outside [0, 1]; both seed and generator; a seed of more than 64 bits.
        RuntimeError: an integer input; a generator of another device; in place on a leaf that requires grad.
        NotImplementedError, TypeError: another floating or complex dtype; an argument of a wrong type.
    """
    y: Tensor
    if has_torch_function_unary(input):
        options: dict[str, Any] = {"p": p, "training": training, "inplace": inplace, "inverted": inverted}
        y = handle_torch_function(dropout, (input,), input, **options, seed=seed, generator=generator)
        return y
    check_tensor("dropout", "input", 1, input)
    p, seed = check_p(p), check_seed(seed, generator)
    if not training and not inverted and p != 0:
        check_dropout_input(input)
        return input.mul_(1 - p) if inplace else input * (1 - p)
    if not training or p == 0:
        return input
    route = choose_route(input)
    if route == TORCH and seed is None and generator is None:
        return _formula.dropout_by_torch(input, p, inverted, inplace)
    _check_not_jit_tracing()
    if input.numel() == 0:
        return input
    check_dropout_input(input)
    if inplace and not is_compiling():
        check_in_place(input)
    drop = DropoutOptions(seed_tensor(seed, generator, input.device), p, inverted)
    if route == OPERATOR and (call_unwrapped := find_unwrapper(input)) is not None:
        y = _run_unwrapped(call_unwrapped, input, drop, seed is not None)
        return input.copy_(y) if inplace else y
    return _run_route(route, input, drop, inplace)


def _check_not_jit_tracing() -> None:
    if _compat.jit_tracing() is not None:
        raise RuntimeError(
            "torch.jit.trace cannot record a dropout with a seed or a generator: every later call would reuse the mask of "
            "this call and shape. Trace it without them, or use torch.export, which takes a seed."
        )


def _run_route(route: int, input: Tensor, options: DropoutOptions, inplace: bool) -> Tensor:
    if route == KERNEL:
        y = _run_kernel(input, options, inplace)
    elif route in (FORMULA, TORCH):
        y = run_formula(input, options)
    else:
        y = _operator(input.contiguous(), *options, wants_grad(input) and keeps_mask(input))[0]
    if inplace:
        return y if y is input else input.copy_(y)
    if route in (FORMULA, TORCH) or input.is_contiguous():
        return y
    like = torch.empty_like(input)  # the mask goes by logical order; the result keeps the input's memory format
    return y if like.is_contiguous() else like.copy_(y)


def run_formula(x: Tensor, options: DropoutOptions) -> Tensor:
    """Dropout in torch operations. It is linear, so that with dy instead of x it gives the gradient of x."""
    seed, p, inverted = options
    return _formula.dropout(x, mask_operator(seed, x.shape, p, False), p, inverted)


def _run_unwrapped(
    call_unwrapped: Callable[..., Any], input: Tensor, options: DropoutOptions, is_seeded: bool
) -> Tensor:
    """Dropout on a DTensor's local tensor or a nested tensor's values; for the masks see NOTE: [layers on DTensors]."""
    y: Tensor
    seed, p, inverted = options
    assert seed is not None
    if is_seeded and has_dtensor(input):
        inputs = {"input": input, "mask": replicate_tensor(mask_operator(seed, input.shape, p, False), input)}
        y = call_unwrapped("dropout", lambda local, keep: _formula.dropout(local, keep, p, inverted), inputs, {}, 0)
        return y
    if has_dtensor(input):
        options = options._replace(seed=local_seed(seed, input))

    def run(unwrapped: Tensor) -> Tensor:
        return _run_route(choose_route(unwrapped), unwrapped, options, False)

    y = call_unwrapped("dropout", run, {"input": input}, {}, 0)
    return y


def dropout_mask(
    shape: Sequence[int], p: float, seed: int, *, packed: bool = False, device: torch.device | str | None = None
) -> Tensor:
    """The mask that dropout(x, p, seed=seed) uses for an x of this shape.

    Returns:
        A bool tensor of `shape`, True where an element is kept. If `packed`, uint8 [(n + 7) // 8] for n elements: bit
        i % 8 of byte i // 8 is element i in row-major order, and the last byte is padded with zeros.

    Raises: ValueError and TypeError as dropout.
    """
    p = check_p(p)
    drawn = seed_tensor(check_seed(seed, None), None, device)
    if choose_route(drawn) == KERNEL:
        return native.dropout_mask(tuple(shape), DropoutOptions(drawn, p, True), packed)
    mask: Tensor = mask_operator(drawn, tuple(shape), p, packed)
    return mask


def seed_tensor(seed: int | None, generator: Generator | None, device: torch.device | str | None) -> Tensor:
    """The seed as 0-d int64 on the device: kernels read it without synchronisation, and each replay of a CUDA graph
    draws a new one."""
    if seed is not None:
        return torch.full((), seed, dtype=torch.int64, device=device)
    return torch.randint(0, 2**63 - 1, (), device=device, generator=generator)


def keeps_mask(x: Tensor) -> bool:
    """Whether forward stores its mask for backward. On CPUs reading a bit is 2 to 3 times as fast as recomputing it."""
    return not _native.is_on_cuda(x)


def _run_kernel(input: Tensor, options: DropoutOptions, inplace: bool) -> Tensor:
    x = for_kernel(input)
    # copy_ handles views and inference tensors.
    direct = inplace and x is input and input._base is None and not input.is_inference()
    if wants_grad(x):
        y: Tensor = _apply(x, options, direct)
    else:
        y = native.dropout(x, options, False, x if direct else None)[0]
        if direct:
            _compat.increment_version([x])
    return y


# --- autograd ---------------------------------------------------------------------------------------------------------


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, options: DropoutOptions, inplace: bool) -> Tensor:
        y, mask = native.dropout(x, options, keeps_mask(x), x if inplace else None)
        if inplace:
            ctx.mark_dirty(x)
            y = x
        save_dropout(ctx, options, mask)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _gradient(ctx, dy, choose_backward_route(dy)), None, None


_apply = _compat.fast_apply(_Dropout)


def save_dropout(ctx: Any, options: DropoutOptions, *tensors: Tensor | None) -> None:
    """Save tensors and options for backward. The seed is saved as a tensor, too: saved-tensor hooks have to see it."""
    seed, *ctx.dropout = options
    ctx.save_for_backward(*tensors, seed)


def saved_dropout(ctx: Any) -> tuple[list[Any], DropoutOptions]:
    """The tensors and options that save_dropout saved."""
    *tensors, seed = ctx.saved_tensors
    return tensors, DropoutOptions(seed, *ctx.dropout)


def _gradient(ctx: Any, dy: Tensor, route: int) -> Tensor:
    (mask,), options = saved_dropout(ctx)
    if route == FORMULA:
        return run_formula(dy, options)
    if route == KERNEL:
        return native.dropout_backward(for_kernel(dy), options, mask)
    dx: Tensor = _operator_backward(dy.contiguous(), *options, mask)
    return dx


# --- the operators ----------------------------------------------------------------------------------------------------


def options_for_kernel(options: DropoutOptions) -> DropoutOptions:
    return options._replace(seed=for_kernel_or_none(options.seed))


def _kernel(x: Tensor, options: DropoutOptions, keep_mask: bool) -> tuple[Tensor, Tensor]:
    return native.dropout(for_kernel(x), options_for_kernel(options), keep_mask)


def _fake(x: Tensor, options: DropoutOptions, keep_mask: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), fake_mask(x, keep_mask)


def fake_mask(x: Tensor, keep_mask: bool) -> Tensor:
    return x.new_empty((x.numel() + 7) // 8 if keep_mask else 0, dtype=torch.uint8)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    save_dropout(ctx, inputs[1], output[1])


def _kernel_backward(dy: Tensor, options: DropoutOptions, mask: Tensor) -> Tensor:
    return native.dropout_backward(for_kernel(dy), options_for_kernel(options), for_kernel(mask))


def _fake_backward(dy: Tensor, options: DropoutOptions, mask: Tensor) -> Tensor:
    return torch.empty_like(dy, memory_format=torch.contiguous_format)


def _kernel_mask(seed: Tensor, shape: Sequence[int], p: float, packed: bool) -> Tensor:
    return native.dropout_mask(tuple(shape), DropoutOptions(for_kernel(seed), p, True), packed)


def _fake_mask(seed: Tensor, shape: Sequence[int], p: float, packed: bool) -> Tensor:
    mask = seed.new_empty(shape, dtype=torch.bool)
    return seed.new_empty((mask.numel() + 7) // 8, dtype=torch.uint8) if packed else mask


_operator = define(
    "dropout",
    "(Tensor x, Tensor seed, float p, bool inverted, bool keep_mask) -> (Tensor y, Tensor mask)",
    checks.dropout,
    _kernel,
    _fake,
    _setup_context,
    lambda ctx, dy, dmask: (_gradient(ctx, dy, never_kernel(choose_backward_route(dy))), None, None, None, None),
    options=[DropoutOptions],
)
_operator_backward = define(
    "dropout_backward",
    "(Tensor dy, Tensor seed, float p, bool inverted, Tensor mask) -> Tensor",
    checks.dropout_backward,
    _kernel_backward,
    _fake_backward,
    options=[DropoutOptions],
)
mask_operator = define(
    "dropout_mask",
    "(Tensor seed, SymInt[] shape, float p, bool packed) -> Tensor",
    checks.dropout_mask,
    _kernel_mask,
    _fake_mask,
)


def _vmap_mask(info: Any, in_dims: tuple[int | None, ...], seeds: Tensor, *rest: Any) -> tuple[Tensor, int]:
    """vmap(randomness="different"): one seed per example."""
    return torch.stack([mask_operator(seed, *rest) for seed in seeds.unbind(in_dims[0] or 0)]), 0


_compat.register_vmap("onepass::dropout_mask", _vmap_mask)
