"""The only importer of the extension: rules by name, threads, devices and streams, one update of many tensors."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch  # first: the extension finds torch's OpenMP runtime in the process and links none
from torch import Tensor

from .. import _C, _compat
from .._mend import Mender

fast_reader: bool = _C.set_reader(_compat.exchange_api(), _compat.describe)

_TENSOR_TYPES = (Tensor, torch.nn.Parameter)
_VARIANTS = {(rule, states, grads): index for index, (rule, _, states, _, grads, _) in enumerate(_C.rules())}
_HYPER_NAMES = {rule: hyper for rule, hyper, *_ in _C.rules()}
_PRODUCTS = {rule: product for rule, _, _, product, *_ in _C.rules()}
_TAKES_ROWS = {(rule, states): takes_rows for rule, _, states, _, _, takes_rows in _C.rules()}

# CUDA kernels in this build; in the test build that runs them on the host they take CPU tensors, and no GPU is used.
cuda_kernels: bool = bool(_C.cuda_archs)
has_cuda: bool = cuda_kernels and not _C.cuda_on_host
cuda_archs: str = _C.cuda_archs
compiler: str = _C.compiler
thread_runtime: str = _C.thread_runtime()


def rules() -> tuple[str, ...]:
    """Names of the rules in this build."""
    return tuple(_HYPER_NAMES)


def variants(rule: str) -> tuple[tuple[str, ...], ...]:
    """The states of each variant of the rule."""
    return tuple(states for r, states, _ in _VARIANTS if r == rule)


def state_names(rule: str) -> tuple[str, ...]:
    """Every state that some variant of the rule has."""
    return tuple({name: None for states in variants(rule) for name in states})


def product_name(rule: str) -> str | None:
    """The rule's running product, a 0-d state beside the step count; None where it keeps none."""
    return _PRODUCTS[rule]


def takes_rows(rule: str, states: tuple[str, ...]) -> bool:
    """Whether this variant of the rule updates the rows of a sparse gradient alone."""
    return _TAKES_ROWS[rule, states]


@functools.cache
def foreign_states(rule: str) -> frozenset[str]:
    """States of the other rules that this one does not have."""

    def of(rule: str) -> set[str | None]:
        return {*state_names(rule), product_name(rule)}

    return frozenset(name for other in rules() for name in of(other) - of(rule) if name is not None)


def is_on_cuda(tensor: Tensor) -> bool:
    """Whether the CUDA kernels take this tensor."""
    return tensor.is_cuda or _C.cuda_on_host


def cuda_device_count() -> int:
    """CUDA devices that this build's kernels see; 0 without a driver."""
    return _C.cuda_device_count()


def isas() -> tuple[str, ...]:
    """The CPU instruction sets that this build has and this machine runs, best last."""
    return tuple(_C.isas())


