"""The public function that fills a prompt's slots, as a custom op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from instructue_kernels import triton_support
from instructue_kernels.prompt_slots import chunked
from instructue_kernels.prompt_slots.reference import Events, prompt_slots_reference

# P = slots of all prompts, V = rows of the table, T = texts of all users, N = distinct texts, H = hidden size

Impl = Literal["auto", "triton", "chunked", "reference"]


def prompt_slots(
    table_VH: torch.Tensor,
    events: Events,
    slots: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> torch.Tensor:
    """Writes the input of an LLM: padding, rows of a table, and texts of users with their count and age, in one go.

    Args:
        table_VH: `[V, H]` embeddings of everything that is not a text.
        events: T texts. Soft tokens and embeddings are in the dtype of the table.
        slots: int64 of any shape: -1 for padding (zero), 0 to V - 1 for a row of the table, V + t for text t.
        dtype: Of the result; the table's if left out.
        impl: `reference`, `chunked` (some slots at a time, any device), `triton` (GPU; no float64), or `auto`.

    Returns:
        `[*slots.shape, H]`. Once differentiable in the table, soft tokens, count and age embeddings.

    Raises:
        ValueError: A shape or dtype does not fit, or `impl` is unknown.

    Example:
        >>> one = torch.ones(1, 2)
        >>> events = Events(5 * one, one, 2 * one, *torch.zeros(3, 1, dtype=torch.int64))
        >>> prompt_slots(one, events, torch.tensor([[0, 1, -1]])).tolist()
        [[[1.0, 1.0], [8.0, 8.0], [0.0, 0.0]]]
    """
    chosen = choose(impl, table_VH.dtype, table_VH.device.type)
    _check(table_VH, events, slots)
    dtype = dtype or table_VH.dtype
    if chosen == "reference":
        return prompt_slots_reference(table_VH, events, slots, dtype)
    filled_PH: torch.Tensor = _prompt_slots(table_VH, list(events), slots.flatten(), dtype, chosen)
    return filled_PH.view(*slots.shape, table_VH.shape[1])


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
        return f"triton: one pass over the prompt ({triton_support.where()})"
    return f"chunked: some slots at a time (no Triton: {triton_support.why_not()})"


@torch.library.custom_op("instructue::prompt_slots", mutates_args=())
def _prompt_slots(
    table_VH: torch.Tensor, events: Sequence[torch.Tensor], slots_P: torch.Tensor, dtype: torch.dtype, impl: str
) -> torch.Tensor:
    if impl == "triton":
        from instructue_kernels.prompt_slots import triton

        with triton_support.on_device_of(table_VH):
            return triton.forward(table_VH, Events(*events), slots_P, dtype)
    return chunked.forward(table_VH, Events(*events), slots_P, dtype)


@_prompt_slots.register_fake
def _(
    table_VH: torch.Tensor,
    events: Sequence[torch.Tensor],  # noqa: ARG001
    slots_P: torch.Tensor,
    dtype: torch.dtype,
    impl: str,  # noqa: ARG001
) -> torch.Tensor:
    return table_VH.new_empty(slots_P.shape[0], table_VH.shape[1], dtype=dtype)


@torch.library.custom_op("instructue::prompt_slots_backward", mutates_args=())
def _prompt_slots_backward(
    grad_PH: torch.Tensor,
    table_VH: torch.Tensor,
    events: Sequence[torch.Tensor],
    slots_P: torch.Tensor,
    needed: Sequence[bool],
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    if impl == "triton":
        from instructue_kernels.prompt_slots import triton

        with triton_support.on_device_of(table_VH):
            return triton.backward(grad_PH, table_VH, Events(*events), slots_P, needed)
    return chunked.backward(grad_PH, table_VH, Events(*events), slots_P, needed)


@_prompt_slots_backward.register_fake
def _(
    grad_PH: torch.Tensor,  # noqa: ARG001
    table_VH: torch.Tensor,
    events: Sequence[torch.Tensor],
    slots_P: torch.Tensor,  # noqa: ARG001
    needed: Sequence[bool],
    impl: str,  # noqa: ARG001
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    wanted = zip((table_VH, *events[:3]), needed, strict=True)
    a, b, c, d = (one.new_empty(one.shape[0] if need else 0, one.shape[1]) for one, need in wanted)
    return a, b, c, d


def _remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:  # noqa: ARG001
    table_VH, events, slots_P, _, ctx.impl = inputs
    ctx.save_for_backward(table_VH, slots_P, *events)


def _differentiate(ctx: Any, grad_PH: torch.Tensor) -> tuple[Any, ...]:
    table_VH, slots_P, *events = ctx.saved_tensors
    needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[1][:3]]
    found = _prompt_slots_backward(grad_PH.contiguous(), table_VH, events, slots_P, needed, ctx.impl)
    of_table, *of_events = (one if need else None for one, need in zip(found, needed, strict=True))
    return of_table, [*of_events, None, None, None], None, None, None


_prompt_slots.register_autograd(_differentiate, setup_context=_remember)


def _check(table_VH: torch.Tensor, events: Events, slots: torch.Tensor) -> None:
    floats, indices = events[:3], events[3:]
    if table_VH.dim() != 2 or any(one.dim() != 2 or one.shape[1] != table_VH.shape[1] for one in floats):
        shapes = [list(one.shape) for one in (table_VH, *floats)]
        raise ValueError(f"table, soft, count and age must be [any, H] with one H, not {shapes}")
    if any(one.dtype != table_VH.dtype for one in floats):
        raise ValueError(
            f"table, soft, count and age must have one dtype, not {[table_VH.dtype, *(one.dtype for one in floats)]}"
        )
    if any(one.shape != events.row_T.shape or one.dim() != 1 for one in indices):
        raise ValueError(f"row, count and age buckets must be [T], not {[list(one.shape) for one in indices]}")
    if any(one.dtype != torch.int64 for one in (slots, *indices)):
        raise ValueError("slots, rows and buckets must be int64")
