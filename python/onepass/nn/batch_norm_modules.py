"""The BatchNorms as modules, under the rules of modules.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.jit import is_scripting  # type: ignore[attr-defined]
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .._compat import jit_tracing
from .._native.batch_norm import Operands, Running
from . import functional as F
from ._batch_norm import activation_slope, apply_batch_norm, counts_batch
from ._batch_norm_autograd import count_batch
from ._sync_batch_norm import find_sync_group, sync_batch_norm
from ._tools import GuardedEps, record_as_leaf, scripted


def normalise(module: _BatchNorm, input: Tensor, residual: Tensor | None = None, slope: float | None = None) -> Tensor:
    """The forward of every BatchNorm here: normalise by the batch's or the running statistics, count the batch."""
    if has_torch_function_variadic(input, residual) and (node := record_as_leaf(module, input, residual)) is not None:
        return node
    module._check_input_dim(input)  # type: ignore[no-untyped-call]
    training = module.training
    momentum: float | Tensor | None = module.momentum
    running_mean, running_var, batches = module.running_mean, module.running_var, module.num_batches_tracked
    if training and not module.track_running_stats:
        running_mean = running_var = batches = None
    if not training:
        batches = None
    if momentum is None and batches is not None:
        momentum = _cumulative_momentum(batches)
    momentum = 0.0 if momentum is None else momentum
    operands = Operands(input, residual, module.weight, module.bias)
    running = Running(running_mean, running_var, batches, momentum)
    group = find_sync_group(module, input) if training and isinstance(module, SyncBatchNorm) else None
    if group is not None:
        return sync_batch_norm(operands, running, module.eps, slope, group)
    by_batch = training or (running_mean is None and running_var is None)
    if not has_torch_function_variadic(*operands, running_mean, running_var):
        return apply_batch_norm(operands, running, by_batch, module.eps, slope)
    y = _overridden(module, operands, running, by_batch, slope)
    if counts_batch():
        count_batch(batches)
    return y


def _overridden(
    module: _BatchNorm, operands: Operands, running: Running, by_batch: bool, slope: float | None
) -> Tensor:
    """The call for modes and tensor subclasses that override torch's functions: they see the one of `functional`."""
    arguments: Any = operands.x, running.mean, running.var, operands.weight, operands.bias
    options: dict[str, Any] = {"training": by_batch, "momentum": running.momentum, "eps": module.eps}
    function: Any = F.batch_norm
    if isinstance(module, _BatchNormAct) or slope is not None or operands.residual is not None:
        function = F.batch_norm_activation
        options["activation"] = None if slope is None else "leaky_relu" if slope else "relu"
        options |= {"negative_slope": slope or 0.0, "residual": operands.residual}
    y: Tensor = handle_torch_function(function, (*arguments, operands.residual), *arguments, **options)
    return y


def _cumulative_momentum(batches: Tensor) -> float | Tensor:
    """1 / (number of batches, including this one): the running statistics become the mean over all batches."""
    # A Python number would break the graph of torch.compile and be a constant in a trace.
    if is_compiling() or jit_tracing() is not None:
        return (batches + 1).to(torch.float32).reciprocal()
    return 1 / (int(batches) + 1)


class _Forward:
    """The part that the BatchNorm classes share."""

    _scripted = scripted(_BatchNorm.forward)

    def forward(self: Any, input: Tensor) -> Tensor:
        if not is_scripting():
            return normalise(self, input)
        y: Tensor = self._scripted(input)
        return y


class BatchNorm1d(_Forward, nn.BatchNorm1d):
    """torch.nn.BatchNorm1d: input [N, C] or [N, C, L]; see functional.batch_norm."""


class BatchNorm2d(_Forward, nn.BatchNorm2d):
    """torch.nn.BatchNorm2d: input [N, C, H, W]; see functional.batch_norm."""


class BatchNorm3d(_Forward, nn.BatchNorm3d):
    """torch.nn.BatchNorm3d: input [N, C, D, H, W]; see functional.batch_norm."""


class SyncBatchNorm(_Forward, nn.SyncBatchNorm):
    """torch.nn.SyncBatchNorm: in training, mean and variance are those of the batches of all processes together.

    Also works on CPUs, over gloo. Batches may differ in size and be empty. Where it synchronises, it is differentiable
    only once and a graph break under torch.compile.
    """

    _scripted = scripted(nn.SyncBatchNorm.forward)

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """As torch.nn.SyncBatchNorm's, to this class; a BatchNormAct becomes a SyncBatchNormAct."""
        converted = module
        if isinstance(module, _BatchNormAct):
            converted = SyncBatchNormAct._from(module, process_group)
        elif isinstance(module, _BatchNorm):
            converted = nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)  # type: ignore[no-untyped-call]
            converted.__class__ = cls
        for name, child in module.named_children():
            converted.add_module(name, cls.convert_sync_batchnorm(child, process_group))
        return converted


class _BatchNormAct(_BatchNorm):
    """The base of the BatchNormAct classes."""

    eps = GuardedEps()

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = "relu",
        negative_slope: float = 0.01,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        activation_slope(activation, negative_slope)
        self.activation, self.negative_slope = activation, negative_slope

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if not is_scripting():
            return normalise(self, input, residual, activation_slope(self.activation, self.negative_slope))
        y: Tensor = self._scripted(input)  # type: ignore[operator]
        if residual is not None:
            y = y + residual
        if self.activation is None:
            return y
        return nn.functional.leaky_relu(y, 0.0 if self.activation == "relu" else self.negative_slope)

    def extra_repr(self) -> str:
        slope = f", negative_slope={self.negative_slope}" if self.activation == "leaky_relu" else ""
        shown = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{shown}, activation={self.activation}{slope}"


class BatchNormAct1d(_BatchNormAct, BatchNorm1d):
    """activation(BatchNorm1d(input) + residual), residual optional; see functional.batch_norm_activation.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as torch.nn.BatchNorm1d.
        activation, negative_slope: as for functional.batch_norm_activation.
    """


class BatchNormAct2d(_BatchNormAct, BatchNorm2d):
    """activation(BatchNorm2d(input) + residual), residual optional. Arguments as for BatchNormAct1d."""


class BatchNormAct3d(_BatchNormAct, BatchNorm3d):
    """activation(BatchNorm3d(input) + residual), residual optional. Arguments as for BatchNormAct1d."""


class SyncBatchNormAct(_BatchNormAct, SyncBatchNorm):
    """activation(SyncBatchNorm(input) + residual), residual optional.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as torch.nn.SyncBatchNorm.
        activation, negative_slope: as for functional.batch_norm_activation.
        process_group: as torch.nn.SyncBatchNorm.
    """

    def __init__(self, num_features: int, *arguments: Any, process_group: Any = None, **options: Any) -> None:
        super().__init__(num_features, *arguments, **options)
        self.process_group = process_group

    @classmethod
    def _from(cls, module: _BatchNormAct, process_group: Any) -> SyncBatchNormAct:
        converted = cls(
            module.num_features,
            module.eps,
            module.momentum,
            module.affine,
            module.track_running_stats,
            process_group=process_group,
            activation=module.activation,
            negative_slope=module.negative_slope,
        )
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "training"):
            setattr(converted, name, getattr(module, name))
        return converted
