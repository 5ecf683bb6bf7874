"""The public function of the next-token loss."""

from __future__ import annotations

from typing import Literal

import torch

from instructue_kernels.next_token.chunked import next_token_chunked, next_token_torch, torch_has_it
from instructue_kernels.next_token.liger import liger_installed, liger_runs_on, next_token_liger
from instructue_kernels.next_token.reference import next_token_reference

# N = positions, V = vocabulary, H = hidden size of the LLM

Impl = Literal["auto", "torch", "liger", "chunked", "reference"]

_FUNCTIONS = {
    "torch": next_token_torch,
    "liger": next_token_liger,
    "chunked": next_token_chunked,
    "reference": next_token_reference,
}


def next_token_loss(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    target_N: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    impl: Impl = "auto",
) -> torch.Tensor:
    """Mean cross entropy of the next tokens, without ever holding the logits of all positions.

    Args:
        hidden_NH: `[N, H]` hidden states that predict the targets: gather the answer positions first.
        weight_VH: `[V, H]` vocabulary head; a frozen one gets no gradient and costs no room for it.
        target_N: `[N]` int64 tokens, or `ignore_index` where nothing is to be learnt.
        bias: `[V]` bias of the head.
        ignore_index: Positions with this target are left out before the head.
        impl: `reference`, `chunked` (row chunks, recomputed in the backward), `torch` (torch 2.13's own memory-bounded
            op), `liger` (Liger's Triton kernel; no float64, GPU only), or `auto`: `torch` for a head in float32 or
            float64 where this torch has it; else `liger` where it runs; else `chunked`. Torch's op returns
            the loss of a half-precision head in half precision, which `auto` therefore never takes.

    Returns:
        Scalar, float64 for a float64 head, else float32; 0 with a zero gradient if every target is ignored. The `torch`
        path returns the dtype of the head. Once differentiable; `liger` lets a graph be walked once.

    Raises:
        ValueError: A shape or dtype does not fit, a target is no token of the vocabulary, or `impl` cannot be had.

    Example:
        >>> hidden, head = torch.zeros(2, 3), torch.zeros(4, 3)
        >>> round(next_token_loss(hidden, head, torch.tensor([1, -100])).item(), 4)  # log 4
        1.3863
    """
    _check(hidden_NH, weight_VH, target_N, bias)
    chosen = choose(impl, weight_VH.dtype, weight_VH.device)
    kept_N = (target_N != ignore_index).nonzero().squeeze(1)
    hidden_NH, target_N = hidden_NH[kept_N], target_N[kept_N]
    if not len(target_N):
        # The sum of nothing: a zero that still knows where it came from, so no parameter counts as unused.
        dtype = torch.float64 if weight_VH.dtype == torch.float64 else torch.float32
        nothing = hidden_NH.sum(dtype=dtype) + weight_VH[:0].sum(dtype=dtype)
        return nothing if bias is None else nothing + bias[:0].sum(dtype=dtype)
    if target_N.device.type == "cpu":
        low, high = int(target_N.min()), int(target_N.max())
        if low < 0 or high >= len(weight_VH):
            raise ValueError(f"targets go from {low} to {high}, but the vocabulary has {len(weight_VH)} tokens")
    with torch.autocast(hidden_NH.device.type, enabled=False):
        return _FUNCTIONS[chosen](hidden_NH, weight_VH, target_N, bias) / len(target_N)


def choose(impl: str, dtype: torch.dtype, device: torch.device) -> str:
    """The implementation behind `impl` for a head of this dtype on this device.

    Raises:
        ValueError: It cannot be had, or there is none of that name.
    """
    if impl not in ("auto", *_FUNCTIONS):
        raise ValueError(f"impl {impl!r} is unknown; use auto, {', '.join(list(_FUNCTIONS)[:-1])} or reference")
    if impl == "torch" and not torch_has_it():
        raise ValueError(f"impl 'torch' needs torch 2.13 or newer, this is {torch.__version__}; use auto or chunked")
    if impl == "liger" and (dtype == torch.float64 or not liger_runs_on(device)):
        have = "installed" if liger_installed() else "not installed (pip install 'instructue-feast[liger]')"
        raise ValueError(f"impl 'liger' needs a GPU and no float64; it is {have}, the head is {dtype} on {device.type}")
    if impl != "auto":
        return impl
    if torch_has_it() and dtype in (torch.float32, torch.float64):
        return "torch"
    # Never Triton's interpreter: it is for tests.
    return "liger" if dtype != torch.float64 and device.type == "cuda" and liger_installed() else "chunked"


def explain_choice() -> str:
    """What `impl="auto"` does on this machine, in words."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    whole, half = choose("auto", torch.float32, device), choose("auto", torch.bfloat16, device)
    why = {
        "torch": "torch's linear_cross_entropy, gradients formed in the forward",
        "liger": "Liger's Triton kernel, loss in float32",
        "chunked": "row chunks with recompute, loss in float32",
    }
    missing = "" if torch_has_it() else "; torch 2.13 brings linear_cross_entropy"
    if whole == half:
        return f"{whole}: {why[whole]}{missing}"
    return f"{whole}: {why[whole]}; {half} for a half-precision head: {why[half]}{missing}"


def _check(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, bias: torch.Tensor | None) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [N, H] and [V, H]")
    if target.shape != (len(hidden),) or target.dtype != torch.int64:
        raise ValueError(f"target must be int64 [{len(hidden)}], not {target.dtype} {list(target.shape)}")
    if bias is not None and bias.shape != (len(weight),):
        raise ValueError(f"bias {tuple(bias.shape)} does not fit a vocabulary of {len(weight)} tokens")
