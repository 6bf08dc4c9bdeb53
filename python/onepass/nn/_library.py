"""Registers torch.library operators, so that torch.compile, dispatch modes and tensor subclasses see our calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _native


def define(
    name: str,
    schema: str,
    check: Callable[..., None],
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., Any] | None = None,
    backward: Callable[..., Any] | None = None,
    *,
    options: Sequence[type[tuple[Any, ...]]] = (),
) -> Any:
    """Register the operator onepass::name and return it as a callable.

    Args:
        schema: "(arguments) -> results". The operator writes to no argument, and no result shares memory with one.
        check: raises for arguments that the kernel cannot take; called before `kernel` and before `fake`.
        kernel: computes the results, for arguments of any strides.
        fake: returns tensors without memory that have the results' shapes, strides and dtypes.
        setup_context, backward: as for torch.library.register_autograd; without them there are no gradients.
        options: NamedTuples whose fields are consecutive arguments of the schema. The functions above, except backward,
            receive one NamedTuple instead of its fields.
    """
    qualified_name = f"onepass::{name}"
    fold = _make_fold(schema, options)

    def checked(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            args = fold(args)
            check(*args)
            return function(*args)

        return call

    torch.library.define(qualified_name, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified_name, "cpu", checked(kernel))
    torch.library.impl(qualified_name, "cuda", checked(kernel) if _native.has_cuda else _refuse_cuda)
    torch.library.register_fake(qualified_name, checked(fake))
    if backward is not None:
        assert setup_context is not None
        torch.library.register_autograd(
            qualified_name, backward, setup_context=lambda ctx, inputs, output: setup_context(ctx, fold(inputs), output)
        )
    return getattr(torch.ops.onepass, name).default


def _make_fold(schema: str, options: Sequence[type[tuple[Any, ...]]]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """A function that replaces the arguments of the schema that are fields of `options` by one NamedTuple each."""
    arguments = [argument.split()[-1] for argument in schema[1 : schema.index(")")].split(",")]
    if not options:
        return lambda args: args
    fields = [list(option.__annotations__) for option in options]
    first = arguments.index(fields[0][0])
    last = first + sum(map(len, fields))
    assert arguments[first:last] == [name for names in fields for name in names], (
        f"{schema}: the fields of {options} are not consecutive arguments"
    )

    def fold(args: tuple[Any, ...]) -> tuple[Any, ...]:
        folded, start = list(args[:first]), first
        for option, names in zip(options, fields, strict=True):
            folded.append(option(*args[start : start + len(names)]))
            start += len(names)
        return *folded, *args[last:]

    return fold


def _refuse_cuda(*args: Any) -> Any:
    device = next(a.device for a in args if isinstance(a, Tensor))
    raise RuntimeError(_native.no_cuda_kernels("The input", device))


def pad_missing(tensors: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, ...]:
    """Replace None by an empty tensor: an operator returns tensors, also for gradients that are not wanted."""
    return tuple(like.new_empty(0) if tensor is None else tensor for tensor in tensors)


def drop_unwanted(tensors: tuple[Tensor | None, ...], want: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """Replace gradients that are not wanted by None."""
    return tuple(tensor if keep else None for tensor, keep in zip(tensors, want, strict=True))
