"""onepass: the memory-bound work of a training step, each job in one pass over memory, on CPU and CUDA."""

from . import nn, optim
from ._config import __version__, has_cuda, show_config
from ._convert import convert, restore

__all__ = ["__version__", "convert", "has_cuda", "nn", "optim", "restore", "show_config"]
