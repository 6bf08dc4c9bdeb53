"""Compares a module with its candidate forward on random inputs: values, gradients, buffers, dtypes, training and eval."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from .._dtypes import FLOATS
from .swap import Forward


class Inputs(NamedTuple):
    """What a probe calls a module with; floating tensors become random ones of the module's dtype, on its device.

    Attributes:
        is_optional: whether the module's own forward may refuse them.
        scale: of the random numbers.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = {}  # noqa: RUF012 never changed
    is_optional: bool = False
    scale: float = 1.0


# Largest error allowed, relative to the largest magnitude; 16-bit modules are compared in float32 first.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_TOLERANCE_16_BITS = 0.05
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class Probe:
    """The comparisons of one conversion; modules that are made alike are compared once."""

    def __init__(self) -> None:
        self._verdicts: dict[Any, str | None] = {}

    def difference(
        self, module: nn.Module, forward: Forward, inputs: Sequence[Inputs], *, mixed_dtypes: bool
    ) -> str | None:
        """Why `forward` may not replace the module's own; None where both agree.

        mixed_dtypes: compare also inputs of another dtype than the parameters', for which the dtype of the result has to
        agree. The module and the state of the random generators are left as they are.
        """
        reason = _unfit(module)
        if reason is not None:
            return reason
        key = forward, _fingerprint(module)
        if key not in self._verdicts:
            try:
                self._verdicts[key] = _difference(module, forward, inputs, mixed_dtypes)
            except Exception as error:
                first_line = f"{error}".partition("\n")[0]
                reason = f"the comparison with its own forward failed: {type(error).__name__}: {first_line}"
                self._verdicts[key] = reason
        return self._verdicts[key]


def _unfit(module: nn.Module) -> str | None:
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_meta:
            return f"{name} is on the meta device; convert when it has memory"
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"{name} is a {type(tensor).__name__}"
        if tensor.dtype not in FLOATS and tensor.requires_grad:
            return f"{name} has dtype {tensor.dtype}"
    return None


def _fingerprint(module: nn.Module) -> tuple[Any, ...]:
    """Equal for modules that differ in the values of their tensors alone."""
    parts: list[Any] = []
    for name, child in module.named_modules():
        parts.append((name, type(child), child.training))
        for attribute, value in vars(child).items():
            if attribute in ("_parameters", "_buffers"):
                parts.extend((key, None if t is None else (t.shape, t.dtype, t.device)) for key, t in value.items())
            elif attribute not in _OF_EVERY_MODULE:
                values = value if isinstance(value, (tuple, list)) else (value,)
                is_plain = all(isinstance(v, (bool, int, float, str, torch.dtype, type(None))) for v in values)
                parts.append((attribute, repr(value) if is_plain else id(value)))
    return tuple(parts)


def _difference(module: nn.Module, forward: Forward, inputs: Sequence[Inputs], mixed_dtypes: bool) -> str | None:
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.dtype in FLOATS]
    device = tensors[0].device if tensors else torch.device("cpu")
    dtype = tensors[0].dtype if tensors else torch.float32
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad():
        comparison = _Comparison(_bare_copy(module), forward, Generator(device).manual_seed(0))
        if dtype not in _TOLERANCE:
            twin = copy.deepcopy(comparison.twin).float()
            exact = _Comparison(twin, forward, comparison.generator)
            if (reason := exact.run(inputs, torch.float32)) is not None:
                return reason
        if (reason := comparison.run(inputs, dtype)) is not None:
            return reason
        for other in (torch.bfloat16, torch.float32) if mixed_dtypes and dtype != torch.float64 else ():
            case = inputs[0]._replace(is_optional=True)
            if other != dtype and (reason := comparison.run([case], other, tolerance=_TOLERANCE_16_BITS)) is not None:
                return reason
        dropouts = [child for child in comparison.twin.modules() if isinstance(child, nn.modules.dropout._DropoutNd)]
        for dropout in dropouts:  # where they are: with p = 1 nothing gets past them
            dropout.p = 1.0
        return comparison.run(inputs[:1], dtype) if dropouts else None


def _bare_copy(module: nn.Module) -> nn.Module:
    """A copy without hooks and random masks."""
    without_hooks: dict[int, Any] = {}
    for child in module.modules():
        for name, value in vars(child).items():
            if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and isinstance(value, dict):
                without_hooks[id(value)] = type(value)()
    twin = copy.deepcopy(module, without_hooks)
    for child in twin.modules():
        if isinstance(child, nn.modules.dropout._DropoutNd):
            child.p = 0.0
    return twin.requires_grad_(True)


