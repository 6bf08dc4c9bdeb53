"""Dropout with a mask that depends on the seed and the element index alone. Formulas: docs/layers.md."""

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
from ._sharding import holds_parts, opener, seed_of_part, whole_mask


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
    """Zero each element with probability p, multiply the others by 1 / (1 - p); torch.nn.functional.dropout.

    Sources: Srivastava et al. 2014; masks by Philox4x32-10, Salmon et al. 2011. One seed is one mask, whatever the device,
    the dtype, the strides and the number of threads; for backward at most one bit per element is kept.

    Args:
        input: any shape and strides, float32, float64, bfloat16 or float16.
        p: probability of dropping, in [0, 1].
        training: False returns the input itself.
        inplace: write into input.
        seed: gives the mask and touches no generator. None: drawn from `generator`, or from torch's for the device.
        generator: of the input's device. Excludes seed.
        inverted: False is the paper's form, nothing is scaled in training and (1 - p) * input is returned otherwise.

    Returns:
        A tensor like input. A dropped infinity or NaN is 0 (torch makes it NaN).

    Raises:
        ValueError: p outside of [0, 1]; seed and generator both given; a seed of more than 64 bits.
        RuntimeError: an integer input; a generator of another device; in place on a leaf that requires grad.
    """
    if has_torch_function_unary(input):
        arguments: dict[str, Any] = {"p": p, "training": training, "inplace": inplace, "inverted": inverted}
        arguments |= {"seed": seed, "generator": generator}
        overridden: Tensor = handle_torch_function(dropout, (input,), input, **arguments)
        return overridden
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
    if _compat.jit_tracing() is not None:
        raise RuntimeError(
            "torch.jit.trace cannot record a dropout with a seed or a generator: the mask would be that of this shape and "
            "this call for ever. Trace it without them, or use torch.export, which takes a seed."
        )
    if input.numel() == 0:
        return input
    check_dropout_input(input)
    if inplace and not is_compiling():
        check_in_place(input)
    options = DropoutOptions(seed_tensor(seed, generator, input.device), p, inverted)
    if route == OPERATOR and (open_up := opener(input)) is not None:
        y = _on_held(open_up, input, options, seed is not None)
        return input.copy_(y) if inplace else y
    return _by_route(route, input, options, inplace)


def _by_route(route: int, input: Tensor, options: DropoutOptions, inplace: bool) -> Tensor:
    if route == KERNEL:
        y = _on_kernel(input, options, inplace)
    elif route in (FORMULA, TORCH):
        y = by_formula(input, options)
    else:
        y = _operator(input.contiguous(), *options, wants_grad(input) and keeps_mask(input))[0]
    if inplace:
        return y if y is input else input.copy_(y)
    if route in (FORMULA, TORCH) or input.is_contiguous():
        return y
    like = torch.empty_like(input)  # the mask follows the logical order, the result has the input's order in memory
    return y if like.is_contiguous() else like.copy_(y)


def by_formula(x: Tensor, options: DropoutOptions) -> Tensor:
    """Dropout in torch operations. It is linear: also the gradient of its input, for x its gradient of the result."""
    seed, p, inverted = options
    return _formula.dropout(x, mask_operator(seed, x.shape, p, False), p, inverted)


def _on_held(open_up: Callable[..., Any], input: Tensor, options: DropoutOptions, is_seeded: bool) -> Tensor:
    """dropout of what the input holds; for the masks see NOTE: [layers on DTensors]."""
    y: Tensor
    seed, p, inverted = options
    assert seed is not None
    if is_seeded and holds_parts(input):
        keep = whole_mask(mask_operator(seed, input.shape, p, False), input)
        inputs = {"input": input, "mask": keep}
        y = open_up("dropout", lambda part, keep: _formula.dropout(part, keep, p, inverted), inputs, {}, 0)
        return y
    if holds_parts(input):
        options = options._replace(seed=seed_of_part(seed, input))
    y = open_up("dropout", lambda held: _by_route(choose_route(held), held, options, False), {"input": input}, {}, 0)
    return y


def dropout_mask(
    shape: Sequence[int], p: float, seed: int, *, packed: bool = False, device: torch.device | str | None = None
) -> Tensor:
    """The mask that dropout(x, p, seed=seed) uses for an x of this shape.

    Returns:
        A bool tensor of `shape`, True where an element is kept; or `packed`, uint8 of [(n + 7) // 8]: bit i % 8 of byte
        i // 8 is element i in row-major order, the last byte is padded with zeros.

    Raises: ValueError, TypeError as dropout.
    """
    p = check_p(p)
    drawn = seed_tensor(check_seed(seed, None), None, device)
    if choose_route(drawn) == KERNEL:
        return native.dropout_mask(tuple(shape), DropoutOptions(drawn, p, True), packed)
    mask: Tensor = mask_operator(drawn, tuple(shape), p, packed)
    return mask


def seed_tensor(seed: int | None, generator: Generator | None, device: torch.device | str | None) -> Tensor:
    """A 0-d int64 tensor on the device, where kernels read it: nothing synchronises, and each replay of a graph draws one."""
    if seed is not None:
        return torch.full((), seed, dtype=torch.int64, device=device)
    return torch.randint(0, 2**63 - 1, (), device=device, generator=generator)


def keeps_mask(x: Tensor) -> bool:
    """Whether forward stores its mask for backward: on CPUs reading a bit is 2 to 3 times faster than recomputing it."""
    return not _native.is_on_cuda(x)


def _on_kernel(input: Tensor, options: DropoutOptions, inplace: bool) -> Tensor:
    x = for_kernel(input)
    # Views, inference tensors and the like are left to copy_, which knows them.
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


_apply = _compat.applier(_Dropout)


def save_dropout(ctx: Any, options: DropoutOptions, *tensors: Tensor | None) -> None:
    """Save tensors and the options for backward. The seed is a tensor, too: hooks of saved tensors have to see it."""
    seed, *ctx.dropout = options
    ctx.save_for_backward(*tensors, seed)


def saved_dropout(ctx: Any) -> tuple[list[Any], DropoutOptions]:
    """What save_dropout saved."""
    *tensors, seed = ctx.saved_tensors
    return tensors, DropoutOptions(seed, *ctx.dropout)


def _gradient(ctx: Any, dy: Tensor, route: int) -> Tensor:
    (mask,), options = saved_dropout(ctx)
    if route == FORMULA:
        return by_formula(dy, options)
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
    """vmap(randomness="different"): each example has its own seed."""
    return torch.stack([mask_operator(seed, *rest) for seed in seeds.unbind(in_dims[0] or 0)]), 0


_compat.register_vmap("onepass::dropout_mask", _vmap_mask)
