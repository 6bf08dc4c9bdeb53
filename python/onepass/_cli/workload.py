"""What `bench` measures a step on: lists of tensors, ours, a known network's or a user's."""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import shapes
from .output import UsageError

_KNOWN: dict[str, tuple[str, Callable[[], shapes.Shapes]]] = {
    "resnet50": ("ResNet-50", shapes.resnet50),
    "gpt2": ("GPT-2 small", shapes.gpt2_small),
}


@dataclass(frozen=True)
class Workload:
    """A list of parameters: a shape and a dtype for each."""

    name: str
    tensors: list[tuple[tuple[int, ...], torch.dtype]]

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for shape, _ in self.tensors)

    @property
    def bytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.tensors)

    @property
    def dtypes(self) -> str:
        return ", ".join(sorted({str(dtype).removeprefix("torch.") for _, dtype in self.tensors}))

    def parameters(self, device: torch.device) -> list[Tensor]:
        """New parameters with gradients, of the magnitude that they have in training."""
        params = []
        for shape, dtype in self.tensors:
            param = torch.randn(shape, device=device).mul_(0.02).to(dtype).requires_grad_()
            param.grad = param.detach().clone()
            params.append(param)
        return params


def usual(quick: bool) -> list[Workload]:
    """One large tensor, many of middle size, many tiny ones."""
    large, middle = (4_000_000, 25) if quick else (25_000_000, 160)
    lists: dict[str, shapes.Shapes] = {
        f"1 x {large // 1_000_000}M": [(large,)],
        f"{middle} x 160k": [(400, 400)] * middle,
        "1000 x 256": [(256,)] * 1000,
    }
    return [_of_shapes(name, sizes) for name, sizes in lists.items()]


def like(text: str) -> Workload:
    """The workload that `--like` names: a known network or FILE:CALLABLE."""
    if text in _KNOWN:
        name, make = _KNOWN[text]
        return _of_shapes(name, make())
    file, colon, name = text.rpartition(":")
    if not colon or not file or not name:
        raise UsageError(f"{text!r} is not {', '.join(_KNOWN)} or FILE:CALLABLE, such as model.py:make_model")
    made = _call(Path(file), name)
    if isinstance(made, nn.Module):
        made = [param for param in made.parameters() if param.requires_grad]
    return Workload(f"{Path(file).name}:{name}", _tensors(made, text))


def _of_shapes(name: str, sizes: shapes.Shapes) -> Workload:
    return Workload(name, [(size, torch.float32) for size in sizes])


def _call(file: Path, name: str) -> object:
    """The result of a callable of a user's file; the file may import its neighbours, as if it were run."""
    spec = importlib.util.spec_from_file_location(file.stem, file) if file.is_file() else None
    if spec is None or spec.loader is None:
        raise UsageError(f"{file} does not end in .py" if file.is_file() else f"there is no file {file}")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(file.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UsageError(f"{file} cannot be imported: {_describe(error)}") from error
    make: Callable[[], object] | None = getattr(module, name, None)
    if not callable(make):
        raise UsageError(f"{file} has no callable {name!r}")
    try:
        return make()
    except (Exception, SystemExit) as error:
        raise UsageError(f"{name}() of {file} failed: {_describe(error)}") from error


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _tensors(made: Any, text: str) -> list[tuple[tuple[int, ...], torch.dtype]]:
    expected = "expected a torch.nn.Module or a list of floating-point tensors or shapes"
    if not isinstance(made, list | tuple):
        raise UsageError(f"{text} returned {type(made).__name__}: {expected}")
    result = []
    for i, item in enumerate(made):
        if isinstance(item, Tensor) and item.is_floating_point():
            result.append((tuple(item.shape), item.dtype))
        elif isinstance(item, list | tuple) and all(type(size) is int and size >= 0 for size in item):
            result.append((tuple(item), torch.float32))
        else:
            what = f"a tensor of {item.dtype}" if isinstance(item, Tensor) else repr(item)[:60]
            raise UsageError(f"{text}: entry {i} is {what}: {expected}")
    if not any(math.prod(shape) for shape, _ in result):
        raise UsageError(f"{text} has no parameters: there is nothing to update")
    return result
