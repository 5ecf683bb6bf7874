"""Attention for short prompts on a CPU.

Our prompts are a few hundred keys with a mask, many users at once. On a CPU the fused kernel of `sdpa` is slow at that;
plain matrix products, with the query heads of a key head laid side by side instead of the keys copied, take a third of
its time. On an accelerator `sdpa` stays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "instructue"

# B = users, Q = query heads, G = key heads, S = queries, T = keys, D = head size


def attention(
    module: nn.Module,
    query_BQSD: torch.Tensor,
    key_BGTD: torch.Tensor,
    value_BGTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention of Transformers.

    Args:
        module: The attention layer.
        query_BQSD: Queries.
        key_BGTD: Keys; Q is a multiple of G.
        value_BGTD: Values.
        attention_mask: `[B, 1, S, T]`, added to the logits; None for causal.
        dropout: Of the weights; such a call is left to `sdpa`.
        scaling: Of the logits.
        kwargs: What other attentions take.

    Returns:
        `[B, S, Q, D]` and no weights.
    """
    batch, heads, queries, size = query_BQSD.shape
    groups, keys = key_BGTD.shape[1], key_BGTD.shape[2]
    if query_BQSD.device.type != "cpu" or dropout or (attention_mask is None and keys != queries):
        output: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query_BQSD, key_BGTD, value_BGTD, attention_mask, dropout, scaling, **kwargs
        )
        return output
    if attention_mask is None:
        lowest = torch.finfo(query_BQSD.dtype).min
        attention_mask = torch.full((queries, keys), lowest, dtype=query_BQSD.dtype).triu(1)[None, None]
    scale = size**-0.5 if scaling is None else scaling
    together = query_BQSD.reshape(batch, groups, -1, size) * scale
    logits = (together @ key_BGTD.transpose(2, 3)).view(batch, heads, queries, keys) + attention_mask
    weights = torch.softmax(logits, dim=-1)
    mixed = weights.view(batch, groups, -1, keys) @ value_BGTD
    return mixed.view(batch, heads, queries, size).transpose(1, 2), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
