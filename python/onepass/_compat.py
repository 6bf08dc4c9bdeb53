"""Every private or version-dependent API of torch that onepass uses, each with what stands in for it elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def disable_dynamo(function: F) -> F:
    """Keep torch.compile out of a function: a graph break instead of tracing into raw pointers."""
    from torch._compile import _disable_dynamo

    wrapped: Any = _disable_dynamo(function)
    return cast(F, wrapped)


def exchange_api() -> object:
    """DLPack's C interface to torch tensors (torch >= 2.10): a capsule, or None. Reads a tensor in 20 ns."""
    return getattr(Tensor, "__dlpack_c_exchange_api__", None)


# DLPack's type code * 256 + bits of an element.
_KINDS = {
    torch.float32: 2 * 256 + 32,
    torch.float64: 2 * 256 + 64,
    torch.float16: 2 * 256 + 16,
    torch.bfloat16: 4 * 256 + 16,
    torch.int64: 64,
    torch.uint8: 256 + 8,
}
_DEVICE_CODES = {"cpu": 1, "cuda": 2}


def describe(tensor: Tensor) -> tuple[int, int, int, int, tuple[int, ...], tuple[int, ...]] | None:
    """What exchange_api() gives, for a torch without it: address, kind, device type, device index, shape, strides."""
    try:
        kind, device = _KINDS[tensor.dtype], _DEVICE_CODES[tensor.device.type]
        if tensor.layout is not torch.strided:
            return None
        return tensor.data_ptr(), kind, device, tensor.device.index or 0, tuple(tensor.shape), tensor.stride()
    except (KeyError, RuntimeError, NotImplementedError):
        return None


def _increments_lists() -> bool:
    try:
        torch._C._increment_version([])
    except (TypeError, RuntimeError):  # older torch takes one tensor at a time; so does 2.4.1
        return False
    return True


_INCREMENTS_LISTS = _increments_lists()


def increment_version(tensors: Sequence[Tensor]) -> None:
    """Tell autograd that the tensors were written to, so that a stale backward raises instead of using new weights."""
    if _INCREMENTS_LISTS:
        torch._C._increment_version(tensors)
    else:
        for tensor in tensors:
            torch.autograd.graph.increment_version(tensor)


expect: Callable[[bool | torch.SymBool, Callable[[], str]], None] = torch._check
"""expect(condition, message): RuntimeError with message() unless the condition holds. It may be of symbolic sizes."""


def assert_async(condition: Tensor) -> None:
    """An assertion on the tensor's device, which nothing waits for; as torch's own kernels check indices."""
    torch._assert_async(condition)


def _dtensor_module() -> Any:
    """The module of DTensor if something in this process has imported it (without it there can be no instance)."""
    for name in ("torch.distributed.tensor", "torch.distributed._tensor"):
        module = sys.modules.get(name)
        if module is not None and hasattr(module, "DTensor"):
            return module
    return None


def dtensor_type() -> type | None:
    """The DTensor class, or None where there can be no instance."""
    found: type | None = getattr(_dtensor_module(), "DTensor", None)
    return found


def placement_types() -> tuple[Any, Any, Any]:
    """Replicate, Shard and Partial, in a process that has DTensors."""
    module = _dtensor_module()
    return module.Replicate, module.Shard, module.Partial


def broadcast_from_first(tensor: Tensor, mesh: Any, dim: int) -> Tensor:
    """The tensor of the first process along a dimension of a device mesh; compilers see through it."""
    from torch.distributed import _functional_collectives as collectives

    group = mesh.get_group(dim)
    wait: Callable[[Tensor], Tensor] = collectives.wait_tensor
    return wait(collectives.broadcast(tensor, 0, group))


# What torch.compile takes for constant while it traces; see in_transform.
dtensor_type._dynamo_marked_constant = placement_types._dynamo_marked_constant = True  # type: ignore[attr-defined]


def local_of(dtensor: Any) -> Tensor:
    """This process's part of a DTensor, waited for where a collective is still under way."""
    local = dtensor._local_tensor
    return cast(Tensor, local.wait() if hasattr(local, "wait") else local)


def whole(tensor: Tensor) -> Tensor:
    """A tensor, and of a DTensor all of it."""
    dtensor = dtensor_type()
    return cast(Any, tensor).full_tensor() if dtensor is not None and isinstance(tensor, dtensor) else tensor


def has_own_dispatch(tensor: Tensor) -> bool:
    """Whether a tensor subclass handles operators itself (fake, functional, quantized ...): its memory is not its value."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def may_be_swapped(tensor: Tensor) -> bool:
    """Whether nn.Module.to() exchanges the tensor's content by torch.utils.swap_tensors, which refuses weak references."""
    return type(tensor) not in (Tensor, torch.nn.Parameter) or torch.__future__.get_swap_module_params_on_conversion()


