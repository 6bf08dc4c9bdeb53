"""The layers as functions, with torch.nn.functional's signatures; our additional arguments are keyword-only."""

from ._batch_norm import batch_norm, batch_norm_activation
from ._dropout import dropout, dropout_mask
from ._dropout_add_norm import dropout_add_layer_norm, dropout_add_rms_norm
from ._norm import layer_norm, rms_norm

__all__ = [
    "batch_norm",
    "batch_norm_activation",
    "dropout",
    "dropout_add_layer_norm",
    "dropout_add_rms_norm",
    "dropout_mask",
    "layer_norm",
    "rms_norm",
]
