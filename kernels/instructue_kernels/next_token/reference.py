"""The next-token loss, written to be read: all logits at once."""

from __future__ import annotations

import torch
from torch.nn import functional as F

# N = answer positions, V = vocabulary, H = hidden size of the LLM


def next_token_reference(
    hidden_NH: torch.Tensor, weight_VH: torch.Tensor, target_N: torch.Tensor, bias_V: torch.Tensor | None
) -> torch.Tensor:
    """Summed cross entropy of the targets; logits in the dtype of the weight, the entropy itself in at least float32.

    Returns:
        Scalar; autograd keeps three `[N, V]` tensors.
    """
    logits_NV = F.linear(hidden_NH.to(weight_VH.dtype), weight_VH, bias_V)
    return F.cross_entropy(
        logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float(), target_N, reduction="sum"
    )
