"""The loss in row chunks: the similarity matrix is never held, forward or backward.

A torch custom op (`instructue::contrast`), so `torch.compile` takes it whole. The backward computes each chunk again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from instructue_kernels.info_nce.factors import gradient_factors, losses
from instructue_kernels.info_nce.reference import closest, compute_dtype, inverse_norms, negatives

# N = anchors, K = candidates, D = size of a vector, R = own hard negatives of an anchor, P = positives of an anchor
# C = anchors of a chunk, S = directions (1, or 2 in one pass), L = labels of a row: its group, its owner, its answers

CHUNK_ELEMENTS = 2**21
"""Elements of a chunk's similarities: 8 MB in float32. Two such buffers live at once, more with masks."""

_NARROW_SCALE = 79.0
"""Up to this scale exp(logit - shift) and sums of a million such terms are normal float32 numbers."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some anchors against all candidates.

    Attributes:
        rows: Which anchors.
        anchor_CD: Their unit vectors.
        inverse_C1: One over the length of the anchors as given.
        cosine_CK: Cosines with the candidates, times a factor if one was asked for; in a buffer the next chunk reuses.
        positive_CP: Of those, the positives'.
        negative_CK: Which candidates are negatives; None: all but the positive.
        column_CN: Which of these anchors are negatives of candidate n as an anchor; None as above.
        hard_CRD: Unit vectors of the anchors' own hard negatives, if they have any.
        inverse_CR1: One over the length of those as given.
        cosine_CR: Cosines with those, times the factor.
        negative_CR: Which of those are within the margin.
    """

    rows: slice
    anchor_CD: torch.Tensor
    inverse_C1: torch.Tensor
    cosine_CK: torch.Tensor
    positive_CP: torch.Tensor
    negative_CK: torch.Tensor | None
    column_CN: torch.Tensor | None
    hard_CRD: torch.Tensor | None
    inverse_CR1: torch.Tensor | None
    cosine_CR: torch.Tensor | None
    negative_CR: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Problem:
    """Arguments of `contrast` that are no vectors; see `Direction` for their meaning."""

    place_NP: torch.Tensor
    anchor_labels_LN: torch.Tensor
    candidate_labels_LK: torch.Tensor
    compared: Sequence[bool]
    both: bool
    margin: float | None

    def negatives(self, rows: slice) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Masks of a chunk by label, both directions; None where only the positive is no negative."""
        group, owner, answers = self.compared
        if not any(self.compared) and self.margin is None:
            return None, None
        anchors_LC = self.anchor_labels_LN[:, rows]
        mask = negatives(anchors_LC, self.candidate_labels_LK)
        if not answers:
            mask.scatter_(1, self.place_NP[rows], False)
        if not self.both:
            return mask, None
        # Here candidates are anchors: their group and owner are those of their queries.
        count = self.anchor_labels_LN.shape[1]
        column = mask.new_ones(len(mask), count)
        if answers:
            column &= anchors_LC[2, :, None] != self.candidate_labels_LK[2, :count]
        else:
            column.scatter_(1, self.place_NP[rows], False)
        if group:
            column &= anchors_LC[0, :, None] == self.anchor_labels_LN[0]
        if owner:
            column &= anchors_LC[1, :, None] != self.anchor_labels_LN[1]
        return mask, column


def chunks(
    anchor_ND: torch.Tensor,
    unit_KD: torch.Tensor,
    hard_NRD: torch.Tensor | None,
    problem: Problem,
    rows: int = 0,
    factor: torch.Tensor | None = None,
) -> Iterator[Chunk]:
    """Similarities and masks, `rows` anchors at a time; 0 fits the chunk to the number of candidates.

    `unit_KD` are unit vectors in the dtype to compute in. `factor` multiplies all cosines.
    """
    factor = unit_KD.new_ones(()) if factor is None else factor
    anchors = len(anchor_ND)
    hard_size = 0 if hard_NRD is None else hard_NRD[0:1].numel()
    step = min(rows or max(1, CHUNK_ELEMENTS // max(1, len(unit_KD) + hard_size)), max(1, anchors))
    buffer = unit_KD.new_empty(step, len(unit_KD))
    anchor_ND = anchor_ND.to(unit_KD.dtype)
    inverse_N1 = inverse_norms(anchor_ND)
    anchor_ND = anchor_ND * inverse_N1
    limit = None if problem.margin is None else problem.margin * factor
    own_N = None
    if problem.both and limit is not None:
        own_N = torch.einsum("nd,nd->n", anchor_ND, unit_KD[:anchors]) * factor
    for start in range(0, anchors, step):
        own = slice(start, start + step)
        anchor_CD = anchor_ND[own]
        cosine_CK = torch.mm(anchor_CD * factor, unit_KD.T, out=buffer[: len(anchor_CD)])
        positive_CP = cosine_CK.gather(1, problem.place_NP[own].clamp(min=0))
        negative_CK, column_CN = problem.negatives(own)
        nearest_C1 = closest(positive_CP, problem.place_NP[own])
        if limit is not None and negative_CK is not None:
            negative_CK &= cosine_CK <= nearest_C1 + limit
            if column_CN is not None and own_N is not None:
                column_CN &= cosine_CK[:, :anchors] <= own_N + limit
        hard: tuple[torch.Tensor | None, ...] = (None,) * 4
        if hard_NRD is not None:
            hard_CRD = hard_NRD[own].to(unit_KD.dtype)
            inverse_CR1 = inverse_norms(hard_CRD)
            hard_CRD = hard_CRD * inverse_CR1
            cosine_CR = torch.einsum("cd,crd->cr", anchor_CD, hard_CRD) * factor
            negative_CR = torch.ones_like(cosine_CR, dtype=torch.bool)
            if limit is not None:
                negative_CR = cosine_CR <= nearest_C1 + limit
            hard = (hard_CRD, inverse_CR1, cosine_CR, negative_CR)
        yield Chunk(own, anchor_CD, inverse_N1[own], cosine_CK, positive_CP, negative_CK, column_CN, *hard)


class _Exponentials:
    """`exp(logit - shift)`, 0 where no negative: in float32 if the scale allows it, else in float64.

    Looking at the scale would stop a GPU, which is fast enough at float64 exponentials.
    """

    def __init__(self, scale: torch.Tensor) -> None:
        narrow = scale.dtype == torch.float64 or (scale.device.type == "cpu" and scale.item() <= _NARROW_SCALE)
        self.dtype = scale.dtype if narrow else torch.float64
        self.shift = max(0.0, scale.item() - 72.0) if scale.device.type == "cpu" and narrow else 0.0
        if scale.dtype == torch.float64:
            self.shift = 0.0

    def of(self, chunk: Chunk, place_CP: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`[C, K]` without the masks, but 0 at the positive if there are none, and `[C, R]`. Overwrites the chunk."""
        found_CK = chunk.cosine_CK.to(self.dtype)
        if self.shift:
            found_CK -= self.shift
        found_CK.exp_()
        if chunk.negative_CK is None:
            found_CK.scatter_(1, place_CP, 0.0)
        if chunk.cosine_CR is None or chunk.negative_CR is None:
            return found_CK, None
        return found_CK, (chunk.cosine_CR.to(self.dtype) - self.shift).exp_().mul_(chunk.negative_CR)

    def log(self, sums: torch.Tensor) -> torch.Tensor:
        """float64 natural logarithm of sums of these."""
        return sums.double().log() + self.shift


