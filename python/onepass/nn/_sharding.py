"""Layers on DTensors, the tensors of tensor and sequence parallelism.

NOTE: [layers on DTensors]
Each process runs the usual layer, with its autograd, on its part of the input. Dimensions that the layer reduces over have
to be whole on every process: an input that is sharded along one of them is gathered first, as torch does it, and pending
sums are summed. Weights are gathered too, and their gradients are pending sums (Partial) where the input is sharded.
Operators have no sharding strategies for that: packed masks and statistics of rows are not divided as the inputs are.

Dropout with a seed has the mask of the whole tensor, as everywhere. Otherwise each part draws a seed of its own: masks of
different parts are independent even where all generators are in the same state, and copies of a part have the same mask
even where the generators differ.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any

from torch import Tensor

from .. import _compat
from ._nested import Operands, on_values


def opener(*tensors: object) -> Callable[..., Any] | None:
    """How to call a layer on what the tensors hold: on_parts or on_values; None where they hold nothing but themselves."""
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.is_nested:
            return on_values
    return on_parts if holds_parts(*tensors) else None


def holds_parts(*tensors: object) -> bool:
    """Whether one of them is a DTensor."""
    dtensor = _compat.dtensor_type()
    return dtensor is not None and any(isinstance(tensor, dtensor) for tensor in tensors)


def on_parts(function: str, call: Callable[..., Any], inputs: Operands, affine: Operands, normalized: int) -> Any:
    """`call` on this process's parts of DTensors, see NOTE: [layers on DTensors].

    Args:
        function: its name, for errors.
        call: takes the parts of `inputs` and then those of `affine`; gives a tensor like the first input, or a tuple.
        inputs: of one shape. The first one says how they are divided.
        affine: of the last `normalized` dimensions.
        normalized: how many dimensions, the last ones, have to be whole.
    """
    mesh = _mesh_of(function, {**inputs, **affine})
    x: Any = next(iter(inputs.values()))
    placements = _kept(x.placements, range(x.dim() - normalized))
    parts = [_part(tensor, mesh, placements, placements) for tensor in inputs.values()]
    whole, pending = _of_weights(placements)
    weights = [_part(tensor, mesh, whole, pending) for tensor in affine.values()]
    return _joined(call(*parts, *weights), x, mesh, placements)


def batch_norm_on_parts(
    call: Callable[..., Any], inputs: Operands, affine: Operands, running: Operands, training: bool
) -> Any:
    """The same for BatchNorm: call(x, residual, weight, bias, running_mean, running_var).

    In training the batch is whole on every process: its statistics are those of all of it. Channels stay divided if the
    running statistics, which are written in place, are divided alike.
    """
    mesh = _mesh_of("batch_norm", {**inputs, **affine, **running})
    x: Any = next(iter(inputs.values()))
    replicate, shard, partial = _compat.placement_types()
    placements, whole, pending = [], [], []
    for dim, placement in enumerate(_kept(x.placements, (1,) if training else range(x.dim()))):
        states = [state.placements[dim] for state in running.values() if state is not None]
        by_channel = all(p.is_shard() for p in states) if states else placement == shard(1)
        others = placement.is_shard() and placement != shard(1) and not by_channel
        placements.append(shard(1) if by_channel else placement if others else replicate())
        whole.append(shard(0) if by_channel else replicate())
        pending.append(shard(0) if by_channel else partial() if others else replicate())
    for name, state in running.items():
        if state is not None and list(state.placements) != whole:
            raise RuntimeError(
                f"batch_norm: {name} is placed {state.placements}; running statistics are written in place, so both have to "
                f"be placed Replicate() or Shard(0), alike."
            )
    parts = [_part(tensor, mesh, tuple(placements), tuple(placements)) for tensor in inputs.values()]
    weights = [_part(tensor, mesh, tuple(whole), tuple(pending)) for tensor in affine.values()]
    states = [None if state is None else _compat.local_of(state) for state in running.values()]
    return _joined(call(*parts, *weights, *states), x, mesh, tuple(placements))


def whole_mask(keep: Tensor, like: Any) -> Tensor:
    """A tensor that every process has, as a DTensor of the mesh of another one."""
    replicate, _, _ = _compat.placement_types()
    joined: Tensor = type(like).from_local(
        keep, like.device_mesh, [replicate()] * like.device_mesh.ndim, run_check=False
    )
    return joined


def seed_of_part(seed: Tensor, like: Any) -> Tensor:
    """From the seeds that the processes drew: one for each part of `like`, the same for each copy of a part.

    Copies get the first process's, 8 bytes for each mesh dimension along which `like` is replicated. Parts count upwards.
    """
    mesh = like.device_mesh
    coordinates = mesh.get_coordinate()
    number = 0
    for dim, placement in enumerate(_kept(like.placements, range(like.dim()))):
        if placement.is_shard():
            number = number * mesh.size(dim) + coordinates[dim]
        elif mesh.size(dim) > 1:
            seed = _compat.broadcast_from_first(seed, mesh, dim)
    return seed + number


# --- placements -------------------------------------------------------------------------------------------------------


def _kept(placements: Sequence[Any], dims: Container[int]) -> tuple[Any, ...]:
    """The placements of an input of which the dimensions `dims` may be divided: anything else becomes whole."""
    replicate, _, _ = _compat.placement_types()
    return tuple(p if p.is_shard() and p.dim in dims else replicate() for p in placements)


def _of_weights(placements: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Where weights are beside an input, and their gradients: sums over the parts of the input."""
    replicate, _, partial = _compat.placement_types()
    return tuple(replicate() for _ in placements), tuple(partial() if p.is_shard() else replicate() for p in placements)


def _mesh_of(function: str, operands: Operands) -> Any:
    """The mesh of all operands."""
    mesh = None
    for name, tensor in operands.items():
        if tensor is None:
            continue
        if not holds_parts(tensor):
            raise RuntimeError(
                f"{function}: got mixed torch.Tensor and DTensor, need to convert all torch.Tensor to DTensor before calling "
                f"distributed operators! {name} is a {type(tensor).__name__}; see distribute_tensor and distribute_module."
            )
        other = tensor.device_mesh
        if mesh is not None and other != mesh:
            raise RuntimeError(f"{function}: {name} is on {other}, other operands are on {mesh}. One mesh is expected.")
        mesh = other
    return mesh


def _part(tensor: Any, mesh: Any, placements: tuple[Any, ...], gradients: tuple[Any, ...]) -> Tensor | None:
    """This process's part of a DTensor that is placed so, with the placements of the gradient that comes back for it."""
    if tensor is None:
        return None
    if tuple(tensor.placements) != placements:
        tensor = tensor.redistribute(mesh, placements)
    part: Tensor = tensor.to_local(grad_placements=gradients)
    return part


def _joined(results: Any, x: Any, mesh: Any, placements: tuple[Any, ...]) -> Any:
    """The DTensor of which the processes hold the parts."""
    if isinstance(results, tuple):
        return tuple(_joined(result, x, mesh, placements) for result in results)
    stride = _contiguous(x.shape) if results.is_contiguous() else x.stride()
    return type(x).from_local(results, mesh, placements, run_check=False, shape=x.shape, stride=stride)


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step = step * max(size, 1)
    return tuple(reversed(strides))
