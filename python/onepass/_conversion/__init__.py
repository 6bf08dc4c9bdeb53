"""What reaches a model: layers swapped, neighbours fused, torch's functions patched, and the way back."""

from .functions import patch
from .model import convert, restore
from .registry import register_conversion

__all__ = ["convert", "patch", "register_conversion", "restore"]
