"""The public function that pools texts, as a custom op."""

from __future__ import annotations

from typing import Any, Literal

import torch

from instructue_kernels import triton_support
from instructue_kernels.text_pool import chunked
from instructue_kernels.text_pool.reference import text_pool_reference

# T = texts of all users, N = distinct texts, S = runs of texts, K = columns of weights, H = hidden size

Impl = Literal["auto", "triton", "chunked", "reference"]


def text_pool(
    weights_TK: torch.Tensor,
    soft_NH: torch.Tensor,
    offsets: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
    impl: Impl = "auto",
) -> torch.Tensor:
    """Sums each user's soft tokens, weighted by each of K columns: no padding, no copy of the tokens.

    With `softmax(similarity / temperature)` over a user's texts as weights it is the pooling of the focus token; with
    ones and the texts of one source as a run, the sum behind a source's mean.

    Args:
        weights_TK: `[T, K]` weights of all texts, run after run.
        soft_NH: `[N, H]` soft tokens of distinct texts, in the dtype of the weights.
        offsets: `[S + 1]` int64: texts `offsets[s]` to `offsets[s + 1]` are run s. A run may be empty.
        rows: `[T]` int64 row of each text in `soft_NH`; None if they are one per text, in order.
        impl: `reference`, `chunked` (a few runs at a time, any device), `triton` (GPU; no float64), or
            `auto`.

    Returns:
        `[S, K, H]`, zero for an empty run. Once differentiable in weights and soft tokens.

    Raises:
        ValueError: A shape or dtype does not fit, offsets do not ascend from 0 to T (those on a GPU are not looked at
            by `triton`), or `impl` is unknown.

    Example:
        >>> soft, weights = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.5], [0.5], [1.0]])
        >>> text_pool(weights, soft, torch.tensor([0, 2, 3]), rows=torch.tensor([0, 1, 1])).tolist()
        [[[2.0, 3.0]], [[3.0, 4.0]]]
    """
    chosen = choose(impl, weights_TK.dtype, weights_TK.device.type)
    number = len(soft_NH) if rows is None else len(rows)
    if weights_TK.dim() != 2 or soft_NH.dim() != 2 or len(weights_TK) != number:
        shapes = f"weights {list(weights_TK.shape)} and soft {list(soft_NH.shape)}"
        raise ValueError(f"{shapes} must be [T, K] and [N, H], T being {number}")
    if weights_TK.dtype != soft_NH.dtype:
        raise ValueError(f"weights and soft must have one dtype, not {weights_TK.dtype} and {soft_NH.dtype}")
    if offsets.dim() != 1 or offsets.dtype != torch.int64 or (rows is not None and rows.dtype != torch.int64):
        raise ValueError("rows and offsets must be int64 with one axis")
    if chosen == "reference":
        return text_pool_reference(weights_TK, soft_NH, offsets, rows)
    pooled: torch.Tensor = _text_pool(weights_TK, soft_NH, offsets, rows, chosen)
    return pooled


def choose(impl: str, dtype: torch.dtype, device_type: str) -> str:
    """The implementation behind `impl` for tensors like these.

    Raises:
        ValueError: It cannot run here, or there is none of that name.
    """
    if impl not in ("auto", "triton", "chunked", "reference"):
        raise ValueError(f"impl {impl!r} is unknown; use auto, triton, chunked or reference")
    if impl == "triton":
        reason = triton_support.problem(device_type) or ("float64" if dtype == torch.float64 else None)
        if reason is not None:
            raise ValueError(f"impl 'triton' cannot run: {reason}; use auto or chunked")
    if impl != "auto":
        return impl
    return "triton" if dtype != torch.float64 and triton_support.auto_allowed(device_type) else "chunked"


def explain_choice() -> str:
    """What `impl="auto"` does on this machine, in words."""
    if triton_support.auto_allowed("cuda"):
        return f"triton: reads each soft token once and adds nothing atomically ({triton_support.where()})"
    return f"chunked: a few users at a time (no Triton: {triton_support.why_not()})"


@torch.library.custom_op("instructue::text_pool", mutates_args=())
def _text_pool(
    weights_TK: torch.Tensor, soft_NH: torch.Tensor, offsets: torch.Tensor, rows: torch.Tensor | None, impl: str
) -> torch.Tensor:
    if impl == "triton":
        from instructue_kernels.text_pool import triton

        with triton_support.on_device_of(soft_NH):
            return triton.forward(weights_TK, soft_NH, offsets, rows)
    return chunked.forward(weights_TK, soft_NH, offsets, rows)


@_text_pool.register_fake
def _(
    weights_TK: torch.Tensor,
    soft_NH: torch.Tensor,
    offsets: torch.Tensor,
    rows: torch.Tensor | None,  # noqa: ARG001
    impl: str,  # noqa: ARG001
) -> torch.Tensor:
    return weights_TK.new_empty(offsets.shape[0] - 1, weights_TK.shape[1], soft_NH.shape[1])


@torch.library.custom_op("instructue::text_pool_backward", mutates_args=())
def _text_pool_backward(
    grad_SKH: torch.Tensor,
    weights_TK: torch.Tensor,
    soft_NH: torch.Tensor,
    offsets: torch.Tensor,
    rows: torch.Tensor | None,
    of_weights: bool,
    of_soft: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    if impl == "triton":
        from instructue_kernels.text_pool import triton

        wanted = {"of_weights": of_weights, "of_soft": of_soft}
        with triton_support.on_device_of(soft_NH):
            return triton.backward(grad_SKH, weights_TK, soft_NH, offsets, rows, **wanted)
    return chunked.backward(grad_SKH, weights_TK, soft_NH, offsets, rows, of_weights=of_weights, of_soft=of_soft)


@_text_pool_backward.register_fake
def _(
    grad_SKH: torch.Tensor,  # noqa: ARG001
    weights_TK: torch.Tensor,
    soft_NH: torch.Tensor,
    offsets: torch.Tensor,  # noqa: ARG001
    rows: torch.Tensor | None,  # noqa: ARG001
    of_weights: bool,
    of_soft: bool,
    impl: str,  # noqa: ARG001
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        weights_TK.new_empty(weights_TK.shape[0] if of_weights else 0, weights_TK.shape[1]),
        soft_NH.new_empty(soft_NH.shape[0] if of_soft else 0, soft_NH.shape[1]),
    )


def _remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:  # noqa: ARG001
    *tensors, ctx.impl = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad_SKH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    needed = ctx.needs_input_grad[:2]
    found = _text_pool_backward(grad_SKH.contiguous(), *ctx.saved_tensors, *needed, ctx.impl)
    return *(one if need else None for one, need in zip(found, needed, strict=True)), None, None, None


_text_pool.register_autograd(_differentiate, setup_context=_remember)
