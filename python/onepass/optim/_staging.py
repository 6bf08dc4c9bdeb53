"""Copies of parameters, gradients and states that kernels cannot use directly, and the results copied back."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .. import _compat
from ._checks import check_dtensors, check_grad, check_param, check_scalar_state, check_state
from ._codes import decode, encode
from ._formats import Entry, Formats, check_storable, scale_count
from ._strides import have_same_strides, is_dense

STRICT = os.environ.get("ONEPASS_STRICT", "").lower() not in ("", "0", "false", "no", "off")


class _Copy(NamedTuple):
    original: Tensor
    copy: Tensor
    write_back: bool


class Staging:
    """The tensors of one group on their way to the kernels of one step.

    The native side accepts dense tensors of matching dtype, device and layout directly. Every other parameter comes to
    stage(), with its gradient and states, and leaves as tensors that kernels take, or as an error that names the parameter,
    what came and what to do. Where these tensors are copies, write_back() returns the results.

    Args:
        name: what error messages call the i-th parameter.
        states: names of the states, in the order in which they come.
        sparse_text: torch's sentence for refusing sparse gradients; None: they are taken.
        replace: stores a state (index, name, tensor) whose strides or device had to change.
        by_rows: update only the rows that a sparse gradient has; else it is made dense.
        device_scalars: whether 0-d states belong beside a parameter on CUDA; else on the CPU.
        formats: how the group keeps its states and parameters; None: in the dtype of arithmetic. The states that come are
            then its entries.
    """

    def __init__(
        self,
        name: Callable[[int], str],
        states: tuple[str, ...],
        sparse_text: str | None = None,
        replace: Callable[[int, str, Tensor], None] | None = None,
        by_rows: bool = False,
        device_scalars: bool = False,
        formats: Formats | None = None,
    ) -> None:
        self.name, self.device_scalars, self.formats = name, device_scalars, formats
        self.entries = [Entry(s, s, "values", None) for s in states] if formats is None else list(formats.entries)
        self.replace, self.sparse_text, self.by_rows = replace, sparse_text, by_rows
        self.copies: dict[Any, _Copy] = {}  # by memory
        self.locals: list[Tensor] = []  # local tensors of DTensors
        self.alive: list[Tensor] = []  # whose addresses the native side has

    def stage(
        self, index: int, param: Tensor, grad: Tensor | None, states: list[Tensor], scalars: dict[str, Any]
    ) -> list[Any]:
        """[param, grad unless None, *states], all one-dimensional, dense and of the same size. scalars: the 0-d states.

        For a sparse gradient the result has its values, and (address of the row numbers, row size) follows the states.
        A 0-d state that had to be moved is replaced in `scalars`.
        """
        label = self.name(index)
        for name, value in scalars.items():
            check_scalar_state(label, name, value)
        param, grad, states = self._unwrap_dtensors(label, param, grad, states)
        check_param(label, param)
        if grad is not None:
            check_grad(label, param, grad, self.sparse_text)
        if self.formats is not None:
            check_storable(label, param, self.formats)
            if grad is not None and grad.is_sparse and not self.formats.usual:
                raise RuntimeError(
                    f"{label}: a sparse gradient needs parameters and states in the dtype of arithmetic. Put the parameter into a "
                    f"group without state_dtype, master_bits and stochastic_rounding."
                )
        for entry, state in zip(self.entries, states, strict=False):
            if entry.kind == "scale":
                _check_scale(label, entry.name, param, state)
            else:
                check_state(label, entry.name, param, state, entry.dtype)
        with torch.no_grad():
            self._move_scalars(index, param, scalars)
            states = self._align(index, param, states)
            param, *states = (tensor.detach().as_subclass(Tensor) for tensor in (param, *states))
            if grad is not None and grad.is_sparse:
                if self.by_rows:
                    return self._stage_rows(label, param, grad.coalesce(), states)
                if STRICT:
                    raise RuntimeError(
                        f"{label}: its sparse gradient would have to be made dense for momentum, and ONEPASS_STRICT=1 "
                        f"forbids slow paths."
                    )
                grad = grad.to_dense()
            elif grad is not None:
                grad = grad.detach().as_subclass(Tensor)
            return self._stage_elements(label, param, grad, states)

    def write_back(self) -> None:
        """Copy results to where they belong, after the kernels ran."""
        with torch.no_grad():
            for original, copy, write_back in self.copies.values():
                if write_back:
                    original.copy_(copy)
        if self.locals:
            _compat.increment_version(self.locals)

    def _unwrap_dtensors(
        self, label: str, param: Tensor, grad: Tensor | None, states: list[Tensor]
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        alike = {e.name: state for e, state in zip(self.entries, states, strict=False) if e.kind != "scale"}
        check_dtensors(label, param, grad, alike)
        dtensor: Any = _compat.dtensor_type()
        if dtensor is None or not isinstance(param, dtensor):
            return param, grad, states
        if isinstance(grad, dtensor):
            if grad.placements != param.placements:
                grad = grad.redistribute(param.device_mesh, param.placements)
            grad = _compat.local_of(grad)
        local = _compat.local_of(param)
        self.locals.append(local)
        return local, grad, [_compat.local_of(s) if isinstance(s, dtensor) else s for s in states]

    def _move_scalars(self, index: int, param: Tensor, scalars: dict[str, Any]) -> None:
        """Move 0-d states to where kernels read them: capturable may be switched on or off between two steps."""
        for name, value in scalars.items():
            on_device = self.device_scalars and param.is_cuda
            moved = value.to(
                device=param.device if on_device else "cpu", dtype=torch.float32 if on_device else value.dtype
            )
            if moved is not value and self.replace is not None:
                scalars[name] = moved
                self.replace(index, name, moved)

    def _align(self, index: int, param: Tensor, states: list[Tensor]) -> list[Tensor]:
        """States with the parameter's strides, once for all later steps: after .to(memory_format=...), or a checkpoint."""
        aligned = list(states)
        for i, (entry, state) in enumerate(zip(self.entries, states, strict=False)):
            differ = entry.kind != "scale" and state.stride() != param.stride()
            if not differ or not is_dense(param) or state.numel() == 0 or self.replace is None:
                continue
            if cast(Any, state).is_shared() or self.locals:
                continue
            aligned[i] = torch.empty_like(param, dtype=state.dtype)
            if entry.kind == "codes":  # whose groups follow the order of memory
                format_ = self._format_of(entry)
                values = torch.empty_like(param, dtype=torch.float32).copy_(decode(format_, state, states[i + 1]))
                aligned[i + 1] = torch.empty_like(states[i + 1])
                encode(format_, values, aligned[i], aligned[i + 1])
                self.replace(index, self.entries[i + 1].name, aligned[i + 1])
            else:
                aligned[i].copy_(state)
            self.replace(index, entry.name, aligned[i])
        return aligned

    def _format_of(self, entry: Entry) -> str:
        formats = cast(Formats, self.formats)
        return formats.state_formats[formats.states.index(entry.state)]

    def _stage_elements(self, label: str, param: Tensor, grad: Tensor | None, states: list[Tensor]) -> list[Tensor]:
        if param.is_conj():  # memory holds the conjugated values
            param = self._copy(label, "its conjugation", param, torch.empty_like(param), write_back=True)
        if param.is_complex():
            param = torch.view_as_real(param)
            grad = None if grad is None else torch.view_as_real(grad.resolve_conj())
            states = [torch.view_as_real(state) for state in states]
        if param.numel() == 0:
            tensors = [param, *([] if grad is None else [grad]), *states]
            return [tensor.as_strided((0,), (1,)) for tensor in tensors]  # reshape(0) may keep another stride
        if not is_dense(param) or param.is_neg():
            param = self._copy(label, "its strides", param, torch.empty_like(param), write_back=True)
        staged = [param]
        if grad is not None:
            if not have_same_strides(grad, param) or grad.is_neg():
                grad = self._copy(label, "its gradient's strides", grad, torch.empty_like(param), write_back=False)
            staged.append(grad)
        for entry, state in zip(self.entries, states, strict=False):
            if entry.kind == "scale":
                pass
            elif not have_same_strides(state, param) or state.is_neg():
                if entry.kind == "codes":
                    raise RuntimeError(
                        f"{label}: its state '{entry.name}' has strides {state.stride()}, the parameter has {param.stride()}: codes "
                        f"have to lie in memory as the parameter does. Use state_dtype=torch.bfloat16 for its group."
                    )
                like = torch.empty_like(param, dtype=state.dtype)
                state = self._copy(label, "a state's strides", state, like, write_back=True)
            staged.append(state)
        return [tensor.as_strided((tensor.numel(),), (1,)) for tensor in staged]

    def _stage_rows(self, label: str, param: Tensor, grad: Tensor, states: list[Tensor]) -> list[Any]:
        """For a coalesced sparse gradient: its values, and which rows of the table they belong to."""
        indices, values = grad._indices(), grad._values()
        table = param.shape[: grad.sparse_dim()]
        rows = torch.zeros(values.shape[0], dtype=torch.int64, device=grad.device)
        for size, index in zip(table, indices, strict=True):
            rows = rows * size + index
        tensors = [values.resolve_conj().contiguous()]
        for tensor in (param, *states):
            if not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
                contiguous = torch.empty_like(tensor, memory_format=torch.contiguous_format)
                tensor = self._copy(label, "its strides under a sparse gradient", tensor, contiguous, write_back=True)
            tensors.append(tensor)
        values, param, *states = (torch.view_as_real(t) if t.is_complex() else t for t in tensors)
        self.alive.append(rows)
        row_size = math.prod(values.shape[1:])
        return [*(t.view(-1) for t in (param, values, *states)), (rows.data_ptr(), row_size)]

    def _copy(self, label: str, why: str, source: Tensor, target: Tensor, write_back: bool) -> Tensor:
        """Copy source into target. The same memory gets the same copy, so that a parameter listed twice stays one."""
        memory = (source.data_ptr(), source.dtype, source.shape, source.stride(), source.is_neg(), source.is_conj())
        if memory in self.copies:
            return self.copies[memory].copy
        if STRICT:
            raise RuntimeError(
                f"{label}: {why} would need a copy at every step, and ONEPASS_STRICT=1 forbids slow paths."
            )
        if write_back and source.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"{label} was made in inference mode and is not dense: it cannot be written outside of it."
            )
        self.copies[memory] = _Copy(source, target.copy_(source), write_back)
        return target


def _check_scale(label: str, name: str, param: Tensor, scale: Any) -> None:
    expected = (scale_count(param),)
    fits = isinstance(scale, Tensor) and scale.dtype == torch.float32 and tuple(scale.shape) == expected
    if not fits or not scale.is_contiguous() or scale.device != param.device or scale.is_neg():
        came = f"{scale.dtype} of shape {tuple(scale.shape)}" if isinstance(scale, Tensor) else type(scale).__name__
        raise RuntimeError(
            f"{label}: its state '{name}' should be a contiguous float32 tensor of shape {expected} on {param.device}; {came} came. "
            f"Load the optimizer's state_dict() again."
        )
