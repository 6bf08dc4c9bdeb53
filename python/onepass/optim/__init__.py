"""Fused optimizers with torch.optim's signatures, wrappers around any optimizer, and gradient clipping."""

from ._interchange import from_torch, to_torch
from .adagrad import Adagrad
from .adam import Adam, AdamW
from .clip import clip_grad_norm_, clip_grad_value_
from .lookahead import Lookahead
from .nadam import NAdam
from .rmsprop import RMSprop
from .rprop import Rprop
from .sam import SAM
from .sgd import SGD
from .sparse_adam import SparseAdam

__all__ = [
    "SAM",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Lookahead",
    "NAdam",
    "RMSprop",
    "Rprop",
    "SparseAdam",
    "clip_grad_norm_",
    "clip_grad_value_",
    "from_torch",
    "to_torch",
]
