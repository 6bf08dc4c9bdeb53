"""One update of many tensors: groups gather into a plan, norms are taken, the plan runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import _C, _compat
from .devices import current_stream, is_on_cuda, torch_device
from .rules import find_variant

_TENSOR_TYPES = (Tensor, torch.nn.Parameter)


class Staging(Protocol):
    """Turns tensors that kernels cannot use directly into ones they can: onepass.optim._staging."""

    def stage(
        self,
        index: int,
        param: Tensor,
        grad: Tensor | None,
        states: list[Tensor],
        scalars: dict[str, Any],
    ) -> list[Any]: ...

    def write_back(self) -> None: ...


class Formats(Protocol):
    """Names of csrc/core/storage.hpp: onepass.optim._formats."""

    @property
    def names(self) -> tuple[str, ...]: ...  # of the entries of a parameter's state
    @property
    def state_formats(self) -> tuple[str, ...]: ...
    @property
    def param_format(self) -> str: ...


class Group:
    """Parameters that share hyper-parameters, as the native side takes them.

    Args:
        rule: name of the rule, a file in csrc/rules.
        state_names: the states of this variant of the rule, in the rule's order.
        params: the parameters; their `.grad` is read if the rule reads gradients.
        state: optimizer state, {parameter: {name: tensor}}.
        hyper: a number or one-element tensor for each hyper-parameter that the rule's file names.
        staging: checks what the native side cannot take as it is, and makes tensors that it can.
        reads_grad: selects between two variants with the same states.
        counts_steps: whether the state has a "step".
        device_scalars: whether "step" lives beside the parameter on CUDA.
        maximize: whether the gradient's sign is flipped.
        fresh: parameters whose states were made for this very step, for rules that treat them differently.
        formats: how states and parameters are kept in memory; None: in the dtype of arithmetic.
    """

    def __init__(
        self,
        rule: str,
        state_names: tuple[str, ...],
        params: list[Tensor],
        state: dict[Tensor, Any],
        hyper: dict[str, float | Tensor],
        staging: Staging,
        *,
        reads_grad: bool = True,
        counts_steps: bool = False,
        device_scalars: bool = False,
        maximize: bool = False,
        fresh: set[Tensor] | None = None,
        formats: Formats | None = None,
    ) -> None:
        self.variant_index, variant = find_variant(rule, state_names, reads_grad)
        self.params, self.state, self.staging, self.fresh = params, state, staging, fresh
        self.hyper = tuple(self._scalar(hyper[name]) for name in variant.hyper_names)
        self.counts_steps, self.device_scalars, self.maximize = counts_steps, device_scalars, maximize
        usual = state_names, ("full",) * len(state_names), "plain"
        self.formats = usual if formats is None else (formats.names, formats.state_formats, formats.param_format)

    def _scalar(self, value: float | Tensor) -> float | Tensor:
        if isinstance(value, Tensor):
            value = value.detach()
            on_device = is_on_cuda(value) and all(p.device == value.device for p in self.params)
            if on_device and value.dtype in (torch.float32, torch.float64):
                return value
        return float(value)  # synchronises where the tensor is on another device than a parameter

    def gather(self, plan: _C.Plan) -> list[int]:
        """Check the tensors and add them to the plan; gives the indices of parameters whose state is still to be made."""
        scalars = self.counts_steps, self.device_scalars
        options = self.variant_index, self.hyper, *scalars, bool(self.maximize), *self.formats
        return plan.gather(options, self.params, self.state, self.fresh, self.staging.stage)


SCALE_GROUP: int = _C.scale_group  # elements per scale of an 8-bit state


def new_plan() -> _C.Plan:
    """An empty plan: groups gather into it, `update` runs it."""
    return _C.Plan(_TENSOR_TYPES)


@dataclass
class GradientFactor:
    """What happens to the gradients of one step before the rule: see "From gradient to update" in docs/optimizers.md.

    Args:
        max_norm: clip to this global norm; None: no clipping.
        normalize: divide by the global norm instead.
        grad_scale, found_inf: tensors of a GradScaler, or None.
        reduce: turns the sum of squares of this process's gradients into that of all processes; for sharded parameters.
        epsilon: added to the norm that is divided by.
        weighted: the norm is that of parameters times gradients, element by element.
    """

    max_norm: float | None = None
    normalize: bool = False
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    reduce: Callable[[Tensor], Tensor] | None = None
    epsilon: float = 0.0
    weighted: bool = False

    @property
    def needs_norm(self) -> bool:
        return self.max_norm is not None or self.normalize


def _total_on_device(plan: _C.Plan, norm_type: float, weighted: bool, root: bool, index: int) -> Tensor:
    """Total over the gradients on a CUDA device, or its square root: a float64 tensor there, no synchronisation."""
    device = torch_device(index)
    partials = torch.empty(max(1, plan.cuda_partials(index)), dtype=torch.float64, device=device)
    total = torch.empty((), dtype=torch.float64, device=device)
    plan.cuda_total(norm_type, weighted, root, index, partials.data_ptr(), total.data_ptr(), current_stream(index))
    return total


def norm_of(
    plan: _C.Plan,
    norm_type: float = 2.0,
    reduce: Callable[[Tensor], Tensor] | None = None,
    *,
    weighted: bool = False,
) -> Tensor:
    """The p-norm of everything gathered, a 0-d float64 tensor: on the CPU, or on the first CUDA device in use.

    norm_type: p, not 0; inf and -inf for the largest and the smallest magnitude.
    reduce: turns this process's sum of squares into that of all, for sharded parameters.
    weighted: the 2-norm of parameters times gradients, element by element.
    """
    devices = plan.cuda_devices()
    on_cpu_too = not devices or plan.has_cpu()
    alone = len(devices) == 1 and not on_cpu_too and reduce is None
    root = norm_type == 2.0 and alone  # the last kernel takes it: a launch less
    totals = [_total_on_device(plan, norm_type, weighted, root, index) for index in devices]
    if root:
        return totals[0]
    if on_cpu_too:
        on_cpu = plan.cpu_total(norm_type, weighted, torch.get_num_threads())
        totals.append(torch.tensor(on_cpu, dtype=torch.float64, device="cpu"))
    total = totals[0]
    for other in totals[1:]:
        other = other.to(total.device)
        if math.isinf(norm_type):
            total = torch.maximum(total, other) if norm_type > 0 else torch.minimum(total, other)
        else:
            total = total + other
    if reduce is not None:
        total = reduce(total)
    if norm_type == 2.0:
        return torch.sqrt(total)
    return total if math.isinf(norm_type) or norm_type == 1.0 else total ** (1 / norm_type)


def update(
    plan: _C.Plan, stagings: Sequence[Staging], factor: GradientFactor, norm: Tensor | None = None
) -> Tensor | float | None:
    """Run the kernels over everything gathered, then write back copies. Gives the gradient norm if it was needed.

    norm: the result of norm_of(plan), where the caller has it already.

    The norm is a number, or a 0-d float64 tensor on a CUDA device. Nothing waits for the device unless parameters live on
    the CPU too and need its numbers.
    """
    devices = plan.cuda_devices()
    on_host = not devices or plan.has_cpu()
    # Kernels on a CUDA device skip the step by themselves; for parameters on the CPU the host decides.
    if on_host and factor.found_inf is not None and bool(factor.found_inf):
        return None
    try:
        return _run(plan, factor, devices, on_host, norm)
    finally:
        if plan.has_run():  # where a launch failed, those before it have written, and that must be visible
            updated = plan.updated()
            if updated:
                _compat.increment_version(updated)
            for staging in stagings:
                staging.write_back()


def _run(
    plan: _C.Plan, factor: GradientFactor, devices: list[int], on_host: bool, norm: Tensor | float | None
) -> Tensor | float | None:
    threads = torch.get_num_threads()
    if factor.needs_norm and norm is None:
        if devices or factor.reduce is not None:
            norm = norm_of(plan, reduce=factor.reduce, weighted=factor.weighted)
        else:
            norm = math.sqrt(plan.cpu_total(2.0, factor.weighted, threads))
    host_scale = float(factor.grad_scale) if on_host and factor.grad_scale is not None else 1.0
    host_norm = float(norm) / host_scale if on_host and norm is not None else 0.0
    buffers = {index: _DeviceBuffers(plan, index, factor, norm) for index in devices}
    options = factor.max_norm, factor.normalize, factor.epsilon
    plan.run(threads, options, host_scale, host_norm, {index: buffers[index].addresses for index in devices})
    if norm is None:
        return None
    return buffers[devices[-1]].norm if devices else host_norm


class _DeviceBuffers:
    """The workspace and numbers that a run needs on a CUDA device. They live until the launches are enqueued; torch's
    allocator reuses memory in stream order.

    Attributes:
        norm: where the prepare kernel writes the norm after division by the loss scale; None where none was taken.
        addresses: of the stream, the workspace and the numbers, as the extension takes them.
    """

    def __init__(self, plan: _C.Plan, index: int, factor: GradientFactor, scaled_norm: Tensor | float | None) -> None:
        device = torch_device(index)

        def on_device(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            return None if tensor is None else tensor.detach().to(device=device, dtype=dtype)

        norm = None if scaled_norm is None else torch.as_tensor(scaled_norm)
        self.norm = None if norm is None else torch.empty((), dtype=torch.float64, device=device)
        self._tensors = [
            torch.empty(plan.cuda_workspace(index), dtype=torch.uint8, device=device),
            on_device(norm, torch.float64),
            self.norm,
            on_device(factor.grad_scale, torch.float32),
            on_device(factor.found_inf, torch.float32),
        ]
        self.addresses = current_stream(index), *(0 if t is None else t.data_ptr() for t in self._tensors)
