"""Layers on DTensors, the tensors of tensor and sequence parallelism.

NOTE: [layers on DTensors]
Each process runs the usual layer, with its autograd, on its local tensor. Dimensions that the layer reduces over must
be whole on every process: as in torch, an input that is sharded along one of them is gathered first, and pending sums
(Partial) are summed. Weights are gathered too, and their gradients are pending sums where the input is sharded.
Sharding strategies of operators cannot express this: packed masks and row statistics are not sharded like the inputs.

Dropout with a seed has the mask of the full tensor, as everywhere. Otherwise each shard draws its own seed: masks of
different shards are independent even if all generators are in the same state, and replicas of a shard have the same
mask even if the generators differ.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any

from torch import Tensor

from .. import _compat
from ._nested import NamedTensors, call_on_values


def find_unwrapper(*tensors: object) -> Callable[..., Any] | None:
    """call_on_values for nested tensors, call_on_local for DTensors, otherwise None."""
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.is_nested:
            return call_on_values
    return call_on_local if has_dtensor(*tensors) else None


def has_dtensor(*tensors: object) -> bool:
    """Whether one of the arguments is a DTensor."""
    dtensor = _compat.dtensor_type()
    return dtensor is not None and any(isinstance(tensor, dtensor) for tensor in tensors)


def call_on_local(
    function: str, call: Callable[..., Any], inputs: NamedTensors, affine: NamedTensors, normalized: int
) -> Any:
    """Run `call` on this process's local tensors of DTensors, see NOTE: [layers on DTensors].

    Args:
        function: the layer's name, for errors.
        call: takes the local tensors of `inputs`, then of `affine`; returns a tensor like the first input, or a tuple.
        inputs: DTensors of one shape. The placements of the first one decide how all are sharded.
        affine: weights over the last `normalized` dimensions.
        normalized: the number of trailing dimensions that must be whole.
    """
    mesh = _common_mesh(function, {**inputs, **affine})
    x: Any = next(iter(inputs.values()))
    placements = _keep_sharded(x.placements, range(x.dim() - normalized))
    local_inputs = [_to_local(tensor, mesh, placements, placements) for tensor in inputs.values()]
    local_affine = [_to_local(tensor, mesh, *_affine_placements(placements)) for tensor in affine.values()]
    return _from_local(call(*local_inputs, *local_affine), x, mesh, placements)


def batch_norm_on_local(
    call: Callable[..., Any], inputs: NamedTensors, affine: NamedTensors, running: NamedTensors, training: bool
) -> Any:
    """The same for BatchNorm: call(x, residual, weight, bias, running_mean, running_var).

    In training the batch is gathered on every process, so that the statistics are those of the full batch. Channels
    stay sharded if the running statistics, which are written in place, are sharded alike.
    """
    mesh = _common_mesh("batch_norm", {**inputs, **affine, **running})
    x: Any = next(iter(inputs.values()))
    replicate, shard, partial = _compat.placement_types()
    placements, channel_placements, gradient_placements = [], [], []
    for dim, placement in enumerate(_keep_sharded(x.placements, (1,) if training else range(x.dim()))):
        states = [state.placements[dim] for state in running.values() if state is not None]
        by_channel = all(p.is_shard() for p in states) if states else placement == shard(1)
        by_other_dim = placement.is_shard() and placement != shard(1) and not by_channel
        placements.append(shard(1) if by_channel else placement if by_other_dim else replicate())
        channel_placements.append(shard(0) if by_channel else replicate())
        gradient_placements.append(shard(0) if by_channel else partial() if by_other_dim else replicate())
    for name, state in running.items():
        if state is not None and list(state.placements) != channel_placements:
            raise RuntimeError(
                f"batch_norm: {name} is placed {state.placements}; running statistics are written in place, so both need the "
                f"same placements, Replicate() or Shard(0)."
            )
    affine_placements = tuple(channel_placements), tuple(gradient_placements)
    local_inputs = [_to_local(tensor, mesh, tuple(placements), tuple(placements)) for tensor in inputs.values()]
    local_affine = [_to_local(tensor, mesh, *affine_placements) for tensor in affine.values()]
    local_running = [None if state is None else _compat.local_of(state) for state in running.values()]
    return _from_local(call(*local_inputs, *local_affine, *local_running), x, mesh, tuple(placements))


def replicate_tensor(tensor: Tensor, like: Any) -> Tensor:
    """A tensor that is the same on every process, as a replicated DTensor on the mesh of `like`."""
    mesh = like.device_mesh
    replicate, _, _ = _compat.placement_types()
    replicated: Tensor = type(like).from_local(tensor, mesh, [replicate()] * mesh.ndim, run_check=False)
    return replicated


def local_seed(seed: Tensor, like: Any) -> Tensor:
    """A seed per shard of `like`, the same for all replicas of a shard, from the seeds that the processes drew.

    Replicas take the first process's seed: a broadcast of 8 bytes per mesh dimension along which `like` is replicated.
    The shard's number is added to it.
    """
    mesh = like.device_mesh
    coordinates = mesh.get_coordinate()
    shard_number = 0
    for dim, placement in enumerate(_keep_sharded(like.placements, range(like.dim()))):
        if placement.is_shard():
            shard_number = shard_number * mesh.size(dim) + coordinates[dim]
        elif mesh.size(dim) > 1:
            seed = _compat.broadcast_from_first(seed, mesh, dim)
    return seed + shard_number


# --- placements -------------------------------------------------------------------------------------------------------


def _keep_sharded(placements: Sequence[Any], dims: Container[int]) -> tuple[Any, ...]:
    """The placements with Replicate for everything but shards along one of the dimensions `dims`."""
    replicate, _, _ = _compat.placement_types()
    return tuple(p if p.is_shard() and p.dim in dims else replicate() for p in placements)


def _affine_placements(placements: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Placements of weights and of their gradients, which are sums over the shards of the input."""
    replicate, _, partial = _compat.placement_types()
    return tuple(replicate() for _ in placements), tuple(partial() if p.is_shard() else replicate() for p in placements)


