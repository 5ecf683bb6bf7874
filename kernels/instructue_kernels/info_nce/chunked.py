"""One direction of the loss in row chunks: the similarity matrix is never held, forward or backward.

A torch custom op (`instructue::contrast`), so `torch.compile` takes it whole. The backward computes each chunk again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from instructue_kernels.info_nce.reference import compute_dtype, inverse_norms, negatives, within_margin

# N = anchors, K = candidates, D = size of a vector, R = own hard negatives of an anchor, C = anchors of a chunk
# 3 = labels of a row: its answer, its group, its owner

_CHUNK_ELEMENTS = 2**21
"""Elements of a chunk's largest buffer: 8 MB in float32; about five such buffers live at once."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some anchors against all candidates.

    Attributes:
        rows: Which anchors.
        anchor_CD: Their unit vectors.
        inverse_C1: One over the length of the anchors as given.
        cosine_CK: Cosines with the candidates.
        negative_CK: Which candidates are negatives.
        positive_C1: Cosine with the positive.
        hard_CRD: Unit vectors of the anchors' own hard negatives.
        inverse_CR1: One over the length of those as given.
        cosine_CR: Cosines with those.
        negative_CR: Which of those are within the margin.
    """

    rows: slice
    anchor_CD: torch.Tensor
    inverse_C1: torch.Tensor
    cosine_CK: torch.Tensor
    negative_CK: torch.Tensor
    positive_C1: torch.Tensor
    hard_CRD: torch.Tensor
    inverse_CR1: torch.Tensor
    cosine_CR: torch.Tensor
    negative_CR: torch.Tensor


def chunks(
    anchor_ND: torch.Tensor,
    unit_KD: torch.Tensor,
    hard_NRD: torch.Tensor | None,
    positive_N: torch.Tensor,
    anchor_labels_3N: torch.Tensor,
    candidate_labels_3K: torch.Tensor,
    margin: float | None,
    rows: int = 0,
) -> Iterator[Chunk]:
    """Similarities and masks, `rows` anchors at a time; 0 fits the chunk to the number of candidates.

    `unit_KD` are unit vectors in the dtype to compute in.
    """
    hard_NRD = anchor_ND.new_empty(len(anchor_ND), 0, anchor_ND.shape[1]) if hard_NRD is None else hard_NRD
    step = rows or max(1, _CHUNK_ELEMENTS // max(1, len(unit_KD) + hard_NRD[0:1].numel()))
    for start in range(0, len(anchor_ND), step):
        own = slice(start, start + step)
        anchor_CD, hard_CRD = anchor_ND[own].to(unit_KD.dtype), hard_NRD[own].to(unit_KD.dtype)
        inverse_C1, inverse_CR1 = inverse_norms(anchor_CD), inverse_norms(hard_CRD)
        anchor_CD, hard_CRD = anchor_CD * inverse_C1, hard_CRD * inverse_CR1
        cosine_CK = anchor_CD @ unit_KD.T
        cosine_CR = torch.einsum("cd,crd->cr", anchor_CD, hard_CRD)
        positive_C1 = cosine_CK.gather(1, positive_N[own, None])
        negative_CK = negatives(anchor_labels_3N[:, own], candidate_labels_3K)
        if margin is not None:
            negative_CK &= within_margin(cosine_CK, positive_C1, margin)
        yield Chunk(
            own,
            anchor_CD,
            inverse_C1,
            cosine_CK,
            negative_CK,
            positive_C1,
            hard_CRD,
            inverse_CR1,
            cosine_CR,
            within_margin(cosine_CR, positive_C1, margin),
        )


def _terms(chunk: Chunk, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Shift and sum `[C, 1]`, and the sum's terms `[C, K]` and `[C, R]`: `exp(excess - shift)`, 0 where no negative."""
    excess_CK = (chunk.cosine_CK - chunk.positive_C1).mul_(scale).masked_fill_(~chunk.negative_CK, -torch.inf)
    excess_CR = (chunk.cosine_CR - chunk.positive_C1).mul_(scale).masked_fill_(~chunk.negative_CR, -torch.inf)
    shift_C1 = excess_CK.amax(dim=1, keepdim=True).clamp_(min=0)
    if excess_CR.shape[1]:
        shift_C1 = torch.maximum(shift_C1, excess_CR.amax(dim=1, keepdim=True))
    term_CK, term_CR = excess_CK.sub_(shift_C1).exp_(), excess_CR.sub_(shift_C1).exp_()
    total_C1 = torch.expm1(-shift_C1) + term_CK.sum(dim=1, keepdim=True) + term_CR.sum(dim=1, keepdim=True)
    return shift_C1, total_C1, term_CK, term_CR


@torch.library.custom_op("instructue::contrast", mutates_args=())
def contrast(
    anchor_ND: torch.Tensor,
    candidate_KD: torch.Tensor,
    log_scale: torch.Tensor,
    hard_NRD: torch.Tensor | None,
    positive_N: torch.Tensor,
    anchor_labels_3N: torch.Tensor,
    candidate_labels_3K: torch.Tensor,
    margin: float | None,
    chunk_rows: int,
) -> torch.Tensor:
    """The same function as `contrast_reference` with workspace for a chunk of anchors.

    `chunk_rows` 0 fits the chunk to the number of candidates. The gradient is once differentiable.
    """
    unit_KD = candidate_KD.to(compute_dtype(anchor_ND, candidate_KD))
    unit_KD = unit_KD * inverse_norms(unit_KD)
    scale = log_scale.to(unit_KD.dtype).exp()
    loss_N = unit_KD.new_empty(len(anchor_ND))
    labels = (anchor_labels_3N, candidate_labels_3K)
    for chunk in chunks(anchor_ND, unit_KD, hard_NRD, positive_N, *labels, margin, chunk_rows):
        shift_C1, total_C1, _, _ = _terms(chunk, scale)
        loss_N[chunk.rows] = (shift_C1 + torch.log1p(total_C1)).squeeze(1)
    return loss_N


