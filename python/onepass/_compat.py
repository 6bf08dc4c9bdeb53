"""Every private or version-dependent API of torch that onepass uses, each with a fallback for other versions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.modules import module as _every_module

F = TypeVar("F", bound=Callable[..., Any])


def disable_dynamo(function: F) -> F:
    """Keep torch.compile out of a function: a graph break rather than a trace into raw pointers."""
    from torch._compile import _disable_dynamo

    wrapped: Any = _disable_dynamo(function)
    return cast(F, wrapped)


def exchange_api() -> object:
    """DLPack's C interface to torch tensors (torch >= 2.10) as a capsule, or None. It reads a tensor in 20 ns."""
    return getattr(Tensor, "__dlpack_c_exchange_api__", None)


# DLPack's type code * 256 + bits per element.
_TYPE_CODES = {
    torch.float32: 2 * 256 + 32,
    torch.float64: 2 * 256 + 64,
    torch.float16: 2 * 256 + 16,
    torch.bfloat16: 4 * 256 + 16,
    torch.int64: 64,
    torch.int16: 16,
    torch.int8: 8,
    torch.uint8: 256 + 8,
}
_DEVICE_CODES = {"cpu": 1, "cuda": 2}


def describe(tensor: Tensor) -> tuple[int, int, int, int, tuple[int, ...], tuple[int, ...]] | None:
    """A tensor's address, type code, device type, device index, shape and strides, for a torch without exchange_api().

    None for a tensor that the extension cannot read.
    """
    try:
        type_code, device = _TYPE_CODES[tensor.dtype], _DEVICE_CODES[tensor.device.type]
        if tensor.layout is not torch.strided:
            return None
        return tensor.data_ptr(), type_code, device, tensor.device.index or 0, tuple(tensor.shape), tensor.stride()
    except (KeyError, RuntimeError, NotImplementedError):
        return None


def process_count() -> int:
    """Processes that train together, by torch.distributed; 1 without it."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _increments_lists() -> bool:
    try:
        torch._C._increment_version([])
    except (TypeError, RuntimeError):  # older torch takes one tensor at a time, as does 2.4.1
        return False
    return True


_INCREMENTS_LISTS = _increments_lists()


def increment_version(tensors: Sequence[Tensor]) -> None:
    """Tell autograd that the tensors were written, so that a stale backward raises instead of using the new values."""
    if _INCREMENTS_LISTS:
        torch._C._increment_version(tensors)
    else:
        for tensor in tensors:
            torch.autograd.graph.increment_version(tensor)


expect: Callable[[bool | torch.SymBool, Callable[[], str]], None] = torch._check
"""expect(condition, message): RuntimeError with message() unless the condition holds; it may involve symbolic sizes."""


def assert_async(condition: Tensor) -> None:
    """An assertion on the tensor's device, without synchronisation, like the index checks of torch's kernels."""
    torch._assert_async(condition)


def _dtensor_module() -> Any:
    """The module of DTensor if this process has imported it; otherwise there can be no instance."""
    for name in ("torch.distributed.tensor", "torch.distributed._tensor"):
        module = sys.modules.get(name)
        if module is not None and hasattr(module, "DTensor"):
            return module
    return None


def dtensor_type() -> type | None:
    """The DTensor class, or None if there can be no instance."""
    cls: type | None = getattr(_dtensor_module(), "DTensor", None)
    return cls


def placement_types() -> tuple[Any, Any, Any]:
    """Replicate, Shard and Partial. Requires that DTensor has been imported."""
    module = _dtensor_module()
    return module.Replicate, module.Shard, module.Partial


def broadcast_from_first(tensor: Tensor, mesh: Any, dim: int) -> Tensor:
    """The first process's tensor along a dimension of a device mesh; torch.compile can trace it."""
    from torch.distributed import _functional_collectives as collectives

    group = mesh.get_group(dim)
    wait: Callable[[Tensor], Tensor] = collectives.wait_tensor
    return wait(collectives.broadcast(tensor, 0, group))


