"""Registers operators with torch.library, for everyone who looks at tensors by their operators: compilers, modes, subclasses."""

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
) -> Any:
    """Register onepass::name and return it, callable.

    Args:
        schema: "(arguments) -> results". No argument is written to, no result shares memory with one.
        check: raises for arguments that the kernel cannot take; called with them before `kernel` and before `fake`.
        kernel: computes it, whatever the strides of its arguments.
        fake: the results' shapes, strides and dtypes, by tensors without memory.
        setup_context, backward: as torch.library.register_autograd has them; without: no gradients.
    """
    full = f"onepass::{name}"
    torch.library.define(full, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(full, "cpu", _checked(check, kernel))
    torch.library.impl(full, "cuda", _checked(check, kernel) if _native.has_cuda else _refuse_cuda)
    torch.library.register_fake(full, _checked(check, fake))
    if backward is not None:
        torch.library.register_autograd(full, backward, setup_context=setup_context)
    return getattr(torch.ops.onepass, name).default


def _checked(check: Callable[..., None], function: Callable[..., Any]) -> Callable[..., Any]:
    def checked(*args: Any) -> Any:
        check(*args)
        return function(*args)

    return checked


def _refuse_cuda(*args: Any) -> Any:
    device = next(a.device for a in args if isinstance(a, Tensor))
    raise RuntimeError(
        f"The input is on {device}, but this build of onepass has no CUDA kernels. Install it where nvcc >= 12.1 is "
        f"found: pip install --force-reinstall --no-binary onepass -C cmake.define.ONEPASS_CUDA=ON onepass"
    )


def given(tensors: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, ...]:
    """An operator returns tensors, never None: an empty one in the place of what was not wanted."""
    return tuple(like.new_empty(0) if tensor is None else tensor for tensor in tensors)


def wanted(tensors: tuple[Tensor | None, ...], want: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The way back: None for what was not wanted."""
    return tuple(tensor if asked else None for tensor, asked in zip(tensors, want, strict=True))
