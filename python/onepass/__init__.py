"""onepass: the memory-bound work of a training step, each job in one pass over memory, on CPU and CUDA."""

from . import optim
from ._config import __version__, has_cuda, show_config

__all__ = ["__version__", "has_cuda", "optim", "show_config"]
