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
    """Register onepass::name and return it, callable.

    Args:
        schema: "(arguments) -> results". The operator writes to no argument, and no result shares memory with one.
        check: raises for arguments that the kernel cannot take; called before `kernel` and before `fake`.
        kernel: computes the results, whatever the strides of its arguments.
        fake: the results' shapes, strides and dtypes, as tensors without memory.
        setup_context, backward: as for torch.library.register_autograd; without them there are no gradients.
        options: NamedTuples whose fields stand one after another in the schema. The functions above, except backward,
            receive one value instead of the fields.
    """
    full = f"onepass::{name}"
    fold = _folding(schema, options)

    def checked(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            args = fold(args)
            check(*args)
            return function(*args)

        return call

    torch.library.define(full, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(full, "cpu", checked(kernel))
    torch.library.impl(full, "cuda", checked(kernel) if _native.has_cuda else _refuse_cuda)
    torch.library.register_fake(full, checked(fake))
    if backward is not None:
        assert setup_context is not None
        torch.library.register_autograd(
            full, backward, setup_context=lambda ctx, inputs, output: setup_context(ctx, fold(inputs), output)
        )
    return getattr(torch.ops.onepass, name).default


def _folding(schema: str, options: Sequence[type[tuple[Any, ...]]]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    arguments = [argument.split()[-1] for argument in schema[1 : schema.index(")")].split(",")]
    if not options:
        return lambda args: args
    fields = [list(option.__annotations__) for option in options]
    first = arguments.index(fields[0][0])
    last = first + sum(map(len, fields))
    assert arguments[first:last] == [name for names in fields for name in names], (
        f"{schema}: the fields of {options} do not stand in a row"
    )

    def fold(args: tuple[Any, ...]) -> tuple[Any, ...]:
        folded, at = list(args[:first]), first
        for option, names in zip(options, fields, strict=True):
            folded.append(option(*args[at : at + len(names)]))
            at += len(names)
        return *folded, *args[at:]

    return fold


def _refuse_cuda(*args: Any) -> Any:
    device = next(a.device for a in args if isinstance(a, Tensor))
    raise RuntimeError(
        f"The input is on {device}, but this build of onepass has no CUDA kernels. Install it where nvcc >= 12.1 is "
        f"found: pip install --force-reinstall --no-binary onepass -C cmake.define.ONEPASS_CUDA=ON onepass"
    )


def pad_missing(tensors: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, ...]:
    """An operator returns tensors, never None: empty ones stand for gradients that were not wanted."""
    return tuple(like.new_empty(0) if tensor is None else tensor for tensor in tensors)


def drop_unwanted(tensors: tuple[Tensor | None, ...], want: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """None for gradients that were not wanted."""
    return tuple(tensor if wanted else None for tensor, wanted in zip(tensors, want, strict=True))
