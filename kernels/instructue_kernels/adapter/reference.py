"""The adapter, written to be read: four lines of torch, in whatever dtype it is given."""

from __future__ import annotations

import torch
from torch.nn import functional as F

# N = texts, D = encoder size, M = middle size, H = hidden size of the LLM


def adapter_reference(
    vectors_ND: torch.Tensor,
    norm_weight_D: torch.Tensor,
    norm_bias_D: torch.Tensor,
    up_MD: torch.Tensor,
    up_bias_M: torch.Tensor,
    down_HM: torch.Tensor,
    down_bias_H: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """LayerNorm -> Linear -> GELU (exact) -> Linear.

    Returns:
        `[N, H]` in the dtype of the inputs; autograd keeps two `[N, M]` and two `[N, D]` tensors.
    """
    normed_ND = F.layer_norm(vectors_ND, vectors_ND.shape[-1:], norm_weight_D, norm_bias_D, eps)
    middle_NM = F.gelu(F.linear(normed_ND, up_MD, up_bias_M))
    return F.linear(middle_NM, down_HM, down_bias_H)