@contrast.register_fake
def _(anchor_ND: torch.Tensor, candidate_KD: torch.Tensor, *_: Any) -> torch.Tensor:
    return anchor_ND.new_empty(len(anchor_ND), dtype=compute_dtype(anchor_ND, candidate_KD))


@torch.library.custom_op("instructue::contrast_backward", mutates_args=())
def contrast_backward(
    grad_N: torch.Tensor,
    needs: list[bool],
    anchor_ND: torch.Tensor,
    candidate_KD: torch.Tensor,
    log_scale: torch.Tensor,
    hard_NRD: torch.Tensor | None,
    positive_N: torch.Tensor,
    anchor_labels_3N: torch.Tensor,
    candidate_labels_3K: torch.Tensor,
    margin: float | None,
    chunk_rows: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of anchors, candidates, log scale and hard negatives; empty where `needs` says none is wanted."""
    needs_anchor, needs_candidate, needs_hard = needs
    raw_KD = candidate_KD.to(compute_dtype(anchor_ND, candidate_KD))
    inverse_K1 = inverse_norms(raw_KD)
    unit_KD = raw_KD * inverse_K1
    scale = log_scale.to(unit_KD.dtype).exp()
    grad_anchor, grad_hard = _like(anchor_ND, needs_anchor), _like(hard_NRD, needs_hard, anchor_ND)
    grad_unit_KD = torch.zeros_like(unit_KD) if needs_candidate else unit_KD.new_empty(0)
    grad_log_scale = scale.new_zeros(())
    labels = (anchor_labels_3N, candidate_labels_3K)
    for chunk in chunks(anchor_ND, unit_KD, hard_NRD, positive_N, *labels, margin, chunk_rows):
        _, total_C1, grad_CK, grad_CR = _terms(chunk, scale)
        factor_C1 = grad_N[chunk.rows, None].to(unit_KD.dtype) / (1 + total_C1)
        grad_CK.mul_(factor_C1)
        grad_CR.mul_(factor_C1)
        pull_C1 = grad_CK.sum(dim=1, keepdim=True) + grad_CR.sum(dim=1, keepdim=True)
        # The positive is never one of its own negatives: its place is free for the gradient that pulls it closer.
        grad_CK.scatter_(1, positive_N[chunk.rows, None], -pull_C1)
        grad_log_scale += chunk.cosine_CK.mul_(grad_CK).sum() + chunk.cosine_CR.mul_(grad_CR).sum()
        if needs_candidate:
            grad_unit_KD.addmm_(grad_CK.T, chunk.anchor_CD)
        if needs_anchor:
            grad_CD = grad_CK @ unit_KD + torch.einsum("cr,crd->cd", grad_CR, chunk.hard_CRD)
            grad_anchor[chunk.rows] = _through_norm(grad_CD.mul_(scale), chunk.anchor_CD, chunk.inverse_C1)
        if needs_hard:
            grad_CRD = (grad_CR * scale)[:, :, None] * chunk.anchor_CD[:, None]
            grad_hard[chunk.rows] = _through_norm(grad_CRD, chunk.hard_CRD, chunk.inverse_CR1)
    if needs_candidate:
        grad_unit_KD = _through_norm(grad_unit_KD.mul_(scale), unit_KD, inverse_K1)
    grad_log_scale = (grad_log_scale * scale).to(log_scale.dtype)
    return grad_anchor, grad_unit_KD.to(candidate_KD.dtype), grad_log_scale, grad_hard


@contrast_backward.register_fake
def _(
    grad_N: torch.Tensor,
    needs: list[bool],
    anchor_ND: torch.Tensor,
    candidate_KD: torch.Tensor,
    log_scale: torch.Tensor,
    hard_NRD: torch.Tensor | None,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    del grad_N
    anchor, hard = _like(anchor_ND, needs[0]), _like(hard_NRD, needs[2], anchor_ND)
    return anchor, _like(candidate_KD, needs[1]), torch.empty_like(log_scale), hard


def _like(tensor: torch.Tensor | None, wanted: bool, otherwise: torch.Tensor | None = None) -> torch.Tensor:
    """Room for a gradient of `tensor`; empty if none is wanted, as a custom op cannot return None."""
    if tensor is not None and wanted:
        return torch.empty_like(tensor)
    some = tensor if tensor is not None else otherwise
    assert some is not None
    return some.new_empty(0)


def _through_norm(grad: torch.Tensor, unit: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Gradient of the vectors as given from that of their unit vectors."""
    return (grad - unit * (grad * unit).sum(dim=-1, keepdim=True)) * inverse


def _remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    del output
    *tensors, ctx.margin, ctx.chunk_rows = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_N: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    anchor, candidate, log_scale, hard = ctx.needs_input_grad[:4]
    grads = contrast_backward(grad_N, [anchor, candidate, hard], *ctx.saved_tensors, ctx.margin, ctx.chunk_rows)
    needs = (anchor, candidate, log_scale, hard)
    return (*[grad if need else None for grad, need in zip(grads, needs, strict=True)], *[None] * 5)


contrast.register_autograd(_backward, setup_context=_remember)
