"""The only importer of the extension: devices and threads, rules by name, one update of many tensors, layers."""

from .. import _C
from .devices import (
    compiler,
    cuda_archs,
    cuda_device_count,
    cuda_kernels,
    cuda_versions,
    fast_reader,
    has_cuda,
    is_on_cuda,
    isa,
    isas,
    no_cuda_kernels,
    thread_runtime,
    use_isa,
)
from .rules import RuleVariant, find_variant, foreign_states, rules, state_names, variants
from .update import SCALE_GROUP, GradientFactor, Group, Staging, new_plan, norm_of, update

__all__ = [
    "SCALE_GROUP",
    "_C",
    "GradientFactor",
    "Group",
    "RuleVariant",
    "Staging",
    "compiler",
    "cuda_archs",
    "cuda_device_count",
    "cuda_kernels",
    "cuda_versions",
    "fast_reader",
    "find_variant",
    "foreign_states",
    "has_cuda",
    "is_on_cuda",
    "isa",
    "isas",
    "new_plan",
    "no_cuda_kernels",
    "norm_of",
    "rules",
    "state_names",
    "thread_runtime",
    "update",
    "use_isa",
    "variants",
]
