"""Compares a module with its candidate forward on random inputs: values, gradients, buffers, dtypes, training and eval."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._dtypes import FLOATS
from .swap import Forward, replace_forward


class Inputs(NamedTuple):
    """What a probe calls a module with; floating tensors become random ones of the module's dtype, on its device."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


# Largest error allowed, relative to the largest magnitude; 16-bit modules are compared in float32 first.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}


class Probe:
    """The comparisons of one conversion; modules that are made alike are compared once."""

    def __init__(self) -> None:
        self._verdicts: dict[Any, str | None] = {}

    def difference(self, module: nn.Module, forward: Forward, inputs: Inputs, *, mixed_dtypes: bool) -> str | None:
        """Why `forward` may not replace the module's own; None where both agree.

        mixed_dtypes: compare also inputs of another dtype than the parameters', for which the dtype of the result has to
        agree. The module and the state of the random generators are left as they are.
        """
        reason = _unfit(module)
        if reason is not None:
            return reason
        key = forward, _fingerprint(module)
        if key not in self._verdicts:
            self._verdicts[key] = _difference(module, forward, inputs, mixed_dtypes)
        return self._verdicts[key]


def _fingerprint(module: nn.Module) -> tuple[Any, ...]:
    """Equal for modules that differ in the values of their tensors alone."""
    parts: list[Any] = []
    for name, child in module.named_modules():
        parts.append((name, type(child)))
        for attribute, value in vars(child).items():
            if attribute in ("_parameters", "_buffers"):
                parts.extend((key, None if t is None else (t.shape, t.dtype, t.device)) for key, t in value.items())
            elif not attribute.startswith("_"):
                values = value if isinstance(value, (tuple, list)) else (value,)
                is_plain = all(isinstance(v, (bool, int, float, str, torch.dtype, type(None))) for v in values)
                parts.append((attribute, repr(value) if is_plain else id(value)))
    return tuple(parts)


def _difference(module: nn.Module, forward: Forward, inputs: Inputs, mixed_dtypes: bool) -> str | None:
    reason = None
    device = next((t.device for t in _tensors(module)), torch.device("cpu"))
    dtype = next((t.dtype for t in _tensors(module)), torch.float32)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
        try:
            torch.manual_seed(0)
            twin = _bare_copy(module)
            if dtype not in (torch.float32, torch.float64):
                reason = _compare(copy.deepcopy(twin).float(), forward, _random(inputs, torch.float32, device))
            reason = reason or _compare(twin, forward, _random(inputs, dtype, device))
            for other in (torch.bfloat16, torch.float32) if mixed_dtypes else ():
                if reason is None and other != dtype != torch.float64:
                    reason = _compare(twin, forward, _random(inputs, other, device), tolerant=True)
        except Exception as error:
            return f"the comparison with its own forward failed: {type(error).__name__}: {error}".splitlines()[0]
    return reason


def _unfit(module: nn.Module) -> str | None:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_meta:
            return f"{name} is on the meta device; convert when it has memory"
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"{name} is a {type(tensor).__name__}"
        if tensor.dtype not in FLOATS and tensor.requires_grad:
            return f"{name} has dtype {tensor.dtype}"
    return None


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from (p for p in module.parameters() if p.dtype in FLOATS)
    yield from (b for b in module.buffers() if b.dtype in FLOATS)


def _bare_copy(module: nn.Module) -> nn.Module:
    """A copy without hooks and random masks, with random parameters."""
    twin = copy.deepcopy(module)
    for child in twin.modules():
        for name, value in vars(child).items():
            if name.endswith("_hooks") and isinstance(value, dict):
                value.clear()
        if isinstance(child, nn.modules.dropout._DropoutNd):
            child.p = 0.0
    with torch.no_grad():
        for tensor in _tensors(twin):
            if tensor.dim() > 1:
                tensor.normal_(std=(tensor.numel() // len(tensor)) ** -0.5)
            else:
                tensor.uniform_(0.5, 1.5)
    return twin.requires_grad_(True)


def _random(inputs: Inputs, dtype: torch.dtype, device: torch.device) -> Inputs:
    def fill(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return torch.randn(value.shape, device=device).to(dtype).requires_grad_()
        if isinstance(value, tuple):
            return tuple(fill(item) for item in value)
        return value.to(device) if isinstance(value, Tensor) else value

    return Inputs(fill(inputs.args), {name: fill(value) for name, value in inputs.kwargs.items()})


def _compare(twin: nn.Module, forward: Forward, inputs: Inputs, *, tolerant: bool = False) -> str | None:
    state = {name: tensor.clone() for name, tensor in twin.state_dict().items()}
    own = type(twin)
    for training in (True, False):
        results = []
        for candidate in (None, forward):
            twin.load_state_dict(state)
            twin.train(training)
            if candidate is not None:
                replace_forward(twin, candidate)
            try:
                results.append(_run(twin, inputs))
            except Exception:
                if candidate is None and tolerant:
                    return None  # the module itself does not take such inputs
                raise
            finally:
                twin.__class__ = own
        expected, came = results
        for name, value in expected.items():
            reason = _compare_tensors(name, value, came.get(name), tolerant)
            if reason is not None:
                return f"{reason} in {'training' if training else 'evaluation'}"
    return None


def _run(module: nn.Module, inputs: Inputs) -> dict[str, Tensor | None]:
    """Results, gradients and buffers by name."""
    module.zero_grad()
    leaves = [t for t in _flat((inputs.args, tuple(inputs.kwargs.values()))) if t.requires_grad]
    for leaf in leaves:
        leaf.grad = None
    outputs = list(_flat(module(*inputs.args, **inputs.kwargs)))
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    random = [torch.randn(y.shape, device=y.device, generator=generator).to(y.dtype) for y in outputs]
    differentiable = [(y, dy) for y, dy in zip(outputs, random, strict=True) if y.requires_grad]
    torch.autograd.backward([y for y, _ in differentiable], [dy for _, dy in differentiable])
    found: dict[str, Tensor | None] = {f"result {i}": y.detach() for i, y in enumerate(outputs)}
    found |= {f"the gradient of input {i}": leaf.grad for i, leaf in enumerate(leaves)}
    found |= {f"the gradient of {name}": p.grad for name, p in module.named_parameters()}
    return found | {f"the buffer {name}": b.clone() for name, b in module.named_buffers()}


def _flat(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _flat(item)


def _compare_tensors(name: str, expected: Tensor | None, came: Tensor | None, tolerant: bool) -> str | None:
    if expected is None or came is None:
        return None if expected is came else f"{name} is missing"
    if (expected.shape, expected.dtype) != (came.shape, came.dtype):
        return (
            f"{name} has shape {tuple(came.shape)} and {came.dtype}, not {tuple(expected.shape)} and {expected.dtype}"
        )
    if not expected.numel() or not expected.is_floating_point():
        return None if torch.equal(expected, came) else f"{name} differs"
    tolerance = 0.05 if tolerant else _TOLERANCE[expected.dtype]
    expected, came = expected.double(), came.double()
    error, size = (expected - came).abs().max().item(), expected.abs().max().item()
    return None if error <= tolerance * max(size, 1e-3) else f"{name} differs by {error:.1e}, of {size:.1e}"