# torch.compile treats their results as constants while it traces; see in_transform.
dtensor_type._dynamo_marked_constant = placement_types._dynamo_marked_constant = True  # type: ignore[attr-defined]


def local_of(dtensor: Any) -> Tensor:
    """This process's local tensor of a DTensor; waits for a collective that is still running."""
    local = dtensor._local_tensor
    return cast(Tensor, local.wait() if hasattr(local, "wait") else local)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor; gathers a DTensor."""
    dtensor = dtensor_type()
    return cast(Any, tensor).full_tensor() if dtensor is not None and isinstance(tensor, dtensor) else tensor


def has_own_dispatch(tensor: Tensor) -> bool:
    """Whether a tensor subclass handles operators itself (fake, functional, quantized): its memory is not its value."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def may_be_swapped(tensor: Tensor) -> bool:
    """Whether nn.Module.to() swaps the tensor's content by torch.utils.swap_tensors, which refuses weak references."""
    return type(tensor) not in (Tensor, torch.nn.Parameter) or torch.__future__.get_swap_module_params_on_conversion()


def is_functional_wrapper(tensor: Tensor) -> bool:
    """Whether torch.func or functionalization wraps another tensor in this one, which is a Tensor without own memory."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor) or torch._is_functional_tensor(tensor))


def begin_load(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The first steps of torch.optim.Optimizer.load_state_dict: a shallow copy, which the user's hooks may replace."""
    state_dict = state_dict.copy()
    for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        replaced = hook(optimizer, state_dict)
        state_dict = state_dict if replaced is None else replaced
    return state_dict


def begin_save(optimizer: torch.optim.Optimizer) -> None:
    """The first step of torch.optim.Optimizer.state_dict: the user's hooks."""
    for hook in optimizer._optimizer_state_dict_pre_hooks.values():
        hook(optimizer)


def end_save(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The last step of torch.optim.Optimizer.state_dict: the user's hooks, which may replace the dict."""
    for hook in optimizer._optimizer_state_dict_post_hooks.values():
        replaced = hook(optimizer, state_dict)
        state_dict = state_dict if replaced is None else replaced
    return state_dict


def end_load(optimizer: torch.optim.Optimizer) -> None:
    """The last step of torch.optim.Optimizer.load_state_dict: the user's hooks."""
    for hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        hook(optimizer)


def share_hooks(old: torch.optim.Optimizer, new: torch.optim.Optimizer) -> None:
    """Let `new` use the hook dicts of `old` themselves, so that handles still remove their hooks.

    Also mark `old` as stepped: a scheduler made for it warns otherwise, although `new` makes its steps.
    """
    for name in list(vars(old)):
        if name.startswith("_optimizer_") and name.endswith("_hooks"):
            setattr(new, name, getattr(old, name))
    cast(Any, old)._opt_called = True


ADAMW_IS_AN_ADAM = issubclass(torch.optim.AdamW, torch.optim.Adam)
"""In older torch AdamW does not derive from Adam and has its own error messages."""


def is_capturing() -> bool:
    """Whether the current CUDA stream is capturing a graph."""
    return cast(Any, torch.cuda).is_initialized() and torch.cuda.is_current_stream_capturing()


def current_stream(device: int) -> int:
    """torch's current cudaStream_t. Never cached: a graph captured on another stream would stay empty."""
    stream: int = torch._C._cuda_getCurrentRawStream(device)
    return stream


def default_scalar_dtype() -> torch.dtype:
    """The dtype that torch.optim gives a `step` count."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


# --- what the layers query before a call ------------------------------------------------------------------------------

innermost_transform: Callable[[], object | None] = torch._C._functorch.peek_interpreter_stack
"""The innermost active torch.func transform, or None."""


def in_transform() -> bool:
    """Whether a torch.func transform is active while torch.compile traces, which cannot trace innermost_transform()."""
    return innermost_transform() is not None


# As torch.compiler.assume_constant_result does; that would import torch._dynamo, a second at every `import onepass`.
in_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _is_exporting() -> bool:
    """Non-strict export sets is_compiling(); strict export is an attribute of torch._dynamo's current tracer."""
    if torch.compiler.is_compiling():
        return True
    symbolic_convert = sys.modules.get("torch._dynamo.symbolic_convert")
    tracer = getattr(getattr(symbolic_convert, "tls", None), "current_tx", None)
    return bool(getattr(tracer, "export", False))


_is_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined] # torch._dynamo runs it instead of tracing it