def _common_mesh(function: str, operands: NamedTensors) -> Any:
    """The mesh of all operands. Raises RuntimeError for a plain tensor or a second mesh."""
    mesh = None
    for name, tensor in operands.items():
        if tensor is None:
            continue
        if not has_dtensor(tensor):
            raise RuntimeError(
                f"{function}: got mixed torch.Tensor and DTensor, need to convert all torch.Tensor to DTensor before calling "
                f"distributed operators! {name} is a {type(tensor).__name__}; see distribute_tensor and distribute_module."
            )
        other = tensor.device_mesh
        if mesh is not None and other != mesh:
            raise RuntimeError(f"{function}: {name} is on {other}, other operands are on {mesh}. One mesh is expected.")
        mesh = other
    return mesh


def _to_local(tensor: Any, mesh: Any, placements: tuple[Any, ...], gradients: tuple[Any, ...]) -> Tensor | None:
    """This process's local tensor, redistributed to `placements`. `gradients`: the placements of its gradient."""
    if tensor is None:
        return None
    if tuple(tensor.placements) != placements:
        tensor = tensor.redistribute(mesh, placements)
    local: Tensor = tensor.to_local(grad_placements=gradients)
    return local


def _from_local(results: Any, x: Any, mesh: Any, placements: tuple[Any, ...]) -> Any:
    """The DTensors, of x's shape, whose local tensors are `results`."""
    if isinstance(results, tuple):
        return tuple(_from_local(result, x, mesh, placements) for result in results)
    stride = _contiguous_strides(x.shape) if results.is_contiguous() else x.stride()
    return type(x).from_local(results, mesh, placements, run_check=False, shape=x.shape, stride=stride)


def _contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step = step * max(size, 1)
    return tuple(reversed(strides))
