"""What a tensor must be before its address goes to a kernel.

The native side accepts at once what is plain: dense, of matching dtype, device and layout. Everything else comes here, one
parameter at a time, and leaves either as stand-ins that are plain or as an error that names the parameter, what came and
what to do.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from . import _compat

STRICT = os.environ.get("ONEPASS_STRICT", "0") not in ("", "0")
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
        sparse_text: torch's sentence for this optimizer about sparse gradients, or None.
    """

    def __init__(
        self, name: Callable[[int], str], states: tuple[str, ...], has_cuda: bool, sparse_text: str | None = None
    ) -> None:
        self.name, self.states = name, states
        self.has_cuda, self.sparse_text = has_cuda, sparse_text
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.locals: list[Tensor] = []

    def __call__(self, index: int, param: Tensor, grad: Tensor | None, states: list[Tensor], step: Any) -> list[Tensor]:
        """Stand-ins [param, grad unless None, *states]: one-dimensional, dense, of the same size."""
        who = self.name(index)
        if step is not None:
            self._check_step(who, step)
        param, grad, states = self._unwrap_dtensors(who, param, grad, states)
        self._check_param(who, param)
        if grad is not None:
            self._check_grad(who, param, grad)
        for name, state in zip(self.states, states, strict=False):
            self._check_state(who, name, param, state)
        with torch.no_grad():
            plain = [tensor.detach().as_subclass(Tensor) for tensor in (param, *states)]
            if grad is not None:
                grad = grad.detach().as_subclass(Tensor)
            return self._stand_ins(who, plain[0], grad, plain[1:])

    def finish(self) -> None:
        """Write the results in copies back to where they belong, after the kernels ran."""
        with torch.no_grad():
            for target, source in self.copies:
                target.copy_(source)
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
            local_states.append(state._local_tensor)
        if grad is not None:
            if not isinstance(grad, dtensor):
                raise RuntimeError(f"{who}: it is a DTensor, its gradient is not. Use DTensor.from_local on it.")
            if grad.placements != param.placements:
                grad = grad.redistribute(param.device_mesh, param.placements)
            grad = cast(Any, grad)._local_tensor
        local: Tensor = cast(Any, param)._local_tensor
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
        if grad.layout is not torch.strided:
            text = (
                f"{self.sparse_text} ({who})"
                if self.sparse_text
                else f"{who}: its gradient is {grad.layout}, not dense."
            )
            raise RuntimeError(text)
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

    def _check_step(self, who: str, step: Any) -> None:
        ok = isinstance(step, Tensor) and step.numel() == 1 and step.dtype in (torch.float32, torch.float64)
        if not ok:
            came = f"{step.dtype} of shape {tuple(step.shape)}" if isinstance(step, Tensor) else type(step).__name__
            raise RuntimeError(f"{who}: its state 'step' is a {came}; a float32 tensor with one element is expected.")

    # --- stand-ins --------------------------------------------------------------------------------------------------

    def _stand_ins(self, who: str, param: Tensor, grad: Tensor | None, states: list[Tensor]) -> list[Tensor]:
        if param.is_complex():
            param = _as_real(self, param)
            grad = None if grad is None else torch.view_as_real(grad.resolve_conj())
            states = [torch.view_as_real(state) for state in states]
        if param.numel() == 0:
            tensors = [param, *([] if grad is None else [grad]), *states]
            return [tensor.reshape(0) for tensor in tensors]
        if not _is_dense(param) or param.is_neg():
            param = self._copy(who, "strided", param, torch.empty_like(param), write_back=True)
        out = [param]
        if grad is not None:
            if grad.stride() != param.stride() or grad.is_neg():
                grad = self._copy(who, "its gradient's strides", grad, torch.empty_like(param), write_back=False)
            out.append(grad)
        for state in states:
            if state.stride() == param.stride():
                out.append(state)
                continue
            same_strides = torch.empty_like(param, dtype=state.dtype)
            if cast(Any, state).is_shared() or state._base is not None:
                out.append(self._copy(who, "a state's strides", state, same_strides, write_back=True))
            else:  # once and for all, the parameter keeps its memory format
                state.data = same_strides.copy_(state)
                out.append(state)
        return [tensor.detach().as_strided((tensor.numel(),), (1,)) for tensor in out]

    def _copy(self, who: str, why: str, source: Tensor, target: Tensor, write_back: bool) -> Tensor:
        if STRICT:
            raise RuntimeError(
                f"{who}: {why} would need a copy at every step, and ONEPASS_STRICT=1 forbids slow paths."
            )
        target.copy_(source)
        if write_back:
            self.copies.append((source, target))
        return target


def _as_real(mender: Mender, param: Tensor) -> Tensor:
    """A complex parameter as pairs of reals; through a copy where it is the conjugate of what its memory says."""
    if not param.is_conj():
        return torch.view_as_real(param)
    resolved = param.resolve_conj()
    mender.copies.append((param, resolved))
    return torch.view_as_real(resolved)


def _by_stride(tensor: Tensor) -> list[tuple[int, int]]:
    """(stride, size) of the dimensions that have a neighbour, innermost first."""
    dims = zip(tensor.stride(), tensor.shape, strict=True)
    return sorted((stride, size) for stride, size in dims if size != 1)


def _is_dense(tensor: Tensor) -> bool:
    expected = 1
    for stride, size in _by_stride(tensor):
        if stride != expected:
            return False
        expected *= size
    return True


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements share memory."""
    extent = 0
    for stride, size in _by_stride(tensor):
        if stride <= extent:  # this dimension does not clear the extent of those inside it; only counting decides
            break
        extent += stride * (size - 1)
    else:
        return False
    offsets = torch.zeros((), dtype=torch.int64)
    for stride, size in _by_stride(tensor):
        offsets = (offsets.unsqueeze(-1) + torch.arange(size) * stride).flatten()
    return torch.bincount(offsets).max().item() > 1
