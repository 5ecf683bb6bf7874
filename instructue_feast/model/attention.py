"""Attention for short prompts on a CPU.

Our prompts are a few hundred keys with a mask, many users at once. On a CPU the fused kernel of `sdpa` is slow at that;
plain matrix products, with the query heads of a key head laid side by side instead of the keys copied, take a third of
its time. Without a mask, as a prefix is read, the fused kernel skips half of the work and wins in float32; it also
takes over where the logits would need much memory. On an accelerator `sdpa` stays, which without a mask is flash
attention.

Reading a prefix needs its keys and values only, so its last layer is left as soon as those are known (`keys_only`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "instructue"

MOST_LOGITS = 1 << 22
"""Logits that are held at once; more are left to the fused kernel, which holds none."""

_LAST_LAYER: ContextVar[int | None] = ContextVar("last_layer", default=None)

# B = users, Q = query heads, G = key heads, S = queries, T = keys, D = head size


class _KeysKnown(Exception):  # noqa: N818 - no error: how the last layer is left
    """The last layer's keys and values are in the cache; what it would do with them is of no use."""


@contextmanager
def keys_only(num_layers: int) -> Iterator[None]:
    """Within, the LLM reads causally whatever mask it is given, and stops at the attention of its last layer.

    The cache then holds the keys and values of all layers, as Transformers fills it before attention is called. A cut
    LLM of two layers does half of the work this way.
    """
    token = _LAST_LAYER.set(num_layers - 1)
    try:
        with suppress(_KeysKnown):
            yield
    finally:
        _LAST_LAYER.reset(token)


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
        attention_mask: `[B, 1, S, T]`, added to the logits; None for causal, as everything is within `keys_only`.
        dropout: Of the weights; such a call is left to `sdpa`.
        scaling: Of the logits.
        kwargs: What other attentions take.

    Returns:
        `[B, S, Q, D]` and no weights.
    """
    last = _LAST_LAYER.get()
    if last is not None:
        attention_mask = None
        if module.layer_idx == last:
            raise _KeysKnown
    batch, heads, queries, size = query_BQSD.shape
    groups, keys = key_BGTD.shape[1], key_BGTD.shape[2]
    fused = batch * heads * queries * keys > MOST_LOGITS or (
        attention_mask is None and query_BQSD.dtype == torch.float32
    )
    if query_BQSD.device.type != "cpu" or dropout or fused or (attention_mask is None and keys != queries):
        output: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query_BQSD, key_BGTD, value_BGTD, attention_mask, dropout, scaling, **kwargs
        )
        return output
    if attention_mask is None:
        lowest = torch.finfo(query_BQSD.dtype).min
        attention_mask = torch.full((queries, keys), lowest, dtype=query_BQSD.dtype).triu(1)[None, None]
    scale = size**-0.5 if scaling is None else scaling
    together = query_BQSD.reshape(batch, groups, -1, size) * scale
    logits = (together @ key_BGTD.transpose(2, 3)).view(batch, heads, queries, keys).add_(attention_mask)
    # A softmax in bfloat16 is slower on a CPU than one in float32 with both conversions.
    precise = torch.promote_types(logits.dtype, torch.float32)
    weights = torch.softmax(logits, dim=-1, dtype=precise).to(logits.dtype)
    mixed = weights.view(batch, groups, -1, keys) @ value_BGTD
    return mixed.view(batch, heads, queries, size).transpose(1, 2), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
