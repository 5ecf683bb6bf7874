"""The loss by Triton kernels: chunks of logits live in registers, chunks of their gradients in a bounded workspace.

Torch custom ops (`instructue::contrast_fused`); Triton is imported when they run.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from instructue_kernels import triton_support
from instructue_kernels.info_nce.chunked import fake_backward, fake_contrast, like, remember, through_norm
from instructue_kernels.info_nce.factors import gradient_factors, losses
from instructue_kernels.info_nce.reference import closest, compute_dtype, inverse_norms
from instructue_kernels.info_nce.tiles import INTERPRETED, Tile, tile_for

# N = anchors, K = candidates, D = size of a vector, R = own hard negatives of an anchor, P = positives of an anchor
# C = anchors of a chunk, S = directions (1, or 2 in one pass), L = labels of a row: its group, its owner, its answers

_LOG2E = math.log2(math.e)

LARGEST_SCALE = 160.0
"""Beyond it float32 exponents do not suffice, and the loss is NaN rather than wrong."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_HALF_GAIN = 2.0**12
"""float16 only: keeps softmax probabilities of 1e-7 among the normal numbers, and the largest gradient finite."""


def problem(query: torch.Tensor, key: torch.Tensor) -> str | None:
    """Why the kernels cannot take these vectors, or None if they can."""
    if compute_dtype(query, key) == torch.float64:
        return "float64 vectors"
    found: str | None = triton_support.problem(query.device.type)
    return found


@dataclass(frozen=True, slots=True)
class _Job:
    """Arguments made ready for kernels.

    Attributes:
        anchor_ND: Contiguous, of the dtype of the candidates.
        candidate_KD: As above.
        anchor_norm_N: float32, one over the length.
        candidate_norm_K: As above.
        scale: float32; NaN beyond LARGEST_SCALE.
        factor: `log2(e) * scale`.
        place_NP: Places of positives.
        positive_NP: Logits of positives, natural.
        labels: Keyword arguments of the kernels: codes, and what of them is compared.
        both: Two directions in one pass.
        margin: Of cosines; 0 where not used.
        tile: Sizes of blocks.
        rows: Anchors of a chunk.
    """

    anchor_ND: torch.Tensor
    candidate_KD: torch.Tensor
    anchor_norm_N: torch.Tensor
    candidate_norm_K: torch.Tensor
    scale: torch.Tensor
    factor: torch.Tensor
    place_NP: torch.Tensor
    positive_NP: torch.Tensor
    labels: dict[str, Any]
    both: bool
    margin: float
    tile: Tile
    rows: int

    def chunks(self) -> Iterator[slice]:
        """Rows of each chunk."""
        for start in range(0, len(self.anchor_ND), self.rows):
            yield slice(start, min(start + self.rows, len(self.anchor_ND)))

    def shared(self, own: slice) -> dict[str, Any]:
        """What both large kernels take."""
        tile = self.tile
        anchors, candidates, tma = self._sources()
        return {
            **self.labels,
            "anchors": anchors,
            "candidates": candidates,
            "anchor_norms": self.anchor_norm_N,
            "candidate_norms": self.candidate_norm_K,
            "factor_pointer": self.factor,
            "places": self.place_NP,
            "first": own.start,
            "N": own.stop - own.start,
            "num_anchors": len(self.anchor_ND),
            "K": len(self.candidate_KD),
            "D": self.anchor_ND.shape[1],
            "anchor_stride": self.anchor_ND.stride(0),
            "candidate_stride": self.candidate_KD.stride(0),
            "margin": self.margin,
            "BOTH": self.both,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "BLOCK_D": tile.block_d,
            "BAND": tile.band,
            "TMA": tma,
            "SPLIT": tile.split,
            "PRECISION": "ieee" if triton_support.is_interpreted() else "tf32x3",
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }

    def _sources(self) -> tuple[Any, Any, bool]:
        """Vectors by TMA descriptor where the tile wants it and the rows allow it, else by pointer."""
        tile, vectors = self.tile, (self.anchor_ND, self.candidate_KD)
        if not tile.tma:
            return *vectors, False
        from triton.tools.tensor_descriptor import TensorDescriptor

        blocks = (tile.block_n, tile.block_k)
        made = [
            TensorDescriptor.from_tensor(one, [block, tile.block_d]) for one, block in zip(vectors, blocks, strict=True)
        ]
        return made[0], made[1], True

    def grid(self, own: slice) -> tuple[int]:
        """One program a tile."""
        return (_tiles(own.stop - own.start, self.tile.block_n) * _tiles(len(self.candidate_KD), self.tile.block_k),)


