"""Filling a prompt's slots, some at a time: texts go from the table of soft tokens straight into the prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from instructue_kernels.prompt_slots.reference import Events
from instructue_kernels.text_pool.chunked import add_rows

# P = slots of all prompts, V = rows of the table, T = texts of all users, H = hidden size, X = texts of a chunk

CHUNK = 2048
"""Texts at once on a CPU."""

GPU_CHUNK = 65536
"""Texts at once on a GPU."""


def forward(table_VH: torch.Tensor, events: Events, slots_P: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`[P, H]` in `dtype`."""
    filled_PH = table_VH.new_zeros(len(slots_P), table_VH.shape[1], dtype=dtype)
    place_O, place_E = _places(slots_P, len(table_VH))
    chunk = CHUNK if slots_P.device.type == "cpu" else GPU_CHUNK
    for part in torch.split(place_O, chunk):
        filled_PH[part] = table_VH[slots_P[part]].to(dtype)
    for part in torch.split(place_E, chunk):
        text_X = slots_P[part] - len(table_VH)
        soft_XH = events.soft_NH.index_select(0, events.row_T[text_X])
        soft_XH += events.count_CH[events.count_T[text_X]]
        soft_XH += events.age_AH[events.age_T[text_X]]
        filled_PH[part] = soft_XH.to(dtype)
    return filled_PH


def backward(
    grad_PH: torch.Tensor, table_VH: torch.Tensor, events: Events, slots_P: torch.Tensor, needed: Sequence[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the table, the soft tokens, the count and the age embeddings; without rows where not `needed`."""
    wanted = (table_VH, *events[:3])
    found = [one.new_zeros(len(one) * need, one.shape[1]) for one, need in zip(wanted, needed, strict=True)]
    of_table, of_soft, of_count, of_age = found
    place_O, place_E = _places(slots_P, len(table_VH))
    chunk = CHUNK if slots_P.device.type == "cpu" else GPU_CHUNK
    for part in torch.split(place_O, chunk) if needed[0] else ():
        add_rows(of_table, slots_P[part], grad_PH[part].to(of_table.dtype))
    for part in torch.split(place_E, chunk) if any(needed[1:]) else ():
        text_X = slots_P[part] - len(table_VH)
        grad_XH = grad_PH[part].to(of_soft.dtype)
        if needed[1]:
            add_rows(of_soft, events.row_T[text_X], grad_XH)
        # A product with who has which bucket: no order of additions to lose, and faster than adding row by row.
        for total, bucket_T in ((of_count, events.count_T), (of_age, events.age_T)):
            if len(total):
                member_XC = bucket_T[text_X][:, None] == torch.arange(len(total), device=total.device)
                total.addmm_(member_XC.to(total.dtype).T, grad_XH)
    return of_table, of_soft, of_count, of_age


def _places(slots_P: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where rows of the table go, and where texts go."""
    is_event_P = slots_P >= rows
    return ((slots_P >= 0) & ~is_event_P).nonzero()[:, 0], is_event_P.nonzero()[:, 0]