@torch.library.custom_op("instructue::contrast", mutates_args=())
def contrast(
    anchor_ND: torch.Tensor,
    candidate_KD: torch.Tensor,
    log_scale: torch.Tensor,
    hard_NRD: torch.Tensor | None,
    place_NP: torch.Tensor,
    anchor_labels_LN: torch.Tensor,
    candidate_labels_LK: torch.Tensor,
    compared: Sequence[bool],
    both: bool,
    margin: float | None,
    chunk_rows: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same function as `contrast_reference` with workspace for a chunk of anchors, once differentiable.

    `compared` and `both` as in `Direction`; `chunk_rows` are the anchors of a chunk, 0 fits it to the number of
    candidates; the other arguments as in `contrast_reference`.

    Returns:
        `[S, N]` losses of each direction; and for the backward, without gradient, `[S, N]` logarithms of the sums over
        negatives and `[N, P]` logits of the positives.
    """
    unit_KD = candidate_KD.to(compute_dtype(anchor_ND, candidate_KD))
    unit_KD = unit_KD * inverse_norms(unit_KD)
    scale = log_scale.to(unit_KD.dtype).exp()
    exponentials = _Exponentials(scale)
    anchors = len(anchor_ND)
    sum_SN = torch.zeros(1 + both, anchors, dtype=exponentials.dtype, device=unit_KD.device)
    positive_NP = unit_KD.new_empty(place_NP.shape)
    problem = Problem(place_NP, anchor_labels_LN, candidate_labels_LK, compared, both, margin)
    for chunk in chunks(anchor_ND, unit_KD, hard_NRD, problem, chunk_rows, scale):
        positive_NP[chunk.rows] = chunk.positive_CP
        term_CK, term_CR = exponentials.of(chunk, place_NP[chunk.rows])
        if both:
            term_CN = term_CK[:, :anchors]
            sum_SN[1] += (term_CN if chunk.column_CN is None else term_CN * chunk.column_CN).sum(dim=0)
        sum_SN[0, chunk.rows] = _row_sums(chunk, term_CK, term_CR)
    log_sum_SN = exponentials.log(sum_SN)
    loss_SN = torch.stack([losses(one_N, positive_NP, place_NP) for one_N in log_sum_SN])
    return loss_SN, log_sum_SN, positive_NP


def _row_sums(chunk: Chunk, term_CK: torch.Tensor, term_CR: torch.Tensor | None) -> torch.Tensor:
    """`[C]` sums over negatives; masks the terms."""
    if chunk.negative_CK is not None:
        term_CK *= chunk.negative_CK
    sum_C = term_CK.sum(dim=1)
    return sum_C if term_CR is None else sum_C + term_CR.sum(dim=1)


@contrast.register_fake
def fake_contrast(
    anchor_ND: torch.Tensor, candidate_KD: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Outputs without values, for `torch.compile`."""
    _, _, place_NP, _, _, _, both, *_ = rest
    dtype = compute_dtype(anchor_ND, candidate_KD)
    loss_SN = anchor_ND.new_empty(1 + both, len(anchor_ND), dtype=dtype)
    log_sum_SN = torch.empty_like(loss_SN, dtype=torch.float64)
    return loss_SN, log_sum_SN, anchor_ND.new_empty(place_NP.shape, dtype=dtype)


@torch.library.custom_op("instructue::contrast_backward", mutates_args=())
def contrast_backward(
    grad_SN: torch.Tensor,
    log_sum_SN: torch.Tensor,
    positive_NP: torch.Tensor,
    needs: Sequence[bool],
    anchor_ND: torch.Tensor,
    candidate_KD: torch.Tensor,
    log_scale: torch.Tensor,
    hard_NRD: torch.Tensor | None,
    place_NP: torch.Tensor,
    anchor_labels_LN: torch.Tensor,
    candidate_labels_LK: torch.Tensor,
    compared: Sequence[bool],
    both: bool,
    margin: float | None,
    chunk_rows: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of anchors, candidates, log scale and hard negatives; empty where `needs` says none is wanted."""
    found = _Gradients(needs, anchor_ND, candidate_KD, log_scale, hard_NRD, grad_SN)
    exponentials = found.exponentials
    row_N1, pull_NP = _factors(found.weight_SN[0], log_sum_SN[0], positive_NP, place_NP, exponentials)
    column_1K = None
    if both:
        column_1K = row_N1.new_zeros(1, len(candidate_KD))
        column_N1, pull_N1 = _factors(found.weight_SN[1], log_sum_SN[1], positive_NP, place_NP, exponentials)
        pull_NP, column_1K[0, : len(column_N1)] = pull_NP + pull_N1, column_N1[:, 0]
    problem = Problem(place_NP, anchor_labels_LN, candidate_labels_LK, compared, both, margin)
    buffer = None
    for chunk in chunks(anchor_ND, found.unit_KD, hard_NRD, problem, chunk_rows, found.scale):
        place_CP = place_NP[chunk.rows]
        term_CK, term_CR = exponentials.of(chunk, place_CP)
        factor_C1 = row_N1[chunk.rows]
        if column_1K is None:
            if chunk.negative_CK is not None:
                term_CK *= chunk.negative_CK
            term_CK *= factor_C1
        elif chunk.negative_CK is None or chunk.column_CN is None:
            buffer = torch.empty_like(term_CK) if buffer is None else buffer
            term_CK *= torch.add(factor_C1, column_1K, out=buffer[: len(term_CK)])
        else:
            factor_CK, count = factor_C1 * chunk.negative_CK, chunk.column_CN.shape[1]
            factor_CK[:, :count] += column_1K[:, :count] * chunk.column_CN
            term_CK *= factor_CK
        found.add(chunk, term_CK, None if term_CR is None else term_CR.mul_(factor_C1), pull_NP[chunk.rows], place_CP)
    return found.result()


@torch.library.custom_op("instructue::contrast_once", mutates_args=())
def contrast_once(
    weight_N: torch.Tensor,
    needs: Sequence[bool],
    anchor_ND: torch.Tensor,
    candidate_KD: torch.Tensor,
    log_scale: torch.Tensor,
    hard_NRD: torch.Tensor | None,
    place_NP: torch.Tensor,
    anchor_labels_LN: torch.Tensor,
    candidate_labels_LK: torch.Tensor,
    compared: Sequence[bool],
    margin: float | None,
    chunk_rows: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`sum of weight * loss` of one direction, and its gradients as of `contrast_backward`, from one pass.

    An anchor's loss depends on its own row of similarities alone, so its gradients can follow at once: three products a
    similarity instead of four, for a backward that only multiplies.
    """
    found = _Gradients(needs, anchor_ND, candidate_KD, log_scale, hard_NRD, weight_N[None])
    exponentials, loss = found.exponentials, found.scale.new_zeros(())
    problem = Problem(place_NP, anchor_labels_LN, candidate_labels_LK, compared, False, margin)
    for chunk in chunks(anchor_ND, found.unit_KD, hard_NRD, problem, chunk_rows, found.scale):
        place_CP = place_NP[chunk.rows]
        term_CK, term_CR = exponentials.of(chunk, place_CP)
        log_sum_C = exponentials.log(_row_sums(chunk, term_CK, term_CR))
        weight_C = found.weight_SN[0, chunk.rows]
        loss += (losses(log_sum_C, chunk.positive_CP, place_CP) * weight_C).sum()
        factor_C1, pull_CP = _factors(weight_C, log_sum_C, chunk.positive_CP, place_CP, exponentials)
        term_CK *= factor_C1
        found.add(chunk, term_CK, None if term_CR is None else term_CR.mul_(factor_C1), pull_CP, place_CP)
    return loss * found.weight, *found.result()


@contrast_once.register_fake
def _(
    weight_N: torch.Tensor, needs: Sequence[bool], *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    del weight_N
    return rest[0].new_empty((), dtype=compute_dtype(*rest[:2])), *fake_backward(
        rest[0], rest[0], rest[0], needs, *rest
    )


class _Gradients:
    """Gradients of raw vectors, added up chunk by chunk from those of logits."""

    def __init__(
        self,
        needs: Sequence[bool],
        anchor_ND: torch.Tensor,
        candidate_KD: torch.Tensor,
        log_scale: torch.Tensor,
        hard_NRD: torch.Tensor | None,
        grad_SN: torch.Tensor,
    ) -> None:
        self.needs_anchor, self.needs_candidate, self.needs_log_scale, self.needs_hard = needs
        raw_KD = candidate_KD.to(compute_dtype(anchor_ND, candidate_KD))
        self.inverse_K1 = inverse_norms(raw_KD)
        self.unit_KD = raw_KD * self.inverse_K1
        self.scale = log_scale.to(raw_KD.dtype).exp()
        self.exponentials = _Exponentials(self.scale)
        # Weights are of the size of 1/N: taken out, factors of exponentials stay normal numbers.
        self.weight = grad_SN.abs().amax().clamp(min=1e-30) if grad_SN.numel() else self.scale.new_ones(())
        self.weight_SN = grad_SN / self.weight
        self.anchor, self.hard = like(anchor_ND, self.needs_anchor), like(hard_NRD, self.needs_hard, anchor_ND)
        self.candidate = torch.zeros_like(self.unit_KD) if self.needs_candidate else self.unit_KD.new_empty(0)
        self.log_scale = self.scale.new_zeros(())
        self.dtypes = candidate_KD.dtype, log_scale.dtype

    def add(
        self,
        chunk: Chunk,
        grad_CK: torch.Tensor,
        grad_CR: torch.Tensor | None,
        pull_CP: torch.Tensor,
        place_CP: torch.Tensor,
    ) -> None:
        """Takes gradients by cosine over scale and weight, 0 at positives, and the positives' pulls."""
        grad_CK = grad_CK.to(self.unit_KD.dtype)
        # A positive is never one of its own negatives: its place is free for the gradient that pulls it closer.
        grad_CK.scatter_add_(1, place_CP.clamp(min=0), -pull_CP.to(grad_CK.dtype))
        if self.needs_candidate:
            self.candidate.addmm_(grad_CK.T, chunk.anchor_CD)
        coefficient = self.scale * self.weight
        hard_CRD, inverse_CR1 = chunk.hard_CRD, chunk.inverse_CR1
        if grad_CR is not None:
            grad_CR = grad_CR.to(self.unit_KD.dtype)
        if self.needs_anchor or self.needs_log_scale:
            grad_CD = grad_CK @ self.unit_KD
            if grad_CR is not None and hard_CRD is not None:
                grad_CD += torch.einsum("cr,crd->cd", grad_CR, hard_CRD)
            along_C1 = (grad_CD * chunk.anchor_CD).sum(dim=1, keepdim=True)
            self.log_scale += along_C1.sum()
            if self.needs_anchor:
                grad_CD.addcmul_(chunk.anchor_CD, along_C1, value=-1.0)
                self.anchor[chunk.rows] = grad_CD.mul_(chunk.inverse_C1 * coefficient)
        if self.needs_hard and grad_CR is not None and hard_CRD is not None and inverse_CR1 is not None:
            grad_CRD = (grad_CR * coefficient)[:, :, None] * chunk.anchor_CD[:, None]
            self.hard[chunk.rows] = through_norm(grad_CRD, hard_CRD, inverse_CR1)

    def result(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of anchors, candidates, log scale and hard negatives."""
        coefficient, candidate = self.scale * self.weight, self.candidate
        if self.needs_candidate:
            candidate = through_norm(candidate.mul_(coefficient), self.unit_KD, self.inverse_K1)
        candidate_dtype, log_scale_dtype = self.dtypes
        return self.anchor, candidate.to(candidate_dtype), (self.log_scale * coefficient).to(log_scale_dtype), self.hard


def _factors(
    grad_N: torch.Tensor,
    log_sum_N: torch.Tensor,
    positive_NP: torch.Tensor,
    place_NP: torch.Tensor,
    exponentials: _Exponentials,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[N, 1]` what exponentials are multiplied by, and the pulls."""
    normaliser_N, pull_NP = gradient_factors(grad_N, log_sum_N, positive_NP, place_NP)
    factor_N = grad_N.double() * (exponentials.shift - normaliser_N).exp()
    return factor_N.to(exponentials.dtype)[:, None], pull_NP


@contrast_backward.register_fake
def fake_backward(
    grad_SN: torch.Tensor, log_sum_SN: torch.Tensor, positive_NP: torch.Tensor, needs: Sequence[bool], *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients without values."""
    del grad_SN, log_sum_SN, positive_NP
    anchor_ND, candidate_KD, log_scale, hard_NRD, *_ = rest
    anchor, hard = like(anchor_ND, needs[0]), like(hard_NRD, needs[3], anchor_ND)
    return anchor, like(candidate_KD, needs[1]), torch.empty_like(log_scale), hard


def like(tensor: torch.Tensor | None, wanted: bool, otherwise: torch.Tensor | None = None) -> torch.Tensor:
    """Room for a gradient of `tensor`; empty if none is wanted, as a custom op cannot return None."""
    if tensor is not None and wanted:
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)
    some = tensor if tensor is not None else otherwise
    assert some is not None
    return some.new_empty(0)


def through_norm(grad: torch.Tensor, unit: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Gradient of the vectors as given from that of their unit vectors."""
    return (grad - unit * (grad * unit).sum(dim=-1, keepdim=True)) * inverse


def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    """Saves inputs and sums for the backward."""
    ctx.save_for_backward(*inputs[:7], *output[1:])
    ctx.rest = inputs[7:]
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad_SN: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:4])
    *tensors, log_sum_SN, positive_NP = ctx.saved_tensors
    grads = contrast_backward(grad_SN, log_sum_SN, positive_NP, needs, *tensors, *ctx.rest)
    wanted = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
    return (*wanted, *[None] * (3 + len(ctx.rest)))


contrast.register_autograd(_backward, setup_context=remember)


def _remember_once(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    del inputs
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward_once(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    needs = ctx.needs_input_grad[2:6]
    wanted = [one * grad.to(one.dtype) if need else None for one, need in zip(ctx.saved_tensors, needs, strict=True)]
    return (None, None, *wanted, *[None] * 6)


contrast_once.register_autograd(_backward_once, setup_context=_remember_once)
