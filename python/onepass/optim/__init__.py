"""Fused optimizers with torch.optim's signatures, wrappers around any optimizer, and gradient clipping.

Each name is imported `as` itself, which is how type checkers and editors recognise a public name; for an optimizer without
its line here tests/test_structure.py fails and prints the line.
"""

from typing import TYPE_CHECKING

from ._interchange import from_torch as from_torch
from ._interchange import full_state_dict as full_state_dict
from ._interchange import to_torch as to_torch
from .adadelta import Adadelta as Adadelta
from .adagrad import Adagrad as Adagrad
from .adam import Adam as Adam
from .adam import AdamW as AdamW
from .adamax import Adamax as Adamax
from .asgd import ASGD as ASGD
from .clip import clip_grad_norm_ as clip_grad_norm_
from .clip import clip_grad_value_ as clip_grad_value_
from .in_backward import step_in_backward as step_in_backward
from .lion import Lion as Lion
from .lookahead import Lookahead as Lookahead
from .nadam import NAdam as NAdam
from .radam import RAdam as RAdam
from .rmsprop import RMSprop as RMSprop
from .rprop import Rprop as Rprop
from .sam import SAM as SAM
from .sgd import SGD as SGD
from .sparse_adam import SparseAdam as SparseAdam

if not TYPE_CHECKING:  # computed, to repeat no name; type checkers read the imports
    __all__ = [name for name, value in globals().items() if getattr(value, "__module__", "").startswith(f"{__name__}.")]
