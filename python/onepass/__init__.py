"""onepass: the memory-bound work of a training step, each job in one pass over memory, on CPU and CUDA."""

from . import nn, optim
from ._config import __version__, has_cuda, show_config
from ._conversion import convert, patch, register_conversion, restore

__all__ = [
    "__version__",
    "convert",
    "has_cuda",
    "nn",
    "optim",
    "patch",
    "register_conversion",
    "restore",
    "show_config",
]
