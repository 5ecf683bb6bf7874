"""The next-token loss in row chunks: the logits of one chunk are all that is held."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from instructue_kernels.next_token.reference import next_token_reference

# N = answer positions, V = vocabulary, H = hidden size of the LLM

_CHUNK_ELEMENTS = 2**23
"""Logits held at once: 32 MB in float32, 170 positions of a vocabulary of 49,152."""


def chunk_rows(vocabulary: int) -> int:
    """Positions of a chunk."""
    return max(1, _CHUNK_ELEMENTS // max(1, vocabulary))


def next_token_chunked(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    target_N: torch.Tensor,
    bias_V: torch.Tensor | None,
    rows: int | None = None,
) -> torch.Tensor:
    """The same function as `next_token_reference`; the backward computes each chunk's logits again."""
    rows = rows or chunk_rows(len(weight_VH))
    total = hidden_NH.new_zeros((), dtype=torch.float64 if weight_VH.dtype == torch.float64 else torch.float32)
    for start in range(0, len(hidden_NH), rows):
        own = slice(start, start + rows)
        # Nothing random runs inside, so the state of the generator need not be kept.
        total = total + checkpoint(
            next_token_reference,
            hidden_NH[own],
            weight_VH,
            target_N[own],
            bias_V,
            use_reentrant=False,
            preserve_rng_state=False,
        )
    return total


def torch_has_it() -> bool:
    """Whether this torch has a memory-bounded cross entropy of a linear head (2.13 and newer)."""
    return hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions")


def next_token_torch(
    hidden_NH: torch.Tensor, weight_VH: torch.Tensor, target_N: torch.Tensor, bias_V: torch.Tensor | None
) -> torch.Tensor:
    """The same by torch's own op, which forms the gradients in the forward: a quarter fewer FLOPs than recompute."""
    # Its own choice of chunk is a few rows with a large vocabulary: on a CPU 5 to 20 times slower than this. A graph
    # may be walked twice, as with the other implementations; that costs room for one more gradient.
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk_rows(len(weight_VH)), allow_retain_graph=True)
    found: torch.Tensor = F.linear_cross_entropy(
        hidden_NH.to(weight_VH.dtype), weight_VH, target_N, linear_bias=bias_V, reduction="sum", options=options
    )
    return found
