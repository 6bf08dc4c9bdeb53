"""torch's functions that run on onepass's kernels while a patch is active."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function

from .. import _compat
from .._dtypes import FLOATS
from ..nn import _dispatch
from ..nn import functional as F
from ._attention import dropout_attention

Function = Callable[..., Any]


class patch:
    """Within it, torch's functions run on onepass's kernels, wherever this thread calls them from.

    These are torch.nn.functional's dropout, layer_norm, rms_norm, batch_norm and, on the CPU with dropout_p > 0,
    scaled_dot_product_attention, which torch computes there step by step; and torch.layer_norm, torch.rms_norm. What a kernel
    does not take (another dtype or device, a tensor subclass), and what torch.compile, torch.export, torch.fx and torch.jit
    record, is torch's as before. For a given seed, dropout's mask differs from torch's but has the same distribution.

        with onepass.patch():
            loss = model(batch)
            loss.backward()

    or `patcher = onepass.patch().start()` and `patcher.stop()`, or as a decorator. Backward belongs inside: activation
    checkpointing runs forward again there. Patches nest; other threads and asyncio tasks are not affected; when the last one
    ends, torch's own functions are back. Functions that were imported by name before are not reached.
    """

    def start(self) -> patch:
        """Begin. Every start() needs a stop() in the same thread."""
        _install()
        _depth.set(_depth.get() + 1)
        return self

    def stop(self) -> None:
        """End.

        Raises:
            RuntimeError: no patch is active in this thread.
        """
        if _depth.get() == 0:
            raise RuntimeError("patch.stop(): no patch is active in this thread; start() comes first")
        _depth.set(_depth.get() - 1)
        _uninstall()

    def __enter__(self) -> patch:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __call__(self, function: Function) -> Function:
        """As a decorator: the function runs within a patch. Not for generators and coroutines, which run piece by piece."""
        if inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function):
            raise TypeError(
                f"patch(): {function.__name__} is a generator or coroutine; use `with onepass.patch()` inside it"
            )

        @functools.wraps(function)
        def patched(*args: Any, **kwargs: Any) -> Any:
            with type(self)():
                return function(*args, **kwargs)

        return patched


_depth: ContextVar[int] = ContextVar("patches that are active here", default=0)
_lock = threading.Lock()
_users = 0
_dynamo_was_loaded = False
_originals: list[tuple[Any, str, Function]] = []


def _is_active() -> bool:
    """Whether this thread is within a patch. A thread of autograd, which Python did not start, is within its caller's."""
    return _depth.get() > 0 or isinstance(threading.current_thread(), threading._DummyThread)


def _install() -> None:
    global _users, _dynamo_was_loaded
    with _lock:
        _users += 1
        if _users == 1:
            _dynamo_was_loaded = _compat.build_function_table()
            for namespace, name, ours in _REPLACEMENTS:
                own = getattr(namespace, name, None)
                if own is not None:
                    _originals.append((namespace, name, own))
                    setattr(namespace, name, _wrap(own, ours))


def _uninstall() -> None:
    global _users
    with _lock:
        _users -= 1
        if _users == 0:
            while _originals:
                namespace, name, own = _originals.pop()
                if not inspect.isfunction(own):
                    _compat.forget_stand_in(getattr(namespace, name))
                setattr(namespace, name, own)
            if not _dynamo_was_loaded:
                _compat.forget_function_table()


def _wrap(own: Function, ours: Function) -> Function:
    @functools.wraps(own)
    def function(*args: Any, **kwargs: Any) -> Any:
        if is_compiling():
            return own(*args, **kwargs)
        tensors = (*args, *kwargs.values())
        if is_public and has_torch_function(tensors):  # subclasses, modes and torch.fx see torch's function
            return handle_torch_function(own, tensors, *args, **kwargs)
        return ours(own, *args, **kwargs) if _is_active() else own(*args, **kwargs)

    is_public = inspect.isfunction(own)  # others ask for themselves
    if is_public:  # for torch.jit.script
        function.__prepare_scriptable__ = lambda: own  # type: ignore[attr-defined]
    else:
        _compat.stand_in_for_builtin(function, own)
    return function


def _takes(first: Any, *others: Any) -> bool:
    """Whether the kernels, or inside transforms the formulas, take a call with these tensors; the others may be None."""
    for tensor in (first, *(other for other in others if other is not None)):
        if not isinstance(tensor, Tensor) or tensor.is_nested or tensor.layout is not torch.strided:
            return False
        if tensor.dtype not in FLOATS:
            return False
    return _dispatch.choose_route(first, *others) in (_dispatch.KERNEL, _dispatch.FORMULA)


def _dropout(own: Function, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    return F.dropout(input, p, training, inplace) if _takes(input) else own(input, p, training, inplace)


def _layer_norm(
    own: Function,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *rest: Any,
    **cudnn: Any,
) -> Any:
    if not _takes(input, weight, bias) or torch.is_autocast_enabled(input.device.type):
        return own(input, normalized_shape, weight, bias, eps, *rest, **cudnn)
    return F.layer_norm(input, normalized_shape, weight, bias, eps)


def _rms_norm(
    own: Function, input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Any:
    if not _takes(input, weight) or torch.is_autocast_enabled(input.device.type):
        return own(input, normalized_shape, weight, eps)
    return F.rms_norm(input, normalized_shape, weight, eps)


def _batch_norm(
    own: Function,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    operands = input, running_mean, running_var, weight, bias
    function = F.batch_norm if _takes(*operands) else own
    return function(*operands, training, momentum, eps)


def _attention(
    own: Function,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    options: dict[str, Any] = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    if enable_gqa:
        options["enable_gqa"] = True
    is_mask = attn_mask is not None and attn_mask.dtype is torch.bool
    if not (dropout_p > 0 and _takes(query, key, value, None if is_mask else attn_mask) and query.is_cpu):
        return own(query, key, value, **options)
    return dropout_attention(query, key, value, **options)


_REPLACEMENTS: tuple[tuple[Any, str, Function], ...] = (
    (torch.nn.functional, "dropout", _dropout),
    (torch.nn.functional, "layer_norm", _layer_norm),
    (torch.nn.functional, "rms_norm", _rms_norm),
    (torch.nn.functional, "batch_norm", _batch_norm),
    (torch.nn.functional, "scaled_dot_product_attention", _attention),
    (torch, "layer_norm", _layer_norm),
    (torch, "rms_norm", _rms_norm),
)
