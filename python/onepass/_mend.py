"""What a tensor must be before its address goes to a kernel.

The native side accepts at once what is plain: dense, of matching dtype, device and layout. Everything else comes here, one
parameter at a time, and leaves either as stand-ins that are plain or as an error that names the parameter, what came and
what to do.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from . import _compat

STRICT = os.environ.get("ONEPASS_STRICT", "").lower() not in ("", "0", "false", "no", "off")
_REAL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_COMPLEX_DTYPES = (torch.complex64, torch.complex128)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a state beside a parameter: the parameter's, float32 for the 16-bit ones."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


class Mender:
    """Makes stand-ins for the tensors of one step, and writes results back where a stand-in is a copy.

    Args:
        name: what error messages call the i-th parameter.
        states: names of the states, in the order they come.
        has_cuda: whether this build has CUDA kernels.
        sparse_text: torch's sentence for refusing sparse gradients; None: they are taken.
        replace: stores a state anew (index, name, tensor): with the parameter's strides, where they had come apart.
        by_rows: of sparse gradients take the rows only; else they are made dense.
        device_scalars: whether 0-d states belong beside a parameter on CUDA; else on the CPU.
    """

    def __init__(
        self,
        name: Callable[[int], str],
        states: tuple[str, ...],
        has_cuda: bool,
        sparse_text: str | None = None,
        replace: Callable[[int, str, Tensor], None] | None = None,
        by_rows: bool = False,
        device_scalars: bool = False,
    ) -> None:
        self.name, self.states, self.device_scalars = name, states, device_scalars
        self.has_cuda, self.replace = has_cuda, replace
        self.sparse_text, self.by_rows = sparse_text, by_rows
        self.copies: dict[Any, tuple[Tensor, Tensor, bool]] = {}  # by memory: (original, copy, write it back)
        self.locals: list[Tensor] = []
        self.alive: list[Tensor] = []  # whose addresses the native side has

    def __call__(
        self, index: int, param: Tensor, grad: Tensor | None, states: list[Tensor], scalars: dict[str, Any]
    ) -> list[Any]:
        """Stand-ins [param, grad unless None, *states]: one-dimensional, dense, of the same size. scalars: the 0-d states.

        Of a sparse gradient the stand-in holds the values, and (address of the row numbers, row size) follows the states.
        A 0-d state that had to be moved is replaced in `scalars`.
        """
        who = self.name(index)
        for name, value in scalars.items():
            self._check_scalar(who, name, value)
        param, grad, states = self._unwrap_dtensors(who, param, grad, states)
        self._check_param(who, param)
        if grad is not None:
            self._check_grad(who, param, grad)
        for name, state in zip(self.states, states, strict=False):
            self._check_state(who, name, param, state)
        with torch.no_grad():
            self._move_scalars(index, param, scalars)
            states = self._align(index, param, states)
            plain = [tensor.detach().as_subclass(Tensor) for tensor in (param, *states)]
            if grad is not None and grad.is_sparse:
                if self.by_rows:
                    return self._rows(who, plain[0], grad.coalesce(), plain[1:])
                if STRICT:
                    raise RuntimeError(
                        f"{who}: its sparse gradient would have to be made dense for momentum, and ONEPASS_STRICT=1 forbids "
                        f"slow paths."
                    )
                grad = grad.to_dense()
            elif grad is not None:
                grad = grad.detach().as_subclass(Tensor)
            return self._stand_ins(who, plain[0], grad, plain[1:])

    def finish(self) -> None:
        """Write the results in copies back to where they belong, after the kernels ran."""
        with torch.no_grad():
            for original, copy, write_back in self.copies.values():
                if write_back:
                    original.copy_(copy)
        if self.locals:
            _compat.increment_version(self.locals)

    # --- checks -----------------------------------------------------------------------------------------------------

    def _unwrap_dtensors(
        self, who: str, param: Tensor, grad: Tensor | None, states: list[Tensor]
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        dtensor: Any = _compat.dtensor_type()
        if dtensor is None or not isinstance(param, dtensor):
            for what, tensor in [("gradient", grad), *zip(self.states, states, strict=False)]:
                if dtensor is not None and isinstance(tensor, dtensor):
                    raise RuntimeError(f"{who}: its {what} is a DTensor, the parameter is not. Make both alike.")
            return param, grad, states
        local_states = []
        for name, state in zip(self.states, states, strict=False):
            if not isinstance(state, dtensor) or state.placements != param.placements:
                raise RuntimeError(
                    f"{who}: it is a DTensor placed {param.placements}, its state '{name}' is not. Let the optimizer make "
                    f"the state, or load it as a DTensor of the same mesh and placements."
                )
            local_states.append(_compat.local_of(state))
        if grad is not None:
            if not isinstance(grad, dtensor):
                raise RuntimeError(f"{who}: it is a DTensor, its gradient is not. Use DTensor.from_local on it.")
            if grad.placements != param.placements:
                grad = grad.redistribute(param.device_mesh, param.placements)
            grad = _compat.local_of(grad)
        local = _compat.local_of(param)
        self.locals.append(local)
        return local, grad, local_states

    def _check_memory(self, who: str, what: str, tensor: Tensor) -> None:
        """The tensor's memory is there and holds its value."""
        if tensor.layout is not torch.strided:
            raise RuntimeError(f"{who}: its {what} has the layout {tensor.layout}; dense tensors are expected.")
        if tensor.device.type == "meta":
            raise RuntimeError(
                f"{who}: its {what} is on the meta device and has no memory. Materialise the model first, for example with "
                f"model.to_empty(device=...)."
            )
        if _compat.has_own_dispatch(tensor) or _compat.is_functional_wrapper(tensor):
            raise RuntimeError(
                f"{who}: its {what} is a {type(tensor).__name__} without memory of its own (a fake, functional or wrapper "
                f"tensor). onepass updates real tensors; step() has to run outside of tracing and of torch.func transforms."
            )
        if tensor.device.type not in ("cpu", "cuda"):
            raise RuntimeError(f"{who}: its {what} is on {tensor.device}; onepass has kernels for cpu and cuda.")
        if tensor.numel() > 0 and tensor.data_ptr() == 0:
            raise RuntimeError(f"{who}: its {what} has no memory (its storage was freed or never made).")

    def _check_param(self, who: str, param: Tensor) -> None:
        self._check_memory(who, "data", param)
        if param.device.type == "cuda" and not self.has_cuda:
            raise RuntimeError(
                f"{who} is on {param.device}, but this build of onepass has no CUDA kernels. Install it where nvcc >= 12.1 is "
                f"found: pip install --force-reinstall --no-binary onepass -C cmake.define.ONEPASS_CUDA=ON onepass"
            )
        if param.dtype not in _REAL_DTYPES + _COMPLEX_DTYPES:
            raise RuntimeError(
                f"{who} has dtype {param.dtype}; float32, float64, bfloat16, float16, complex64 and complex128 are supported."
            )
        if _overlaps_itself(param):
            raise RuntimeError(
                f"{who} has elements that share memory (shape {tuple(param.shape)}, strides {param.stride()}), as expand() "
                f"makes them; an update in place is not defined. Use a clone()."
            )

    def _check_grad(self, who: str, param: Tensor, grad: Tensor) -> None:
        if grad.layout is torch.sparse_coo:
            if self.sparse_text is not None:
                raise RuntimeError(f"{self.sparse_text} ({who}). SparseAdam, Adagrad and SGD take sparse gradients.")
            for dim, index in enumerate(grad._indices()):
                self._check_indices(who, dim, grad.shape[dim], index)
        else:
            self._check_memory(who, "gradient", grad)
        for what, came, expected in (
            ("shape", tuple(grad.shape), tuple(param.shape)),
            ("dtype", grad.dtype, param.dtype),
            ("device", grad.device, param.device),
        ):
            if came != expected:
                raise RuntimeError(
                    f"{who}: its gradient has {what} {came}, the parameter has {expected}. They have to agree; was the "
                    f"parameter changed after backward()?"
                )

    def _check_state(self, who: str, name: str, param: Tensor, state: Any) -> None:
        if not isinstance(state, Tensor):
            raise RuntimeError(f"{who}: its state '{name}' is a {type(state).__name__}; a tensor is expected.")
        self._check_memory(who, f"state '{name}'", state)
        if _overlaps_itself(state):
            raise RuntimeError(f"{who}: its state '{name}' has elements that share memory. Use a clone().")
        for what, came, expected in (
            ("shape", tuple(state.shape), tuple(param.shape)),
            ("dtype", state.dtype, state_dtype(param.dtype)),
            ("device", state.device, param.device),
        ):
            if came != expected:
                raise RuntimeError(
                    f"{who}: its state '{name}' has {what} {came}, expected is {expected}. Was the parameter changed after "
                    f"the optimizer made its state? Make the optimizer anew, or convert the state."
                )

    def _check_scalar(self, who: str, name: str, value: Any) -> None:
        ok = isinstance(value, Tensor) and value.numel() == 1 and value.dtype in (torch.float32, torch.float64)
        if not ok:
            came = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise RuntimeError(f"{who}: its state '{name}' is a {came}; a float32 tensor with one element is expected.")

    # --- stand-ins --------------------------------------------------------------------------------------------------

    def _move_scalars(self, index: int, param: Tensor, scalars: dict[str, Any]) -> None:
        """0-d states to where kernels read them, once: capturable may be switched on or off between two steps."""
        for name, value in scalars.items():
            on_device = self.device_scalars and param.is_cuda
            moved = value.to(
                device=param.device if on_device else "cpu", dtype=torch.float32 if on_device else value.dtype
            )
            if moved is not value and self.replace is not None:
                scalars[name] = moved
                self.replace(index, name, moved)

    def _align(self, index: int, param: Tensor, states: list[Tensor]) -> list[Tensor]:
        """States with the parameter's strides, once and for all: after .to(memory_format=...), or from a checkpoint."""
        aligned = []
        for name, state in zip(self.states, states, strict=False):
            apart = state.stride() != param.stride() and _is_dense(param) and state.numel() > 0
            if apart and self.replace is not None and not cast(Any, state).is_shared() and not self.locals:
                state = torch.empty_like(param, dtype=state.dtype).copy_(state)
                self.replace(index, name, state)
            aligned.append(state)
        return aligned

    def _stand_ins(self, who: str, param: Tensor, grad: Tensor | None, states: list[Tensor]) -> list[Tensor]:
        if param.is_conj():  # a conjugate's memory does not say what it is
            param = self._copy(who, "its conjugation", param, torch.empty_like(param), write_back=True)
        if param.is_complex():
            param = torch.view_as_real(param)
            grad = None if grad is None else torch.view_as_real(grad.resolve_conj())
            states = [torch.view_as_real(state) for state in states]
        if param.numel() == 0:
            tensors = [param, *([] if grad is None else [grad]), *states]
            return [tensor.as_strided((0,), (1,)) for tensor in tensors]  # reshape(0) may keep another stride
        if not _is_dense(param) or param.is_neg():
            param = self._copy(who, "its strides", param, torch.empty_like(param), write_back=True)
        out = [param]
        if grad is not None:
            if not _same_strides(grad, param) or grad.is_neg():
                grad = self._copy(who, "its gradient's strides", grad, torch.empty_like(param), write_back=False)
            out.append(grad)
        for state in states:
            if not _same_strides(state, param) or state.is_neg():
                like = torch.empty_like(param, dtype=state.dtype)
                state = self._copy(who, "a state's strides", state, like, write_back=True)
            out.append(state)
        return [tensor.as_strided((tensor.numel(),), (1,)) for tensor in out]

    def _rows(self, who: str, param: Tensor, grad: Tensor, states: list[Tensor]) -> list[Any]:
        """The same for a coalesced sparse gradient: its values, and which rows of the table they belong to."""
        indices, values = grad._indices(), grad._values()
        table = param.shape[: grad.sparse_dim()]
        rows = torch.zeros(values.shape[0], dtype=torch.int64, device=grad.device)
        for size, index in zip(table, indices, strict=True):
            rows = rows * size + index
        tensors = [values.resolve_conj().contiguous()]
        for tensor in (param, *states):
            if not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
                contiguous = torch.empty_like(tensor, memory_format=torch.contiguous_format)
                tensor = self._copy(who, "its strides under a sparse gradient", tensor, contiguous, write_back=True)
            tensors.append(tensor)
        values, param, *states = (torch.view_as_real(t) if t.is_complex() else t for t in tensors)
        self.alive.append(rows)
        row_size = math.prod(values.shape[1:])
        return [*(t.view(-1) for t in (param, values, *states)), (rows.data_ptr(), row_size)]

    def _check_indices(self, who: str, dim: int, size: int, index: Tensor) -> None:
        """Before coalesce(), which trusts them as much as our kernels do. On CUDA nothing waits: an assertion there."""
        if index.numel() == 0:
            return
        low, high = torch.aminmax(index)
        if index.is_cuda:
            _compat.assert_async((low >= 0) & (high < size))
        elif low < 0 or high >= size:
            raise RuntimeError(
                f"size is inconsistent with indices: for dim {dim}, size is {size} but found index "
                f"{int(low if low < 0 else high)} (the gradient of {who})"
            )

    def _copy(self, who: str, why: str, source: Tensor, target: Tensor, write_back: bool) -> Tensor:
        """A copy of other strides. The same memory gets the same copy, so that a parameter listed twice stays one."""
        memory = (source.data_ptr(), source.dtype, source.shape, source.stride(), source.is_neg(), source.is_conj())
        if memory in self.copies:
            return self.copies[memory][1]
        if STRICT:
            raise RuntimeError(
                f"{who}: {why} would need a copy at every step, and ONEPASS_STRICT=1 forbids slow paths."
            )
        if write_back and source.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"{who} was made in inference mode and is not dense: it cannot be written outside of it."
            )
        self.copies[memory] = (source, target.copy_(source), write_back)
        return target