def isa() -> str:
    """The instruction set in use."""
    return _C.isa()


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run with another instruction set, for tests: "baseline", "v3" or "v4"."""
    before = _C.isa()
    _C.use_isa(name)
    try:
        yield
    finally:
        _C.use_isa(before)


def _choose_isa() -> None:
    wanted = os.environ.get("ONEPASS_ISA") or None
    if wanted is not None and wanted not in isas():
        raise ImportError(f"ONEPASS_ISA={wanted}: this build and machine have {', '.join(isas())}")
    _C.use_isa(wanted or isas()[-1])


_choose_isa()


class Group:
    """Parameters that share hyper-parameters, as the native side takes them.

    Args:
        rule: name of the rule, a file in csrc/rules.
        state_names: the states of this variant of the rule, in the rule's order.
        params: the parameters; their `.grad` is read if the rule reads gradients.
        state: optimizer state, {parameter: {name: tensor}}.
        hyper: a number or one-element tensor for each hyper-parameter that the rule's file names.
        reads_grad: of two variants with the same states the one that reads gradients, or the one that does not.
        counts_steps: whether the state has a "step".
        device_scalars: whether "step" lives beside the parameter on CUDA.
        maximize: whether the gradient's sign is turned.
        fresh: parameters whose states were made for this very step, where the rule treats them apart.
        mender: see onepass._mend.
    """

    def __init__(
        self,
        rule: str,
        state_names: tuple[str, ...],
        params: list[Tensor],
        state: dict[Tensor, Any],
        hyper: dict[str, float | Tensor],
        mender: Mender,
        *,
        reads_grad: bool = True,
        counts_steps: bool = False,
        device_scalars: bool = False,
        maximize: bool = False,
        fresh: set[Tensor] | None = None,
    ) -> None:
        self.variant = _VARIANTS[rule, state_names, reads_grad]
        self.params, self.state, self.mender = params, state, mender
        self.hyper = tuple(self._scalar(hyper[name]) for name in _HYPER_NAMES[rule])
        self.counts_steps, self.device_scalars, self.maximize, self.fresh = (
            counts_steps,
            device_scalars,
            maximize,
            fresh,
        )

    def _scalar(self, value: float | Tensor) -> float | Tensor:
        if isinstance(value, Tensor):
            value = value.detach()
            on_device = is_on_cuda(value) and all(p.device == value.device for p in self.params)
            if on_device and value.dtype in (torch.float32, torch.float64):
                return value
        return float(value)  # synchronises where the tensor is on another device than a parameter

    def gather(self, plan: _C.Plan) -> list[int]:
        options = self.variant, self.hyper, self.counts_steps, self.device_scalars, bool(self.maximize)
        return plan.gather(options, self.params, self.state, self.fresh, self.mender)


def new_plan() -> _C.Plan:
    """An empty plan: groups gather into it, `update` runs it."""
    return _C.Plan(_TENSOR_TYPES)


class Clip:
    """What happens to the gradients of one step before the rule: see "From gradient to update" in docs/optimizers.md.

    Args:
        max_norm: clip to this global norm; None: no clipping.
        normalize: divide by the global norm instead.
        epsilon: added to the norm that is divided by.
        weighted: the norm is that of parameters times gradients, element by element.
        grad_scale, found_inf: tensors of a GradScaler, or None.
        reduce: turns the sum of squares of this process's gradients into that of all processes; for sharded parameters.
    """

    def __init__(
        self,
        max_norm: float | None = None,
        normalize: bool = False,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        reduce: Callable[[Tensor], Tensor] | None = None,
        epsilon: float = 0.0,
        weighted: bool = False,
    ) -> None:
        self.max_norm, self.normalize = None if max_norm is None else float(max_norm), bool(normalize)
        self.grad_scale, self.found_inf = grad_scale, found_inf
        self.reduce, self.epsilon, self.weighted = reduce, epsilon, weighted

    @property
    def needs_norm(self) -> bool:
        return self.max_norm is not None or self.normalize


def _total_on_device(plan: _C.Plan, norm_type: float, weighted: bool, device: int) -> Tensor:
    """Total over the gradients on a CUDA device: a float64 tensor there, no synchronisation."""
    where = _torch_device(device)
    partials = torch.empty(max(1, plan.cuda_partials(device)), dtype=torch.float64, device=where)
    total = torch.empty((), dtype=torch.float64, device=where)
    plan.cuda_total(norm_type, weighted, device, partials.data_ptr(), total.data_ptr(), _stream(device))
    return total


def _torch_device(device: int) -> torch.device:
    return torch.device("cpu") if _C.cuda_on_host else torch.device("cuda", device)


def _stream(device: int) -> int:
    return 0 if _C.cuda_on_host else _compat.current_stream(device)


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
    totals = [_total_on_device(plan, norm_type, weighted, device) for device in devices]
    if not devices or plan.has_cpu():
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


def update(plan: _C.Plan, menders: Sequence[Mender], clip: Clip, norm: Tensor | None = None) -> Tensor | float | None:
    """Write: run the kernels over everything gathered, then what belongs to it. Gives the gradient norm, if it was needed.

    norm: what norm_of(plan) gave, where the caller has asked already.

    The norm is a number, or a 0-d float64 tensor on a CUDA device. Nothing waits for the device unless parameters live on
    the CPU too and need its numbers.
    """
    devices = plan.cuda_devices()
    on_host = not devices or plan.has_cpu()
    # What the kernels on a CUDA device skip by themselves, the host has to skip for parameters on the CPU.
    if on_host and clip.found_inf is not None and bool(clip.found_inf):
        return None
    try:
        return _run(plan, clip, devices, on_host, norm)
    finally:
        if plan.has_run():  # a launch that failed left those before it done: they have to be seen
            updated = plan.updated()
            if updated:
                _compat.increment_version(updated)
            for mender in menders:
                mender.finish()


def _run(
    plan: _C.Plan, clip: Clip, devices: list[int], on_host: bool, norm: Tensor | float | None
) -> Tensor | float | None:
    threads = torch.get_num_threads()
    if clip.needs_norm and norm is None:
        if devices or clip.reduce is not None:
            norm = norm_of(plan, reduce=clip.reduce, weighted=clip.weighted)
        else:
            norm = math.sqrt(plan.cpu_total(2.0, clip.weighted, threads))
    host_scale = float(clip.grad_scale) if on_host and clip.grad_scale is not None else 1.0
    host_norm = float(norm) / host_scale if on_host and norm is not None else 0.0
    places = {device: _Place(plan, device, clip, norm) for device in devices}
    options = clip.max_norm, clip.normalize, clip.epsilon
    plan.run(threads, options, host_scale, host_norm, {device: place.addresses for device, place in places.items()})
    if norm is None:
        return None
    return places[devices[-1]].norm if devices else host_norm


class _Place:
    """What a run needs on a CUDA device. Its tensors live until the launches are enqueued; torch's allocator orders reuse
    by stream.

    Attributes:
        norm: where the prepare kernel writes the norm after division by the loss scale; None where none was taken.
        addresses: of the stream, the workspace and the numbers, as the extension takes them.
    """

    def __init__(self, plan: _C.Plan, device: int, clip: Clip, scaled_norm: Tensor | float | None) -> None:
        where = _torch_device(device)

        def there(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            return None if tensor is None else tensor.detach().to(device=where, dtype=dtype)

        norm = None if scaled_norm is None else torch.as_tensor(scaled_norm)
        self.norm = None if norm is None else torch.empty((), dtype=torch.float64, device=where)
        self._tensors = [
            torch.empty(plan.cuda_workspace(device), dtype=torch.uint8, device=where),
            there(norm, torch.float64),
            self.norm,
            there(clip.grad_scale, torch.float32),
            there(clip.found_inf, torch.float32),
        ]
        self.addresses = _stream(device), *(0 if t is None else t.data_ptr() for t in self._tensors)


def _gather_gradients(gradients: list[Tensor], limit: float) -> tuple[_C.Plan, Mender]:
    mender = Mender(lambda index: f"gradient {index}", (), cuda_kernels)
    plan = new_plan()
    Group("clip", (), gradients, {}, {"limit": limit}, mender, reads_grad=False).gather(plan)
    return plan, mender


def check_finite(norm: Tensor, norm_type: float, error_if_nonfinite: bool) -> None:
    """Raise torch's RuntimeError for a norm that is NaN or infinite, if asked to (that reads it on the host)."""
    if error_if_nonfinite and not bool(torch.isfinite(norm)):
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be clipped. To "
            f"disable this error and scale the gradients by the non-finite norm anyway, set `error_if_nonfinite=False`"
        )


def clip_to_norm(
    gradients: list[Tensor], max_norm: float, norm_type: float, dtype: torch.dtype, error_if_nonfinite: bool
) -> Tensor:
    """Scale tensors in place to a global p-norm; gives the norm before, a 0-d tensor of the dtype asked for."""
    plan, mender = _gather_gradients(gradients, math.inf)
    norm = norm_of(plan, norm_type)
    check_finite(norm.to(dtype), norm_type, error_if_nonfinite)
    if plan.cuda_devices() or not max_norm / (float(norm) + 1e-6) >= 1:  # on the CPU a factor of 1 needs no pass
        update(plan, [mender], Clip(max_norm=max_norm), norm)
    return norm.to(dtype)


def clip_to_value(gradients: list[Tensor], limit: float) -> None:
    """Clamp tensors in place to [-limit, limit]."""
    plan, mender = _gather_gradients(gradients, limit)
    update(plan, [mender], Clip())
