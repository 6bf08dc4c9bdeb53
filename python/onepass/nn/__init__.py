"""Norms and dropout, each in one pass over memory, forward and backward, on CPU and CUDA."""

from . import functional
from .batch_norm_modules import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    SyncBatchNorm,
    SyncBatchNormAct,
)
from .modules import Dropout, DropoutAddLayerNorm, DropoutAddRMSNorm, LayerNorm, RMSNorm

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "Dropout",
    "DropoutAddLayerNorm",
    "DropoutAddRMSNorm",
    "LayerNorm",
    "RMSNorm",
    "SyncBatchNorm",
    "SyncBatchNormAct",
    "functional",
]
