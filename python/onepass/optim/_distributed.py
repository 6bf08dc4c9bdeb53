"""Global gradient norm over sharded parameters (DTensor: FSDP2, tensor parallel)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import _compat


def reduce_sharded(
    groups: list[dict[str, Any]], subject: str = "max_norm and normalize_grads need"
) -> Callable[[Tensor], Tensor] | None:
    """A function from this process's sum of squares to the sum over all processes; None where nothing is sharded.

    All gradients have to be DTensors sharded over the same mesh dimensions; each of these takes one all-reduce. Replicated
    dimensions hold the same numbers everywhere and are not summed. subject: how the error begins where gradients differ.
    """
    dtensor: Any = _compat.dtensor_type()
    if dtensor is None:
        return None
    layouts: dict[tuple[Any, tuple[int, ...]], None] = {}
    plain = False
    for group in groups:
        for param in group["params"]:
            if param.grad is None and not (isinstance(param, dtensor) and param.requires_grad):
                continue  # a DTensor without a gradient here may have one elsewhere in the mesh
            if isinstance(param, dtensor):
                sharded = tuple(d for d, placement in enumerate(param.placements) if placement.is_shard())
                layouts[(param.device_mesh, sharded)] = None
            else:
                plain = True
    sharded_layouts = [layout for layout in layouts if layout[1]]
    if not sharded_layouts:
        return None
    if plain or len(layouts) > 1:
        raise RuntimeError(
            f"{subject} all parameters sharded alike; here some are sharded over other mesh dimensions or not at all. Clip "
            f"before the step with torch.nn.utils.clip_grad_norm_ on each set, or split the optimizer."
        )
    mesh, dims = sharded_layouts[0]

    def reduce(total: Tensor) -> Tensor:
        import torch.distributed as dist

        total = total.to(mesh.device_type)
        for dim in dims:
            dist.all_reduce(total, group=mesh.get_group(dim))
        return total

    return reduce
