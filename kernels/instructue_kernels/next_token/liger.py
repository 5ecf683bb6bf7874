"""The next-token loss by Liger's Triton kernel, where `pip install 'instructue-feast[liger]'` was run."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

# N = answer positions, V = vocabulary, H = hidden size of the LLM


@functools.cache
def liger_installed() -> bool:
    """Whether Liger and Triton are there."""
    return importlib.util.find_spec("liger_kernel") is not None and importlib.util.find_spec("triton") is not None


def liger_runs_on(device: torch.device) -> bool:
    """Whether Liger is installed and can run there: a GPU, or Triton's interpreter."""
    return liger_installed() and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")


def next_token_liger(
    hidden_NH: torch.Tensor, weight_VH: torch.Tensor, target_N: torch.Tensor, bias_V: torch.Tensor | None
) -> torch.Tensor:
    """The same function as `next_token_reference`; gradients are formed in the forward, row chunk by row chunk.

    The gradient of the head is added up in float32. A graph can be walked once.
    """
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    found = LigerFusedLinearCrossEntropyFunction.apply(
        hidden_NH.to(weight_VH.dtype),
        weight_VH,
        target_N,
        bias_V,
        None,  # no weights of classes
        -100,  # such positions were taken out before
        0.0,  # no z-loss
        0.0,  # no label smoothing
        "sum",
        None,  # no soft cap
        False,  # no z-loss to report
        torch.float32,
    )
    loss: torch.Tensor = found[0]
    return loss.float()
