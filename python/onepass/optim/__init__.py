"""Fused optimizers with torch.optim's signatures, wrappers around any optimizer, and gradient clipping."""

from .adam import Adam, AdamW
from .clip import clip_grad_norm_, clip_grad_value_
from .lookahead import Lookahead
from .sam import SAM
from .sgd import SGD

__all__ = ["SAM", "SGD", "Adam", "AdamW", "Lookahead", "clip_grad_norm_", "clip_grad_value_"]