is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", _is_exporting)
"""Whether torch.export is tracing; torch >= 2.7 has this function."""

RMS_NORM_TAKES_SYMBOLS = "SymInt" in str(torch._C._jit_get_schemas_for_operator("aten::rms_norm"))
"""Whether torch's rms_norm can be traced with symbolic shapes; torch 2.4 fixes the shape that it sees."""

active_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
"""The number of active TorchDispatchModes."""

jit_tracing: Callable[[], object | None] = torch._C._get_tracing_state
"""The state of torch.jit.trace, or None."""

is_batched_gradient: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor
"""Whether a gradient is a batch of gradients: torch.autograd.grad(is_grads_batched=True) uses a vmap of its own."""


def is_recomputing() -> bool:
    """Whether activation checkpointing is running a forward a second time, inside a backward.

    Hooks may run other forwards inside a backward, so the frames of the callers decide. A recomputation is called by
    recompute_fn of torch.utils.checkpoint or, in its reentrant form and in other libraries, by the backward of a
    CheckpointFunction, but not through torch.autograd.backward: there it backpropagates through what it has recomputed,
    and hooks run again.
    """
    if torch._C._current_graph_task_id() == -1:
        return False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name, caller = frame.f_code.co_name, frame.f_back
        if name == "recompute_fn" and frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        if caller is not None and caller.f_code.co_name == "backward" and frame.f_code is not _BACKPROPAGATE:
            function = type(caller.f_locals.get("ctx")).__name__
            if function.startswith("CheckpointFunction"):
                return True
        frame = caller
    return False


_BACKPROPAGATE = torch.autograd.backward.__code__


def fast_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` without its checks for torch.func transforms, for callers that have made them.

    The checks take 3 us per Function.apply; calling `function.backward` directly from the graph's node saves another 2.
    """
    node = getattr(function, "_backward_cls", None)
    if node is not None and hasattr(node, "apply"):
        node.apply = function.backward
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


def register_vmap(operator: str, rule: Callable[..., Any]) -> None:
    """torch.library.register_vmap (torch >= 2.5). Without it vmap loops over the batch and warns."""
    register = getattr(torch.library, "register_vmap", None)
    if register is not None:
        register(operator, rule)


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether calling the module does more than its forward: hooks of its own, or those for every module."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or _every_module._global_forward_hooks
        or _every_module._global_forward_pre_hooks
        or _every_module._global_backward_hooks
        or _every_module._global_backward_pre_hooks
    )


def _function_table() -> Any:
    """torch._dynamo's table of torch's functions, found by their names when it is first needed; None if it is not loaded."""
    return getattr(sys.modules.get("torch._dynamo.trace_rules"), "get_torch_obj_rule_map", None)


def build_function_table() -> bool:
    """Let torch._dynamo find torch's functions now, before some are replaced. Returns whether it was loaded."""
    table = _function_table()
    if table is not None:
        table()
    return table is not None


def forget_function_table() -> None:
    """Let torch._dynamo find torch's functions again."""
    clear = getattr(_function_table(), "cache_clear", None)
    if clear is not None:
        clear()


_jit_builtins: Any = torch.jit._builtins


def stand_in_for_builtin(function: Callable[..., Any], builtin: Callable[..., Any]) -> None:
    """Let torch.jit.script take `function` for one of torch's built-in functions; see forget_stand_in."""
    table: dict[int, str] = _jit_builtins._get_builtin_table()
    if id(builtin) in table:
        table[id(function)] = table[id(builtin)]


def forget_stand_in(function: Callable[..., Any]) -> None:
    """Undo stand_in_for_builtin, before the function's id may become another's."""
    _jit_builtins._get_builtin_table().pop(id(function), None)
