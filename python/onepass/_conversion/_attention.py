"""Attention with dropout on the CPU, where torch has no fused kernel: torch's formula, with our dropout."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..nn import functional as F


def dropout_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool = False,
) -> Tensor:
    """dropout(softmax(query key^T scale + mask)) value; torch.nn.functional.scaled_dot_product_attention.

    Args:
        query: [*, heads, L, E]; key: [*, heads, S, E]; value: [*, heads, S, Ev]. With enable_gqa the last two may have fewer
            heads, each shared by as many of the query's.
        attn_mask: broadcastable to [*, heads, L, S], bool (True takes part) or added. Excludes is_causal.
        scale: None is 1 / sqrt(E).

    A row whose keys are all masked gives 0, as torch's does.
    """
    if is_causal and attn_mask is not None:
        raise RuntimeError("_scaled_dot_product_attention: Explicit attn_mask should not be set when is_causal=True")
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    # Half of the scale on either side keeps the products in the range of 16-bit numbers.
    half = math.sqrt(1 / math.sqrt(query.shape[-1]) if scale is None else abs(scale))
    scores = (query * half) @ (key * (half if scale is None or scale >= 0 else -half)).transpose(-2, -1)
    if attn_mask is None:
        return F.dropout(scores.softmax(-1), dropout_p) @ value
    # Softmax of a row without keys is NaN, and so is its gradient: such a row takes all keys, and then gives 0.
    if attn_mask.dtype is torch.bool:
        is_empty = ~attn_mask.any(-1, keepdim=True)
        scores = scores.masked_fill(~(attn_mask | is_empty), -math.inf)
    else:
        is_empty = (attn_mask == -math.inf).all(-1, keepdim=True)
        scores = scores + attn_mask.masked_fill(is_empty, 0.0)
    return (F.dropout(scores.softmax(-1), dropout_p) @ value).masked_fill(is_empty, 0.0)
