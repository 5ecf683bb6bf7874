"""Triton kernels of `info_nce`. Imported only where they run or are compiled.

Vectors are read as they are; one over their length, float32, multiplies their products. Logits are in units of log 2,
so one `exp2` a logit suffices. No atomics: what several blocks add up goes to a row each of a small buffer.
"""

from __future__ import annotations

import triton
import triton.language as tl

# N = anchors (of one chunk where `first` is given), K = candidates, D = size of a vector, P = positives of an anchor

_SMALLEST_NORM = tl.constexpr(1e-12)

TOP = tl.constexpr(117.0)
"""Exponent of the largest term: 256 of them still add up to a normal float32."""

NARROW = tl.constexpr(242.0)
"""Exponents from the largest to the smallest normal term. Logits of a wider range are added up in two parts."""


@triton.jit(do_not_specialize=["N"])
def norms_kernel(rows, norms, N, D, stride, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Writes one over the length of each row in float32; 0 for a row without direction."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = rows + n.to(tl.int64)[:, None] * stride
    square = tl.zeros((BLOCK_N,), tl.float32)
    for d in range(0, D, BLOCK_D):
        place = d + tl.arange(0, BLOCK_D)
        inside = (n[:, None] < N) & (place[None, :] < D)
        x = tl.load(start + place[None, :], mask=inside, other=0.0).to(tl.float32)
        square += tl.sum(x * x, axis=1)
    length = tl.sqrt(square)
    tl.store(norms + n, tl.where(length > _SMALLEST_NORM, 1.0 / length, 0.0), mask=n < N)


@triton.jit(do_not_specialize=["N"])
def positives_kernel(
    anchors,
    candidates,
    anchor_norms,
    candidate_norms,
    places,
    cosines,
    N,
    D,
    anchor_stride,
    candidate_stride,
    P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Writes `[N, P]` cosines of anchors with their positives; 0 for a place that holds none."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    p = tl.program_id(1)
    own = n < N
    place = tl.load(places + n * P + p, mask=own, other=-1)
    real = place >= 0
    row = anchors + n.to(tl.int64)[:, None] * anchor_stride
    other_row = candidates + tl.maximum(place, 0).to(tl.int64)[:, None] * candidate_stride
    product = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = real[:, None] & (d[None, :] < D)
        x = tl.load(row + d[None, :], mask=inside, other=0.0).to(tl.float32)
        y = tl.load(other_row + d[None, :], mask=inside, other=0.0).to(tl.float32)
        product += tl.sum(x * y, axis=1)
    norm = tl.load(anchor_norms + n, mask=own, other=0.0)
    other_norm = tl.load(candidate_norms + place, mask=real, other=0.0)
    tl.store(cosines + n * P + p, product * norm * other_norm, mask=own)


@triton.jit
def _products(
    anchors,
    candidates,
    n,
    k,
    N,
    K,
    D,
    anchor_stride,
    candidate_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of products of raw vectors, from anchor `n` and candidate `k` on; beyond the last row arbitrary."""
    product = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    if TMA:
        for d in range(0, D, BLOCK_D):
            x, y = anchors.load([n, d]), candidates.load([k, d])
            product = tl.dot(x, y.T, product, input_precision=PRECISION)
    else:
        rows = tl.minimum(n + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
        other_rows = tl.minimum(k + tl.arange(0, BLOCK_K), K - 1).to(tl.int64)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            x = tl.load(anchors + rows[:, None] * anchor_stride + d[None, :], mask=d[None, :] < D, other=0.0)
            y = tl.load(
                candidates + other_rows[None, :] * candidate_stride + d[:, None], mask=d[:, None] < D, other=0.0
            )
            product = tl.dot(x, y, product, input_precision=PRECISION)
    return product


@triton.jit
def _tile_of(N, K, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr):
    """Which tile this program computes: in bands of row blocks, so that tiles of one time share their vectors in L2."""
    tiles_n, tiles_k = tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K)
    program = tl.program_id(0)
    band = program // (BAND * tiles_k)
    height = tl.minimum(tiles_n - band * BAND, BAND)
    within = program - band * BAND * tiles_k
    return band * BAND + within % height, within // height


@triton.jit
def _different(
    logit,
    row,
    k,
    own,
    candidate,
    num_anchors,
    K,
    places,
    answers,
    candidate_answers,
    ANCHOR_ANSWERS: tl.constexpr,
    CANDIDATE_ANSWERS: tl.constexpr,
):
    """The logits of a tile, -inf where the candidate shares an answer with the anchor."""
    if ANCHOR_ANSWERS == 0:
        place = tl.load(places + row, mask=own, other=-1)
        logit = tl.where(k[None, :] == place[:, None], float("-inf"), logit)
    for p in tl.static_range(ANCHOR_ANSWERS):
        answer = tl.load(answers + p * num_anchors + row, mask=own, other=0)
        for q in tl.static_range(CANDIDATE_ANSWERS):
            candidate_answer = tl.load(candidate_answers + q * K + k, mask=candidate, other=0)
            logit = tl.where(answer[:, None] == candidate_answer[None, :], float("-inf"), logit)
    return logit


@triton.jit
def _masked(
    value,
    fill,
    logit,
    row,
    own,
    k,
    count,
    groups,
    other_groups,
    owners,
    other_owners,
    nearest,
    GROUPS: tl.constexpr,
    OWNERS: tl.constexpr,
    MARGIN: tl.constexpr,
):
    """The values of a tile, filled where group, owner or margin say that there is no negative.

    `count` of the columns carry labels. `nearest` is the largest logit that the margin lets through.
    """
    if GROUPS:
        group, other_group = (
            tl.load(groups + row, mask=own, other=0),
            tl.load(other_groups + k, mask=k < count, other=0),
        )
        value = tl.where(group[:, None] == other_group[None, :], value, fill)
    if OWNERS:
        owner, other_owner = (
            tl.load(owners + row, mask=own, other=0),
            tl.load(other_owners + k, mask=k < count, other=0),
        )
        value = tl.where(owner[:, None] != other_owner[None, :], value, fill)
    if MARGIN:
        value = tl.where(logit <= nearest, value, fill)
    return value


@triton.jit
def _terms(logit, shift, floor):
    """`2^(logit - shift)`, but minus `2^(logit + TOP)` below the floor: both sums are told apart by the sign."""
    return tl.where(logit < floor, -tl.exp2(logit + TOP), tl.exp2(logit - shift))


@triton.jit
def _store_sums(target, term, place, inside, step, wide, AXIS: tl.constexpr):
    """Writes sums along an axis of the terms of either sign, the second `step` behind the first."""
    if wide:
        tl.store(target + place, tl.sum(tl.maximum(term, 0.0), axis=AXIS), mask=inside)
        tl.store(target + step + place, -tl.sum(tl.minimum(term, 0.0), axis=AXIS), mask=inside)
    else:
        tl.store(target + place, tl.sum(term, axis=AXIS), mask=inside)
        tl.store(target + step + place, place.to(tl.float32) * 0.0, mask=inside)


@triton.jit
def _add_up(
    product,
    tile_n,
    tile_k,
    anchor_norms,
    candidate_norms,
    factor_pointer,
    places,
    groups,
    candidate_groups,
    owners,
    candidate_owners,
    answers,
    candidate_answers,
    closest,
    row_sums,
    column_sums,
    first,
    N,
    num_anchors,
    K,
    margin,
    ANCHOR_ANSWERS: tl.constexpr,
    CANDIDATE_ANSWERS: tl.constexpr,
    GROUPS: tl.constexpr,
    OWNERS: tl.constexpr,
    MARGIN: tl.constexpr,
    BOTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Sums of the terms of a tile whose products are there."""
    n, k = tile_n * BLOCK_N + tl.arange(0, BLOCK_N), tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    own, candidate, row = n < N, k < K, first + n
    factor = tl.load(factor_pointer)
    row_factor = tl.load(anchor_norms + row, mask=own, other=0.0) * factor
    logit = product * row_factor[:, None] * tl.load(candidate_norms + k, mask=candidate, other=0.0)[None, :]
    # Beyond the last row and column there is nothing to add up.
    logit += tl.where(candidate, 0.0, float("-inf"))[None, :]
    if BOTH:
        logit += tl.where(own, 0.0, float("-inf"))[:, None]
    logit = _different(
        logit, row, k, own, candidate, num_anchors, K, places, answers, candidate_answers, ANCHOR_ANSWERS,
        CANDIDATE_ANSWERS,
    )  # fmt: skip
    shift = tl.maximum(factor - TOP, 0.0)
    wide = 2.0 * factor > NARROW
    floor = tl.where(wide, 0.0, float("-inf"))
    nearest = 0.0
    if MARGIN:
        nearest = tl.load(closest + row, mask=own, other=0.0)[:, None] + margin * factor
    masked = _masked(
        logit, float("-inf"), logit, row, own, k, K, groups, candidate_groups, owners, candidate_owners, nearest,
        GROUPS, OWNERS, MARGIN,
    )  # fmt: skip
    term = _terms(masked, shift, floor)
    row_step = (tl.cdiv(K, BLOCK_K * PIECES) * PIECES).to(tl.int64) * N
    _store_sums(row_sums + tile_k.to(tl.int64) * N, term, n, own, row_step, wide, 1)
    if BOTH:
        if GROUPS or OWNERS or MARGIN:
            if MARGIN:
                nearest = tl.load(closest + k, mask=k < num_anchors, other=0.0)[None, :] + margin * factor
            masked = _masked(
                logit, float("-inf"), logit, row, own, k, num_anchors, groups, groups, owners, owners, nearest, GROUPS,
                OWNERS, MARGIN,
            )  # fmt: skip
            term = _terms(masked, shift, floor)
        column_step = tl.cdiv(N, BLOCK_N).to(tl.int64) * K
        _store_sums(column_sums + tile_n.to(tl.int64) * K, term, k, candidate, column_step, wide, 0)


@triton.jit(do_not_specialize=["first", "N", "num_anchors", "K"])
def sums_kernel(
    anchors,
    candidates,
    anchor_norms,
    candidate_norms,
    factor_pointer,
    places,
    groups,
    candidate_groups,
    owners,
    candidate_owners,
    answers,
    candidate_answers,
    closest,
    row_sums,
    column_sums,
    first,
    N,
    num_anchors,
    K,
    D,
    anchor_stride,
    candidate_stride,
    margin,
    ANCHOR_ANSWERS: tl.constexpr,
    CANDIDATE_ANSWERS: tl.constexpr,
    GROUPS: tl.constexpr,
    OWNERS: tl.constexpr,
    MARGIN: tl.constexpr,
    BOTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BAND: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Adds up `2^(logit - shift)` over the negatives of each row and column of a tile.

    Writes `row_sums [2, tiles of K, N]`, half tiles with SPLIT, and with BOTH `column_sums [2, tiles of N, K]`. The
    first part's shift is `max(0, factor - TOP)`. The second part is 0 unless logits span more than NARROW: then it is
    that of negative logits, with shift `-TOP`. `factor` is log2(e) times the scale.
    """
    tile_n, tile_k = _tile_of(N, K, BLOCK_N, BLOCK_K, BAND)
    product = _products(
        anchors, candidates, first + tile_n * BLOCK_N, tile_k * BLOCK_K, num_anchors, K, D, anchor_stride,
        candidate_stride, BLOCK_N, BLOCK_K, BLOCK_D, TMA, PRECISION,
    )  # fmt: skip
    if SPLIT:
        # A half at a time: the end of a large tile would not fit into registers.
        left, right = tl.split(tl.permute(tl.reshape(product, (BLOCK_N, 2, BLOCK_K // 2)), (0, 2, 1)))
        _add_up(
            left, tile_n, 2 * tile_k, anchor_norms, candidate_norms, factor_pointer, places, groups,
            candidate_groups, owners, candidate_owners, answers, candidate_answers, closest, row_sums, column_sums,
            first, N, num_anchors, K, margin, ANCHOR_ANSWERS, CANDIDATE_ANSWERS, GROUPS, OWNERS, MARGIN, BOTH,
            BLOCK_N, BLOCK_K // 2, 2,
        )  # fmt: skip
        _add_up(
            right, tile_n, 2 * tile_k + 1, anchor_norms, candidate_norms, factor_pointer, places, groups,
            candidate_groups, owners, candidate_owners, answers, candidate_answers, closest, row_sums, column_sums,
            first, N, num_anchors, K, margin, ANCHOR_ANSWERS, CANDIDATE_ANSWERS, GROUPS, OWNERS, MARGIN, BOTH,
            BLOCK_N, BLOCK_K // 2, 2,
        )  # fmt: skip
    else:
        _add_up(
            product, tile_n, tile_k, anchor_norms, candidate_norms, factor_pointer, places, groups,
            candidate_groups, owners, candidate_owners, answers, candidate_answers, closest, row_sums, column_sums,
            first, N, num_anchors, K, margin, ANCHOR_ANSWERS, CANDIDATE_ANSWERS, GROUPS, OWNERS, MARGIN, BOTH,
            BLOCK_N, BLOCK_K, 1,
        )  # fmt: skip


@triton.jit
def _differentiate(
    product,
    tile_n,
    tile_k,
    anchor_norms,
    candidate_norms,
    factor_pointer,
    places,
    groups,
    candidate_groups,
    owners,
    candidate_owners,
    answers,
    candidate_answers,
    closest,
    row_factors,
    column_factors,
    pulls,
    gradients,
    first,
    N,
    num_anchors,
    K,
    gradient_stride,
    margin,
    gain,
    P: tl.constexpr,
    ANCHOR_ANSWERS: tl.constexpr,
    CANDIDATE_ANSWERS: tl.constexpr,
    GROUPS: tl.constexpr,
    OWNERS: tl.constexpr,
    MARGIN: tl.constexpr,
    BOTH: tl.constexpr,
    FOLD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gradients of a tile whose products are there."""
    n, k = tile_n * BLOCK_N + tl.arange(0, BLOCK_N), tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    own, candidate, row = n < N, k < K, first + n
    factor = tl.load(factor_pointer)
    anchor_norm = tl.load(anchor_norms + row, mask=own, other=0.0)
    candidate_norm = tl.load(candidate_norms + k, mask=candidate, other=0.0)
    logit = product * (anchor_norm * factor)[:, None] * candidate_norm[None, :]
    logit = _different(
        logit, row, k, own, candidate, num_anchors, K, places, answers, candidate_answers, ANCHOR_ANSWERS,
        CANDIDATE_ANSWERS,
    )  # fmt: skip
    # Half the exponent: one exp2 serves both directions, and its product with a factor, which holds half the
    # normaliser, squares to the gradient. Nothing overflows, since for every negative that is at most the weight.
    half = tl.exp2(0.5 * logit)
    nearest = 0.0
    if MARGIN:
        nearest = tl.load(closest + row, mask=own, other=0.0)[:, None] + margin * factor
    root = _masked(
        half, 0.0, logit, row, own, k, K, groups, candidate_groups, owners, candidate_owners, nearest, GROUPS, OWNERS,
        MARGIN,
    )  # fmt: skip
    root *= tl.load(row_factors + row, mask=own, other=0.0)[:, None]
    gradient = root * tl.abs(root)
    if BOTH:
        anchor = k < num_anchors
        if MARGIN:
            nearest = tl.load(closest + k, mask=anchor, other=0.0)[None, :] + margin * factor
        root = _masked(
            half, 0.0, logit, row, own, k, num_anchors, groups, groups, owners, owners, nearest, GROUPS, OWNERS, MARGIN
        )
        root *= tl.load(column_factors + k, mask=anchor, other=0.0)[None, :]
        gradient += root * tl.abs(root)
    for p in tl.static_range(P):
        place = tl.load(places + row * P + p, mask=own, other=-1)
        pull = tl.load(pulls + row * P + p, mask=own, other=0.0)
        gradient -= tl.where(k[None, :] == place[:, None], pull[:, None], 0.0)
    gradient *= gain
    if FOLD:
        gradient *= anchor_norm[:, None] * candidate_norm[None, :]
    # The workspace is a whole number of tiles, so nothing is masked. Offsets within a row of tiles fit 32 bits.
    target = gradients + (tile_n * BLOCK_N).to(tl.int64) * gradient_stride
    target += tl.arange(0, BLOCK_N)[:, None] * gradient_stride + k[None, :]
    tl.store(target, gradient.to(gradients.dtype.element_ty))


@triton.jit(do_not_specialize=["first", "N", "num_anchors", "K"])
def gradients_kernel(
    anchors,
    candidates,
    anchor_norms,
    candidate_norms,
    factor_pointer,
    places,
    groups,
    candidate_groups,
    owners,
    candidate_owners,
    answers,
    candidate_answers,
    closest,
    row_factors,
    column_factors,
    pulls,
    gradients,
    first,
    N,
    num_anchors,
    K,
    D,
    anchor_stride,
    candidate_stride,
    gradient_stride,
    margin,
    gain,
    P: tl.constexpr,
    ANCHOR_ANSWERS: tl.constexpr,
    CANDIDATE_ANSWERS: tl.constexpr,
    GROUPS: tl.constexpr,
    OWNERS: tl.constexpr,
    MARGIN: tl.constexpr,
    BOTH: tl.constexpr,
    FOLD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BAND: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Writes `[N, K]` gradients by cosine / scale, times `gain`, and with FOLD over the lengths of both vectors.

    `gradients` has room for whole tiles; beyond N and K it is arbitrary.

    A factor is the square root of a weight, with its sign, over `2^(normaliser / 2)`. A negative of row and column has
    `row weight * 2^(logit - row normaliser) + column weight * 2^(logit - column normaliser)`, a positive minus its
    pull, everything else 0.
    """
    tile_n, tile_k = _tile_of(N, K, BLOCK_N, BLOCK_K, BAND)
    product = _products(
        anchors, candidates, first + tile_n * BLOCK_N, tile_k * BLOCK_K, num_anchors, K, D, anchor_stride,
        candidate_stride, BLOCK_N, BLOCK_K, BLOCK_D, TMA, PRECISION,
    )  # fmt: skip
    if SPLIT:
        # A half at a time: the end of a large tile would not fit into registers.
        left, right = tl.split(tl.permute(tl.reshape(product, (BLOCK_N, 2, BLOCK_K // 2)), (0, 2, 1)))
        _differentiate(
            left, tile_n, 2 * tile_k, anchor_norms, candidate_norms, factor_pointer, places, groups,
            candidate_groups, owners, candidate_owners, answers, candidate_answers, closest, row_factors,
            column_factors, pulls, gradients, first, N, num_anchors, K,
            gradient_stride, margin, gain, P, ANCHOR_ANSWERS, CANDIDATE_ANSWERS, GROUPS, OWNERS, MARGIN, BOTH,
            FOLD, BLOCK_N, BLOCK_K // 2,
        )  # fmt: skip
        _differentiate(
            right, tile_n, 2 * tile_k + 1, anchor_norms, candidate_norms, factor_pointer, places, groups,
            candidate_groups, owners, candidate_owners, answers, candidate_answers, closest, row_factors,
            column_factors, pulls, gradients, first, N, num_anchors, K,
            gradient_stride, margin, gain, P, ANCHOR_ANSWERS, CANDIDATE_ANSWERS, GROUPS, OWNERS, MARGIN, BOTH,
            FOLD, BLOCK_N, BLOCK_K // 2,
        )  # fmt: skip
    else:
        _differentiate(
            product, tile_n, tile_k, anchor_norms, candidate_norms, factor_pointer, places, groups,
            candidate_groups, owners, candidate_owners, answers, candidate_answers, closest, row_factors,
            column_factors, pulls, gradients, first, N, num_anchors, K,
            gradient_stride, margin, gain, P, ANCHOR_ANSWERS, CANDIDATE_ANSWERS, GROUPS, OWNERS, MARGIN, BOTH,
            FOLD, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit(do_not_specialize=["N"])
def project_kernel(
    products,
    rows,
    norms,
    coefficient_pointer,
    gradients,
    inner,
    N,
    D,
    product_stride,
    stride,
    gradient_stride,
    FOLD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Through the normalisation: what of `products [N, D]` is across each row, times the coefficient.

    Writes `[N, D]` gradients of the raw rows, and `[N]` inner products of unit vectors and their gradients over the
    coefficient. With FOLD the products already are over the length of the row.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    own = n < N
    norm = tl.load(norms + n, mask=own, other=0.0)
    product_row = products + n.to(tl.int64)[:, None] * product_stride
    row = rows + n.to(tl.int64)[:, None] * stride
    target = gradients + n.to(tl.int64)[:, None] * gradient_stride
    along = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = own[:, None] & (d[None, :] < D)
        x = tl.load(row + d[None, :], mask=inside, other=0.0).to(tl.float32) * norm[:, None]
        along += tl.sum(x * tl.load(product_row + d[None, :], mask=inside, other=0.0).to(tl.float32), axis=1)
    coefficient = tl.load(coefficient_pointer)
    outer = coefficient if FOLD else coefficient * norm
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = own[:, None] & (d[None, :] < D)
        x = tl.load(row + d[None, :], mask=inside, other=0.0).to(tl.float32) * norm[:, None]
        y = tl.load(product_row + d[None, :], mask=inside, other=0.0).to(tl.float32)
        found = (y - x * along[:, None]) * (outer if FOLD else outer[:, None])
        tl.store(target + d[None, :], found.to(gradients.dtype.element_ty), mask=inside)
    # With FOLD a row's length was divided out of the products: with it back, this is the unit vector's share.
    length = tl.where(norm > 0, 1.0 / norm, 0.0)
    tl.store(inner + n, along * length if FOLD else along, mask=own)