def _by_stride(tensor: Tensor) -> list[tuple[int, int]]:
    """(stride, size) of the dimensions that have a neighbour, innermost first."""
    dims = zip(tensor.stride(), tensor.shape, strict=True)
    return sorted((stride, size) for stride, size in dims if size != 1)


def _same_strides(tensor: Tensor, other: Tensor) -> bool:
    """Equal strides, where a dimension has more than one element."""
    sizes_and_strides = zip(tensor.shape, tensor.stride(), other.stride(), strict=True)
    return all(size == 1 or ours == theirs for size, ours, theirs in sizes_and_strides)


def _is_dense(tensor: Tensor) -> bool:
    expected = 1
    for stride, size in _by_stride(tensor):
        if stride != expected:
            return False
        expected *= size
    return True


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements share memory."""
    if tensor.numel() < 2:  # whatever its strides
        return False
    extent = 0
    for stride, size in _by_stride(tensor):
        if stride <= extent:  # this dimension does not clear the extent of those inside it; only counting decides
            break
        extent += stride * (size - 1)
    else:
        return False
    offsets = torch.zeros((), dtype=torch.int64, device="cpu")
    for stride, size in _by_stride(tensor):
        offsets = (offsets.unsqueeze(-1) + torch.arange(size, device="cpu") * stride).flatten()
    return torch.bincount(offsets).max().item() > 1