def is_functional_wrapper(tensor: Tensor) -> bool:
    """Tensors inside torch.func transforms and functionalization: the Python type is Tensor, the memory is not theirs."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor) or torch._is_functional_tensor(tensor))


def begin_load(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """What torch.optim.Optimizer.load_state_dict does first: a shallow copy, and what the user's hooks make of it."""
    state_dict = state_dict.copy()
    for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        replaced = hook(optimizer, state_dict)
        state_dict = state_dict if replaced is None else replaced
    return state_dict


def begin_save(optimizer: torch.optim.Optimizer) -> None:
    """What torch.optim.Optimizer.state_dict does first."""
    for hook in optimizer._optimizer_state_dict_pre_hooks.values():
        hook(optimizer)


def end_save(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """What torch.optim.Optimizer.state_dict does last: the user's hooks may give another dict."""
    for hook in optimizer._optimizer_state_dict_post_hooks.values():
        replaced = hook(optimizer, state_dict)
        state_dict = state_dict if replaced is None else replaced
    return state_dict


def end_load(optimizer: torch.optim.Optimizer) -> None:
    """What torch.optim.Optimizer.load_state_dict does last."""
    for hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        hook(optimizer)


def share_hooks(old: torch.optim.Optimizer, new: torch.optim.Optimizer) -> None:
    """Let an optimizer have another one's hooks, in the same dicts, so that the handles that remove them still do.

    A scheduler made for the old one asks whether that was stepped: its steps are the new one's.
    """
    for name in list(vars(old)):
        if name.startswith("_optimizer_") and name.endswith("_hooks"):
            setattr(new, name, getattr(old, name))
    cast(Any, old)._opt_called = True


ADAMW_IS_AN_ADAM = issubclass(torch.optim.AdamW, torch.optim.Adam)
"""In older torch it is a class of its own, with sentences of its own."""


def is_capturing() -> bool:
    """Whether the current CUDA stream records a graph."""
    return cast(Any, torch.cuda).is_initialized() and torch.cuda.is_current_stream_capturing()


def current_stream(device: int) -> int:
    """The cudaStream_t that torch enqueues on at this moment; never cached, or a captured graph would stay empty."""
    stream: int = torch._C._cuda_getCurrentRawStream(device)
    return stream


def default_scalar_dtype() -> torch.dtype:
    """The dtype of a `step` count as torch.optim makes it."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


# --- what the layers ask before a call --------------------------------------------------------------------------------

innermost_transform: Callable[[], object | None] = torch._C._functorch.peek_interpreter_stack
"""The torch.func transform that is active, or None."""


def in_transform() -> bool:
    """The same question while torch.compile traces, which does not see through innermost_transform() but guards it."""
    return innermost_transform() is not None


# What torch.compiler.assume_constant_result does, which would import torch._dynamo: a second at every `import onepass`.
in_transform._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _is_exporting() -> bool:
    """The export that traces without torch._dynamo says so; the other one is an attribute of what torch._dynamo is tracing."""
    if torch.compiler.is_compiling():
        return True
    symbolic_convert = sys.modules.get("torch._dynamo.symbolic_convert")
    tracer = getattr(getattr(symbolic_convert, "tls", None), "current_tx", None)
    return bool(getattr(tracer, "export", False))


_is_exporting._dynamo_marked_constant = True  # type: ignore[attr-defined] # runs as it is, while torch._dynamo traces

is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", _is_exporting)
"""Whether torch.export is tracing; torch has the question since 2.7."""

RMS_NORM_TAKES_SYMBOLS = "SymInt" in str(torch._C._jit_get_schemas_for_operator("aten::rms_norm"))
"""Whether torch's rms_norm is traced for every shape; that of 2.4 for the one that it sees."""

active_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
"""How many TorchDispatchModes are active."""

jit_tracing: Callable[[], object | None] = torch._C._get_tracing_state
"""The state of torch.jit.trace, or None."""

is_batched_gradient: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor
"""Whether a gradient is a batch of them: torch.autograd.grad(is_grads_batched=True) has a vmap of its own."""


def is_recomputing() -> bool:
    """Whether activation checkpointing runs this a second time, inside of a backward.

    A hook may run a forward of its own there, which is none, so the callers tell. They are torch.utils.checkpoint's
    recompute_fn or, for its reentrant form and those of other libraries, the backward of a CheckpointFunction; but not
    where that has come to backpropagate through what it has computed, when hooks run again.
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


def applier(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` without the questions about torch.func transforms, for callers that have asked.

    It takes 3 us of Function.apply; the frames between a node of the graph and `function.backward` take 2 more.
    """
    node = getattr(function, "_backward_cls", None)
    if node is not None and hasattr(node, "apply"):
        node.apply = function.backward
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


def register_vmap(operator: str, rule: Callable[..., Any]) -> None:
    """torch.library.register_vmap (torch >= 2.5); without it vmap loops over the batch by itself, with a warning."""
    register = getattr(torch.library, "register_vmap", None)
    if register is not None:
        register(operator, rule)


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether calling the module does more than its forward: hooks of its own, or those for every module."""
    from torch.nn.modules import module as every

    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or every._global_forward_hooks
        or every._global_forward_pre_hooks
        or every._global_backward_hooks
        or every._global_backward_pre_hooks
    )
