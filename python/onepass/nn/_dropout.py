"""Dropout by a mask that is a function of (seed, element index) alone. Formulas: docs/layers.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function_unary

from .. import _compat, _native
from .._native import layers as native
from . import _formula
from . import _operator_checks as checks
from ._checks import check_dropout_input, check_in_place, check_p, check_seed, check_tensor
from ._dispatch import FORMULA, KERNEL, OPERATOR, TORCH, plain, route, route_back, seen, wants_grad
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
    the dtype, the strides and the number of threads; backward keeps at most one bit an element.

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
        options: dict[str, Any] = {"p": p, "training": training, "inplace": inplace, "inverted": inverted}
        overridden: Tensor = handle_torch_function(dropout, (input,), input, **options, seed=seed, generator=generator)
        return overridden
    check_tensor("dropout", "input", 1, input)
    p, seed = check_p(p), check_seed(seed, generator)
    if not training and not inverted and p != 0:
        check_dropout_input(input)
        return input.mul_(1 - p) if inplace else input * (1 - p)
    if not training or p == 0:
        return input
    way = route(input)
    if way == TORCH and seed is None and generator is None:
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
    seeded = seed_tensor(seed, generator, input.device)
    if way == OPERATOR and (open_up := opener(input)) is not None:
        y = _on_held(open_up, input, seeded, seed is not None, p, inverted)
        return input.copy_(y) if inplace else y
    return _by_seed(way, input, seeded, p, inverted, inplace)


def _by_seed(way: int, input: Tensor, seeded: Tensor, p: float, inverted: bool, inplace: bool) -> Tensor:
    if way == KERNEL:
        y = _on_kernel(input, seeded, p, inverted, inplace)
    elif way in (FORMULA, TORCH):
        y = _formula.dropout(input, mask_operator(seeded, input.shape, p, False), p, inverted)
    else:
        y = _operator(input.contiguous(), seeded, p, inverted, wants_grad(input) and keeps_mask(input))[0]
    if inplace:
        return y if y is input else input.copy_(y)
    if way in (FORMULA, TORCH) or input.is_contiguous():
        return y
    like = torch.empty_like(input)  # the mask goes by logical order, the result by the input's order in memory
    return y if like.is_contiguous() else like.copy_(y)


def _on_held(
    open_up: Callable[..., Any], input: Tensor, seeded: Tensor, is_given: bool, p: float, inverted: bool
) -> Tensor:
    """dropout of what the input holds; see NOTE: [layers on DTensors] for the masks."""
    y: Tensor
    if is_given and holds_parts(input):
        keep = whole_mask(mask_operator(seeded, input.shape, p, False), input)
        y = open_up(
            "dropout",
            lambda part, keep: _formula.dropout(part, keep, p, inverted),
            {"input": input, "mask": keep},
            {},
            0,
        )
        return y
    seeded = seed_of_part(seeded, input) if holds_parts(input) else seeded
    y = open_up(
        "dropout", lambda held: _by_seed(route(held), held, seeded, p, inverted, False), {"input": input}, {}, 0
    )
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
    seeded = seed_tensor(check_seed(seed, None), None, device)
    if route(seeded) == KERNEL:
        return native.dropout_mask(tuple(shape), p, seeded, packed, seeded.device)
    mask: Tensor = mask_operator(seeded, tuple(shape), p, packed)
    return mask


def seed_tensor(seed: int | None, generator: Generator | None, device: torch.device | str | None) -> Tensor:
    """A 0-d int64 tensor on the device: kernels read it there, nothing waits for it, a captured graph draws anew."""
    if seed is not None:
        return torch.full((), seed, dtype=torch.int64, device=device)
    return torch.randint(0, 2**63 - 1, (), device=device, generator=generator)


def keeps_mask(x: Tensor) -> bool:
    """Whether forward stores its mask for backward: on CPUs reading a bit is 2-3 times faster than computing it anew."""
    return not _native.is_on_cuda(x)


def _on_kernel(input: Tensor, seed: Tensor, p: float, inverted: bool, inplace: bool) -> Tensor:
    x = plain(input)
    # Written directly where nothing can go wrong any more: copy_ knows views, inference tensors and the like.
    direct = inplace and x is input and input._base is None and not input.is_inference()
    if wants_grad(x):
        y: Tensor = _apply(x, seed, p, inverted, direct)
    else:
        y = native.dropout(x, p, seed, inverted, False, x if direct else None)[0]
        if direct:
            _compat.increment_version([x])
    return y


# --- autograd ---------------------------------------------------------------------------------------------------------


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: Tensor, p: float, inverted: bool, inplace: bool) -> Tensor:
        y, mask = native.dropout(x, p, seed, inverted, keeps_mask(x), x if inplace else None)
        if inplace:
            ctx.mark_dirty(x)
            y = x
        _save(ctx, seed, mask, p, inverted)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _gradient(ctx, dy, route_back(dy)), None, None, None, None


_apply = _compat.applier(_Dropout)


def _save(ctx: Any, seed: Tensor, mask: Tensor, p: float, inverted: bool) -> None:
    ctx.save_for_backward(seed, mask)
    ctx.rest = p, inverted


def _gradient(ctx: Any, dy: Tensor, way: int) -> Tensor:
    seed, mask = ctx.saved_tensors
    p, inverted = ctx.rest
    if way == FORMULA:
        return _formula.dropout(dy, mask_operator(seed, dy.shape, p, False), p, inverted)
    if way == KERNEL:
        return native.dropout_backward(plain(dy), p, seed, inverted, mask)
    dx: Tensor = _operator_backward(dy.contiguous(), seed, mask, p, inverted)
    return dx


# --- the operators ----------------------------------------------------------------------------------------------------


def _kernel(x: Tensor, seed: Tensor, p: float, inverted: bool, keep_mask: bool) -> tuple[Tensor, Tensor]:
    return native.dropout(plain(x), p, plain(seed), inverted, keep_mask)


def _fake(x: Tensor, seed: Tensor, p: float, inverted: bool, keep_mask: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), fake_mask(x, keep_mask)


def fake_mask(x: Tensor, keep_mask: bool) -> Tensor:
    return x.new_empty((x.numel() + 7) // 8 if keep_mask else 0, dtype=torch.uint8)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, seed, p, inverted, _ = inputs
    _save(ctx, seed, output[1], p, inverted)


def _kernel_backward(dy: Tensor, seed: Tensor, mask: Tensor, p: float, inverted: bool) -> Tensor:
    return native.dropout_backward(plain(dy), p, plain(seed), inverted, plain(mask))


def _fake_backward(dy: Tensor, seed: Tensor, mask: Tensor, p: float, inverted: bool) -> Tensor:
    return torch.empty_like(dy, memory_format=torch.contiguous_format)


def _kernel_mask(seed: Tensor, shape: Sequence[int], p: float, packed: bool) -> Tensor:
    return native.dropout_mask(tuple(shape), p, plain(seed), packed, seed.device)


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
    lambda ctx, dy, dmask: (_gradient(ctx, dy, seen(route_back(dy))), None, None, None, None),
)
_operator_backward = define(
    "dropout_backward",
    "(Tensor dy, Tensor seed, Tensor mask, float p, bool inverted) -> Tensor",
    checks.dropout_backward,
    _kernel_backward,
    _fake_backward,
)
mask_operator = define(
    "dropout_mask",
    "(Tensor seed, SymInt[] shape, float p, bool packed) -> Tensor",
    checks.dropout_mask,
    _kernel_mask,
    _fake_mask,
)


def _vmap_mask(info: Any, in_dims: tuple[int | None, ...], seeds: Tensor, *rest: Any) -> tuple[Tensor, int]:
    """vmap(randomness="different"): every example has its seed."""
    return torch.stack([mask_operator(seed, *rest) for seed in seeds.unbind(in_dims[0] or 0)]), 0


_compat.register_vmap("onepass::dropout_mask", _vmap_mask)