class _Comparison:
    """A module's own forward against another one, with random parameters."""

    def __init__(self, twin: nn.Module, forward: Forward, generator: Generator) -> None:
        self.twin, self.forward, self.generator = twin, forward, generator
        with torch.no_grad():
            for tensor in (*twin.parameters(), *twin.buffers()):
                if tensor.dtype not in FLOATS:
                    continue
                if tensor.dim() > 1:
                    tensor.normal_(std=(tensor.numel() // max(len(tensor), 1)) ** -0.5, generator=generator)
                else:
                    tensor.uniform_(0.5, 1.5, generator=generator)
        self.buffers = [(buffer, buffer.clone()) for buffer in twin.buffers()]

    def run(self, inputs: Sequence[Inputs], dtype: torch.dtype, *, tolerance: float | None = None) -> str | None:
        """tolerance: relative to the largest magnitude; None: by the dtype of each tensor."""
        for case in inputs:
            random = self._random(case, dtype)
            for training in (True, False):
                self.twin.train(training)
                before = _fingerprint(self.twin)
                try:
                    expected = self._results(random, None)
                except Exception:
                    if case.is_optional:
                        break
                    raise
                if _fingerprint(self.twin) != before:
                    return "its own forward changes its attributes"
                actual = self._results(random, self.forward)
                for name in expected | actual:
                    reason = _compare(name, expected.get(name), actual.get(name), tolerance)
                    if reason is not None:
                        return f"{reason} in {'training' if training else 'evaluation'}"
        return None

    def _random(self, inputs: Inputs, dtype: torch.dtype) -> Inputs:
        device = self.generator.device

        def fill(value: Any) -> Any:
            if isinstance(value, Tensor) and value.is_floating_point():
                drawn = torch.randn(value.shape, device=device, generator=self.generator)
                return (drawn * inputs.scale).to(dtype).requires_grad_()
            if isinstance(value, tuple):
                return tuple(fill(item) for item in value)
            return value.to(device) if isinstance(value, Tensor) else value

        kwargs = {name: fill(value) for name, value in inputs.kwargs.items()}
        return inputs._replace(args=fill(inputs.args), kwargs=kwargs)

    def _results(self, inputs: Inputs, forward: Forward | None) -> dict[str, Any]:
        """Results, gradients and buffers by name, of the module's own forward or of another one."""
        twin = self.twin
        twin.zero_grad()
        for buffer, value in self.buffers:
            buffer.copy_(value)
        leaves = [t for _, t in _leaves("", (inputs.args, inputs.kwargs)) if isinstance(t, Tensor) and t.requires_grad]
        for leaf in leaves:
            leaf.grad = None
        with torch.random.fork_rng([self.generator.device] if self.generator.device.type == "cuda" else []):
            call = twin.forward if forward is None else functools.partial(forward, twin)
            results = dict(_leaves("result", call(*inputs.args, **inputs.kwargs)))
        found = {name: y.detach() if isinstance(y, Tensor) else y for name, y in results.items()}
        generator = Generator(self.generator.device).manual_seed(1)
        differentiable = [y for y in results.values() if isinstance(y, Tensor) and y.requires_grad]
        random = [torch.randn(y.shape, device=y.device, generator=generator).to(y.dtype) for y in differentiable]
        if differentiable:
            torch.autograd.backward(differentiable, random)
        found |= {f"the gradient of input {i}": leaf.grad for i, leaf in enumerate(leaves)}
        found |= {f"the gradient of {name}": p.grad for name, p in twin.named_parameters()}
        return found | {f"the buffer {name}": b.clone() for name, b in twin.named_buffers()}


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What containers hold, by the path to it, which names the containers' types."""
    if isinstance(value, dict):
        items: Any = value.items()
    elif isinstance(value, (tuple, list)):
        items = enumerate(value)
    else:
        yield name, value
        return
    yield f"{name}: {type(value).__qualname__}", len(value)
    for key, item in items:
        yield from _leaves(f"{name}[{key!r}]", item)


def _compare(name: str, expected: Any, actual: Any, tolerance: float | None) -> str | None:
    if not isinstance(expected, Tensor) or not isinstance(actual, Tensor):
        same = type(expected) is type(actual) and (expected is actual or expected == actual)
        return None if same else f"{name} differs"
    if (expected.shape, expected.dtype) != (actual.shape, actual.dtype):
        return f"{name} has shape {tuple(actual.shape)} and {actual.dtype}, not {tuple(expected.shape)} and {expected.dtype}"
    if not expected.numel() or not expected.is_floating_point():
        return None if torch.equal(expected, actual) else f"{name} differs"
    tolerance = tolerance or _TOLERANCE.get(expected.dtype, _TOLERANCE_16_BITS)
    expected, actual = expected.double(), actual.double()
    error, size = (expected - actual).abs().max().item(), expected.abs().max().item()
    return None if error <= tolerance * max(size, 0.1) else f"{name} differs by {error:.1e}, of {size:.1e}"