def _tiles(count: int, block: int) -> int:
    return -(-count // block)


def _ready(
    anchor_ND: torch.Tensor,
    candidate_KD: torch.Tensor,
    log_scale: torch.Tensor,
    place_NP: torch.Tensor,
    anchor_labels_LN: torch.Tensor,
    candidate_labels_LK: torch.Tensor,
    compared: Sequence[bool],
    both: bool,
    margin: float | None,
    chunk_rows: int,
    positive_NP: torch.Tensor | None = None,
) -> _Job:
    dtype = anchor_ND.dtype if anchor_ND.dtype == candidate_KD.dtype in _DTYPES else torch.float32
    anchor_ND, candidate_KD = (one.detach().to(dtype).contiguous() for one in (anchor_ND, candidate_KD))
    norm_N, norm_K = inverse_lengths(anchor_ND), inverse_lengths(candidate_KD)
    scale = log_scale.detach().float().exp()
    # A little beyond, since exp(log(160)) may be.
    scale = torch.where(scale <= LARGEST_SCALE * 1.0001, scale, torch.nan)
    place_NP = place_NP.to(torch.int32).contiguous()
    if positive_NP is None:
        positive_NP = _positives(anchor_ND, candidate_KD, norm_N, norm_K, place_NP) * scale
    group, owner, answers = compared
    anchor_codes, candidate_codes = [], []
    for place, wanted in ((0, group), (1, owner)):
        pair = codes(anchor_labels_LN[place], candidate_labels_LK[place]) if wanted else (None, None)
        anchor_codes.append(pair[0])
        candidate_codes.append(pair[1])
    answer_PN, answer_PK = codes(anchor_labels_LN[2:], candidate_labels_LK[2:]) if answers else (None, None)
    nearest = None
    if margin is not None:
        nearest = (closest(positive_NP, place_NP)[:, 0] * _LOG2E).contiguous()
    labels = {
        "groups": anchor_codes[0],
        "candidate_groups": candidate_codes[0],
        "owners": anchor_codes[1],
        "candidate_owners": candidate_codes[1],
        "answers": answer_PN,
        "candidate_answers": answer_PK,
        "closest": nearest,
        "ANCHOR_ANSWERS": len(anchor_labels_LN) - 2 if answers else 0,
        "CANDIDATE_ANSWERS": len(candidate_labels_LK) - 2 if answers else 0,
        "GROUPS": group,
        "OWNERS": owner,
        "MARGIN": margin is not None,
    }
    capability = triton_support.capability(anchor_ND.device)
    interpreted = triton_support.is_interpreted()
    tile = INTERPRETED
    if not interpreted:
        vectors = (anchor_ND, candidate_KD)
        aligned = all(one.data_ptr() % 16 == 0 and one.stride(0) * one.element_size() % 16 == 0 for one in vectors)
        masked = any(compared) or margin is not None
        tile = tile_for(capability, anchor_ND.shape[1], dtype, masked=masked, aligned=aligned)
    return _Job(
        anchor_ND,
        candidate_KD,
        norm_N,
        norm_K,
        scale,
        scale * _LOG2E,
        place_NP,
        positive_NP,
        labels,
        both,
        margin or 0.0,
        tile,
        chunk_rows or rows_of_chunk(len(candidate_KD), tile.block_n),
    )


def rows_of_chunk(candidates: int, block: int) -> int:
    """Anchors of a chunk: 2^27 gradients (256 MiB in bfloat16), twice that where candidates are very many.

    A chunk of few anchors makes slim products, and each chunk adds to all candidates' gradients once more.
    """
    elements = 2**28 if candidates >= 49_152 else 2**27
    return max(1, elements // max(1, candidates) // block) * block


def codes(anchor: torch.Tensor, candidate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 labels of both as int32 numbers from 0 that are equal where the labels are, without asking the GPU."""
    together = torch.cat([anchor.reshape(-1), candidate.reshape(-1)])
    ordered, order = together.sort()
    number = torch.zeros_like(together, dtype=torch.int32)
    number[1:] = ordered[1:] != ordered[:-1]
    found = torch.empty_like(number)
    found[order] = number.cumsum(0, dtype=torch.int32)
    count = anchor.numel()
    return found[:count].reshape(anchor.shape), found[count:].reshape(candidate.shape)


def inverse_lengths(rows_ND: torch.Tensor) -> torch.Tensor:
    """`[N]` float32, one over the length of each row; 0 for a row without direction."""
    from instructue_kernels.info_nce.triton import norms_kernel

    norm_N = torch.empty(len(rows_ND), dtype=torch.float32, device=rows_ND.device)
    if len(rows_ND):
        grid = (_tiles(len(rows_ND), 16),)
        norms_kernel[grid](rows_ND, norm_N, *rows_ND.shape, rows_ND.stride(0), BLOCK_N=16, BLOCK_D=128)
    return norm_N


def _positives(
    anchor_ND: torch.Tensor,
    candidate_KD: torch.Tensor,
    norm_N: torch.Tensor,
    norm_K: torch.Tensor,
    place_NP: torch.Tensor,
) -> torch.Tensor:
    """`[N, P]` float32 cosines."""
    from instructue_kernels.info_nce.triton import positives_kernel

    (anchors, size), positives = anchor_ND.shape, place_NP.shape[1]
    cosine_NP = torch.empty(anchors, positives, dtype=torch.float32, device=anchor_ND.device)
    positives_kernel[(_tiles(anchors, 16), positives)](
        anchor_ND, candidate_KD, norm_N, norm_K, place_NP, cosine_NP, anchors, size, anchor_ND.stride(0),
        candidate_KD.stride(0), P=positives, BLOCK_N=16, BLOCK_D=128,
    )  # fmt: skip
    return cosine_NP


def _log_sums(job: _Job) -> torch.Tensor:
    """`[S, N]` natural logarithms of the sums over negatives, float64."""
    from instructue_kernels.info_nce.triton import TOP, sums_kernel

    device, anchors, candidates = job.anchor_ND.device, len(job.anchor_ND), len(job.candidate_KD)
    sum_2SN = torch.zeros(2, 1 + job.both, anchors, dtype=torch.float64, device=device)
    for own in job.chunks():
        rows = own.stop - own.start
        pieces = _tiles(candidates, job.tile.block_k) * (2 if job.tile.split else 1)
        row_sums = torch.empty(2, pieces, rows, dtype=torch.float32, device=device)
        column_sums = None
        if job.both:
            column_sums = row_sums.new_empty(2, _tiles(rows, job.tile.block_n), candidates)
        sums_kernel[job.grid(own)](row_sums=row_sums, column_sums=column_sums, **job.shared(own))
        # In float64 the sum of millions is exact enough, and too long for no exponent.
        sum_2SN[:, 0, own] = row_sums.sum(dim=1, dtype=torch.float64)
        if column_sums is not None:
            sum_2SN[:, 1] += column_sums.sum(dim=1, dtype=torch.float64)[:, :anchors]
    shift = (job.factor.double() - TOP.value).clamp(min=0.0)
    log_2SN = sum_2SN.log_()
    return torch.logaddexp(log_2SN[0] + shift / _LOG2E, log_2SN[1] - TOP.value / _LOG2E)


@dataclass(frozen=True, slots=True)
class _Hard:
    """Own hard negatives of some anchors, in plain torch: they share nothing with other anchors.

    Attributes:
        rows: Which anchors.
        unit_CD: Their unit vectors.
        hard_CRD: Unit vectors of their hard negatives.
        inverse_CR1: One over the length of those as given.
        logit_CR: Logits; -inf where beyond the margin.
    """

    rows: slice
    unit_CD: torch.Tensor
    hard_CRD: torch.Tensor
    inverse_CR1: torch.Tensor
    logit_CR: torch.Tensor


def _hard(job: _Job, hard_NRD: torch.Tensor, margin: float | None, within: slice) -> Iterator[_Hard]:
    step = max(1, 2**22 // max(1, hard_NRD[0:1].numel()))
    for start in range(within.start, within.stop, step):
        own = slice(start, min(start + step, within.stop))
        hard_CRD = hard_NRD[own].float()
        inverse_CR1 = inverse_norms(hard_CRD)
        hard_CRD = hard_CRD * inverse_CR1
        unit_CD = job.anchor_ND[own].float() * job.anchor_norm_N[own, None]
        logit_CR = torch.einsum("cd,crd->cr", unit_CD, hard_CRD) * job.scale
        if margin is not None:
            limit_C1 = closest(job.positive_NP[own], job.place_NP[own]) + margin * job.scale
            logit_CR = logit_CR.masked_fill(logit_CR > limit_C1, -torch.inf)
        yield _Hard(own, unit_CD, hard_CRD, inverse_CR1, logit_CR)


@torch.library.custom_op("instructue::contrast_fused", mutates_args=())
def contrast_fused(
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
    """The same function as `contrast` by Triton kernels, for float32 and shorter vectors and scales up to 160."""
    if not len(anchor_ND):
        empty_SN = anchor_ND.new_empty(1 + both, 0, dtype=torch.float32)
        return empty_SN, empty_SN.double(), anchor_ND.new_empty(place_NP.shape, dtype=torch.float32)
    labels = (anchor_labels_LN, candidate_labels_LK, compared, both, margin, chunk_rows)
    with triton_support.on_device_of(anchor_ND):
        job = _ready(anchor_ND, candidate_KD, log_scale, place_NP, *labels)
        log_sum_SN = _log_sums(job)
    if hard_NRD is not None:
        for one in _hard(job, hard_NRD, margin, slice(0, len(anchor_ND))):
            own_C = torch.logsumexp(one.logit_CR.double(), dim=1)
            log_sum_SN[0, one.rows] = torch.logaddexp(log_sum_SN[0, one.rows], own_C)
    loss_SN = torch.stack([losses(one_N, job.positive_NP, place_NP) for one_N in log_sum_SN])
    return loss_SN, log_sum_SN, job.positive_NP


contrast_fused.register_fake(fake_contrast)


@torch.library.custom_op("instructue::contrast_fused_backward", mutates_args=())
def contrast_fused_backward(
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
    if not len(anchor_ND):
        nothing, grad_hard = like(anchor_ND, needs[0]), like(hard_NRD, needs[3], anchor_ND)
        return nothing, like(candidate_KD, needs[1]).zero_(), torch.zeros_like(log_scale), grad_hard
    labels = (anchor_labels_LN, candidate_labels_LK, compared, both, margin, chunk_rows)
    with triton_support.on_device_of(anchor_ND):
        job = _ready(anchor_ND, candidate_KD, log_scale, place_NP, *labels, positive_NP)
        gradients = _Gradients(job, grad_SN, log_sum_SN)
        return _differentiate(job, gradients, needs, anchor_ND, candidate_KD, log_scale, hard_NRD, margin)


def _differentiate(
    job: _Job,
    gradients: _Gradients,
    needs: Sequence[bool],
    anchor_ND: torch.Tensor,
    candidate_KD: torch.Tensor,
    log_scale: torch.Tensor,
    hard_NRD: torch.Tensor | None,
    margin: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Chunk by chunk: gradients by cosine into the workspace, two products, and back through the normalisation."""
    needs_anchor, needs_candidate, needs_log_scale, needs_hard = needs
    grad_anchor, grad_hard = like(anchor_ND, needs_anchor), like(hard_NRD, needs_hard, anchor_ND)
    grad_candidate = like(candidate_KD, needs_candidate)
    inner_N = torch.zeros(len(anchor_ND), dtype=torch.float32, device=anchor_ND.device)
    product_KD: torch.Tensor | None = None
    for own in job.chunks():
        tile_CK = gradients.of(own)
        if needs_candidate:
            product_KD = add_product(product_KD, tile_CK.T, gradients.anchor_ND[own])
        if not (needs_anchor or needs_log_scale or needs_hard):
            continue
        product_CD = add_product(None, tile_CK, gradients.candidate_KD)
        if hard_NRD is not None:
            for one in _hard(job, hard_NRD, margin, own):
                grad_CR = gradients.of_hard(one)
                here = slice(one.rows.start - own.start, one.rows.stop - own.start)
                product_CD[here] += gradients.in_product(torch.einsum("cr,crd->cd", grad_CR, one.hard_CRD), one.rows)
                if needs_hard:
                    grad_CRD = (grad_CR * gradients.weight * job.scale)[:, :, None] * one.unit_CD[:, None]
                    grad_hard[one.rows] = through_norm(grad_CRD, one.hard_CRD, one.inverse_CR1)
        target = grad_anchor[own] if needs_anchor else torch.empty_like(job.anchor_ND[own])
        gradients.project(product_CD, job.anchor_ND[own], job.anchor_norm_N[own], target, inner_N[own])
    if product_KD is not None:
        unused_K = torch.empty_like(job.candidate_norm_K)
        gradients.project(product_KD, job.candidate_KD, job.candidate_norm_K, grad_candidate, unused_K)
    grad_log_scale = inner_N.sum(dtype=torch.float64) * gradients.coefficient.double()
    return grad_anchor, grad_candidate, grad_log_scale.to(log_scale.dtype).reshape(log_scale.shape), grad_hard


contrast_fused_backward.register_fake(fake_backward)


class _Gradients:
    """From sums to gradients by cosine, chunk by chunk in one workspace, and on to gradients of raw vectors.

    Two-byte products lose least if the lengths of vectors are folded into the gradients and raw vectors are multiplied;
    float16 has too few exponents for that and multiplies unit vectors.
    """

    def __init__(self, job: _Job, grad_SN: torch.Tensor, log_sum_SN: torch.Tensor) -> None:
        self.job = job
        dtype = job.anchor_ND.dtype
        self.fold = dtype != torch.float16
        self.gain = 1.0 if self.fold else _HALF_GAIN
        # Weights are of the size of 1/N: taken out, what is rounded to two bytes is of the size of probabilities.
        self.weight = grad_SN.abs().amax().clamp(min=1e-30)
        self.weight_SN = (grad_SN / self.weight).contiguous()
        found = [
            gradient_factors(*one, job.positive_NP, job.place_NP)
            for one in zip(self.weight_SN, log_sum_SN, strict=True)
        ]
        self.normalisers = [one for one, _ in found]
        # In float64, as 2^(normaliser / 2) may be a number that float32 only holds beside the root of a weight.
        roots = self.weight_SN.sign() * self.weight_SN.abs().double().sqrt()
        self.factors = [
            (root * (-0.5 * one.double()).exp()).float() for root, one in zip(roots, self.normalisers, strict=True)
        ]
        self.pull_NP = sum((one for _, one in found[1:]), found[0][1]).float().contiguous()
        self.coefficient = job.scale * self.weight / self.gain
        self.anchor_ND, self.candidate_KD = job.anchor_ND, job.candidate_KD
        if not self.fold:
            self.anchor_ND = (job.anchor_ND * job.anchor_norm_N[:, None]).to(dtype)
            self.candidate_KD = (job.candidate_KD * job.candidate_norm_K[:, None]).to(dtype)
        rows, width = min(job.rows, len(job.anchor_ND)), len(job.candidate_KD)
        shape = [_tiles(*one) * one[1] for one in ((rows, job.tile.block_n), (width, job.tile.block_k))]
        self.workspace = torch.empty(shape, dtype=dtype, device=job.anchor_ND.device)

    def of(self, own: slice) -> torch.Tensor:
        """`[C, K]` gradients of a chunk, in the workspace."""
        from instructue_kernels.info_nce.triton import gradients_kernel

        job = self.job
        gradients_kernel[job.grid(own)](
            row_factors=self.factors[0],
            column_factors=self.factors[1] if job.both else None,
            pulls=self.pull_NP,
            gradients=self.workspace,
            gradient_stride=self.workspace.stride(0),
            gain=self.gain,
            P=job.place_NP.shape[1],
            FOLD=self.fold,
            **job.shared(own),
        )
        return self.workspace[: own.stop - own.start, : len(job.candidate_KD)]

    def of_hard(self, one: _Hard) -> torch.Tensor:
        """`[C, R]` gradients by cosine of hard negatives, over weight and scale."""
        normaliser_C1 = self.normalisers[0][one.rows, None]
        return self.weight_SN[0, one.rows, None] * (one.logit_CR - normaliser_C1).exp().float()

    def in_product(self, unit_CD: torch.Tensor, rows: slice) -> torch.Tensor:
        """A gradient of unit vectors as it stands in the products of this class."""
        norm_C1 = self.job.anchor_norm_N[rows, None]
        return unit_CD * norm_C1 if self.fold else unit_CD * self.gain

    def project(
        self, product: torch.Tensor, rows: torch.Tensor, norms: torch.Tensor, target: torch.Tensor, inner: torch.Tensor
    ) -> None:
        """Writes gradients of raw rows, and of each row the inner product that makes up the scale's gradient."""
        from instructue_kernels.info_nce.triton import project_kernel

        project_kernel[(_tiles(len(rows), 4),)](
            product, rows, norms, self.coefficient, target, inner, *rows.shape, product.stride(0), rows.stride(0),
            target.stride(0), FOLD=self.fold, BLOCK_N=4, BLOCK_D=256,
        )  # fmt: skip


def add_product(total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`total + left @ right` in float32, in place; `None` is zero. By cuBLAS on a GPU."""
    if left.dtype == torch.float32 or left.device.type != "cuda":
        product = left.float() @ right.float()
        return product if total is None else total.add_(product)
    if total is None:
        return torch.mm(left, right, out_dtype=torch.float32)
    if _adds_in_place(left.device):
        return torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    return total.add_(torch.mm(left, right, out_dtype=torch.float32))


@functools.cache
def _adds_in_place(device: torch.device) -> bool:
    """Whether this torch adds a product of two-byte matrices to a float32 matrix; older ones want all three alike."""
    ones = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    total = torch.ones(16, 16, dtype=torch.float32, device=device)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17.0).all())


def _backward(ctx: Any, grad_SN: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:4])
    *tensors, log_sum_SN, positive_NP = ctx.saved_tensors
    grads = contrast_fused_backward(grad_SN, log_sum_SN, positive_NP, needs, *tensors, *ctx.rest)
    wanted = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
    return (*wanted, *[None] * (3 + len(ctx.rest)))


contrast_fused.register_autograd(_backward, setup_context=remember)
