"""Fused optimizers with torch.optim's signatures, and gradient clipping."""

from .adam import Adam, AdamW
from .clip import clip_grad_norm_, clip_grad_value_
from .sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "clip_grad_norm_", "clip_grad_value_"]
