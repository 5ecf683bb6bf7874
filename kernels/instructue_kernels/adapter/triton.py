"""The adapter's Triton kernels. Imported only where they run or are compiled.

Four kernels: statistics of each vector; gather, dequantise, normalise, first product, bias and GELU in one; any other
product with a source's weights, with the bias or GELU's derivative behind it; and sums over texts of outer products.
Rows of a tile belong to one source. Lengths are plain arguments, so no new length compiles anything.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from instructue_kernels.adapter.chunked import finish
from instructue_kernels.adapter.reference import Parameters, Texts

# N = texts, R = sources, D = encoder size, M = middle size, H = hidden size, X and Y = columns of two factors

BLOCK_ROWS = 128
BLOCK_COLUMNS = 128
BLOCK_INNER = 64
GELU_COLUMNS = 64
"""Columns of a product that GELU's derivative follows: with 128 its two outputs do not fit into registers."""

BLOCK_VECTOR = 128
WARPS = 8
STAGES = 3
MAX_SPLITS = 16
_ROWS_OF_A_SPLIT = 4096

_HALF_ROOT = tl.constexpr(0.7071067811865476)
_DENSITY = tl.constexpr(0.3989422804014327)


@triton.jit
def _own_rows(offsets, num_sources, tile, BLOCK: tl.constexpr):
    """Source, first text and end of a tile, or source -1 beyond the last. Tiles of a source follow one another."""
    source = -1
    first = tl.zeros((), tl.int64)
    end = tl.zeros((), tl.int64)
    seen = tl.zeros((), tl.int64)
    for r in range(num_sources):
        begin = tl.load(offsets + r)
        stop = tl.load(offsets + r + 1)
        tiles = (stop - begin + BLOCK - 1) // BLOCK
        inside = (tile >= seen) & (tile < seen + tiles)
        source = tl.where(inside, r, source)
        first = tl.where(inside, begin + (tile - seen) * BLOCK, first)
        end = tl.where(inside, stop, end)
        seen += tiles
    return source, first, end


@triton.jit
def _gelu(z):
    return 0.5 * z * (1.0 + tl.erf(z * _HALF_ROOT))


@triton.jit(do_not_specialize=["num_texts"])
def statistics_kernel(
    vectors, rows, scale, mean, spread, num_texts, D, vector_stride, eps,
    HAS_ROWS: tl.constexpr, HAS_SCALE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Mean and inverse standard deviation of each text's dequantised vector, in float32."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = n < num_texts
    row = tl.load(rows + n, mask=there, other=0) if HAS_ROWS else n
    factor = tl.load(scale + row, mask=there, other=0.0) if HAS_SCALE else 1.0
    start = vectors + row[:, None] * vector_stride
    total = tl.zeros((BLOCK_N,), tl.float32)
    for d in range(0, D, BLOCK_D):
        place = d + tl.arange(0, BLOCK_D)
        inside = there[:, None] & (place[None, :] < D)
        total += tl.sum(tl.load(start + place[None, :], mask=inside, other=0.0).to(tl.float32), axis=1)
    centre = total / D
    square = tl.zeros((BLOCK_N,), tl.float32)
    for d in range(0, D, BLOCK_D):
        place = d + tl.arange(0, BLOCK_D)
        inside = there[:, None] & (place[None, :] < D)
        x = tl.load(start + place[None, :], mask=inside, other=0.0).to(tl.float32)
        away = tl.where(inside, x - centre[:, None], 0.0)
        square += tl.sum(away * away, axis=1)
    tl.store(mean + n, centre * factor, mask=there)
    tl.store(spread + n, 1.0 / tl.sqrt(square / D * factor * factor + eps), mask=there)


@triton.jit
def up_kernel(
    vectors, rows, scale, mean, spread, norm_weight, norm_bias, up, up_bias, offsets, before, middle,
    num_sources, D, M, vector_stride,
    HAS_ROWS: tl.constexpr, HAS_SCALE: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Writes `gelu(z)`, and `z` if it is kept; normalised vectors never leave the registers."""
    source, first, end = _own_rows(offsets, num_sources, tl.program_id(0), BLOCK_N)
    if source < 0:
        return
    n = first + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = n < end
    row = tl.load(rows + n, mask=there, other=0) if HAS_ROWS else n
    factor = tl.load(scale + row, mask=there, other=0.0) if HAS_SCALE else 1.0
    centre = tl.load(mean + n, mask=there, other=0.0)
    width = tl.load(spread + n, mask=there, other=0.0)
    start = vectors + row[:, None] * vector_stride
    weights = up + source.to(tl.int64) * M * D + m[None, :] * D
    z = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for d in range(0, D, BLOCK_D):
        place = d + tl.arange(0, BLOCK_D)
        real = place < D
        x = tl.load(start + place[None, :], mask=there[:, None] & real[None, :], other=0.0).to(tl.float32)
        if HAS_SCALE:
            x = x * factor[:, None]  # type: ignore[index]
        w = tl.load(norm_weight + source * D + place, mask=real, other=0.0).to(tl.float32)
        b = tl.load(norm_bias + source * D + place, mask=real, other=0.0).to(tl.float32)
        normed = (x - centre[:, None]) * width[:, None] * w[None, :] + b[None, :]
        own = tl.load(weights + place[:, None], mask=real[:, None] & (m[None, :] < M), other=0.0)
        z = tl.dot(normed.to(own.dtype), own, z, input_precision=PRECISION)
    z += tl.load(up_bias + source * M + m, mask=m < M, other=0.0).to(tl.float32)[None, :]
    target = n[:, None] * M + m[None, :]
    inside = there[:, None] & (m[None, :] < M)
    if KEEP:
        tl.store(before + target, z.to(before.dtype.element_ty), mask=inside)
    tl.store(middle + target, _gelu(z).to(middle.dtype.element_ty), mask=inside)


@triton.jit
def product_kernel(
    left, weights, bias, offsets, before, middle, out, num_sources, X, Y, source_stride, inner_stride, column_stride,
    GELU_BACKWARD: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """`out[n, y] = sum_x left[n, x] weights[source, x, y]`, plus bias; or times `gelu'(z)`, `gelu(z)` beside it."""
    source, first, end = _own_rows(offsets, num_sources, tl.program_id(0), BLOCK_N)
    if source < 0:
        return
    n = first + tl.arange(0, BLOCK_N)
    y = tl.program_id(1) * BLOCK_Y + tl.arange(0, BLOCK_Y)
    there = n < end
    factor = weights + source.to(tl.int64) * source_stride + y[None, :] * column_stride
    total = tl.zeros((BLOCK_N, BLOCK_Y), tl.float32)
    for x in range(0, X, BLOCK_X):
        place = x + tl.arange(0, BLOCK_X)
        a = tl.load(left + n[:, None] * X + place[None, :], mask=there[:, None] & (place[None, :] < X), other=0.0)
        b = tl.load(factor + place[:, None] * inner_stride, mask=(place[:, None] < X) & (y[None, :] < Y), other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    target = n[:, None] * Y + y[None, :]
    inside = there[:, None] & (y[None, :] < Y)
    if GELU_BACKWARD:
        z = tl.load(before + target, mask=inside, other=0.0).to(tl.float32)
        share = 0.5 * (1.0 + tl.erf(z * _HALF_ROOT))
        tl.store(middle + target, (z * share).to(middle.dtype.element_ty), mask=inside)
        total = total * (share + z * _DENSITY * tl.exp(-0.5 * z * z))
    else:
        total += tl.load(bias + source * Y + y, mask=y < Y, other=0.0).to(tl.float32)[None, :]
    tl.store(out + target, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["splits"])
def outer_kernel(
    left, right, rows, scale, mean, spread, offsets, outer, sums, num_sources, X, Y, right_stride, splits,
    NORMALISE: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_SCALE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A part of `outer[x, y] = sum_n left[n, x] right[n, y]` over a source, and of `sums[x] = sum_n left[n, x]`.

    Parts lie one after the other and are added up later, in one order. `right` may be vectors to gather and normalise.
    """
    tiles_x = tl.cdiv(X, BLOCK_X)
    source = tl.program_id(0) // tiles_x
    x = (tl.program_id(0) % tiles_x) * BLOCK_X + tl.arange(0, BLOCK_X)
    y = tl.program_id(1) * BLOCK_Y + tl.arange(0, BLOCK_Y)
    part = tl.program_id(2)
    begin = tl.load(offsets + source)
    end = tl.load(offsets + source + 1)
    share = tl.cdiv(tl.cdiv(end - begin, splits), BLOCK_N) * BLOCK_N
    first = begin + part * share
    last = tl.minimum(first + share, end)
    total = tl.zeros((BLOCK_X, BLOCK_Y), tl.float32)
    column = tl.zeros((BLOCK_X,), tl.float32)
    for start in range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        there = n < last
        a = tl.load(left + n[None, :] * X + x[:, None], mask=there[None, :] & (x[:, None] < X), other=0.0)
        inside = there[:, None] & (y[None, :] < Y)
        if NORMALISE:
            row = tl.load(rows + n, mask=there, other=0) if HAS_ROWS else n
            v = tl.load(right + row[:, None] * right_stride + y[None, :], mask=inside, other=0.0).to(tl.float32)
            if HAS_SCALE:
                v = v * tl.load(scale + row, mask=there, other=0.0)[:, None]
            centre = tl.load(mean + n, mask=there, other=0.0)
            width = tl.load(spread + n, mask=there, other=0.0)
            b = ((v - centre[:, None]) * width[:, None]).to(a.dtype)
        else:
            b = tl.load(right + n[:, None] * right_stride + y[None, :], mask=inside, other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        column += tl.sum(a.to(tl.float32), axis=1)
    place = (part * num_sources + source).to(tl.int64) * X + x
    tl.store(outer + place[:, None] * Y + y[None, :], total, mask=(x[:, None] < X) & (y[None, :] < Y))
    if tl.program_id(1) == 0:
        tl.store(sums + place, column, mask=x < X)


def forward(texts: Texts, parameters: Parameters, eps: float, keep: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """As `chunked.forward`."""
    texts, parameters = _ready(texts, parameters)
    before_NM, middle_NM = _up(texts, parameters, _statistics(texts, eps), keep)
    down_RHM = parameters.down_RHM
    soft_NH = down_RHM.new_empty(texts.number, down_RHM.shape[1])
    _product(middle_NM, down_RHM, (2, 1), texts.offsets, soft_NH, bias=parameters.down_bias_RH)
    return soft_NH, before_NM


def backward(
    grad_NH: torch.Tensor,
    before_NM: torch.Tensor,
    texts: Texts,
    parameters: Parameters,
    eps: float,
    *,
    of_vectors: bool,
) -> tuple[torch.Tensor, Parameters]:
    """As `chunked.backward`, but for gradients of vectors.

    Raises:
        ValueError: Gradients of the vectors are asked for.
    """
    if of_vectors:
        raise ValueError("impl 'triton' has no gradient of the vectors: freeze the encoder, or use chunked")
    texts, parameters = _ready(texts, parameters)
    statistics = _statistics(texts, eps)
    if len(before_NM) != texts.number:
        before_NM, _ = _up(texts, parameters, statistics, keep=True)
    grad_NH = grad_NH.contiguous()
    inner_NM, middle_NM = torch.empty_like(before_NM), torch.empty_like(before_NM)
    _product(grad_NH, parameters.down_RHM, (1, 2), texts.offsets, inner_NM, before=before_NM, middle=middle_NM)
    down_RHM, down_bias_RH = _outer(grad_NH, middle_NM, texts, None)
    product_RMD, up_bias_RM = _outer(inner_NM, texts.vectors_UD, texts, statistics)
    totals = Parameters(*parameters[:2], product_RMD, up_bias_RM, down_RHM, down_bias_RH)
    return texts.vectors_UD.new_empty(0, texts.vectors_UD.shape[1]), finish(totals, parameters)


def _ready(texts: Texts, parameters: Parameters) -> tuple[Texts, Parameters]:
    """Offsets on the device, and everything as the kernels index it."""
    vectors = texts.vectors_UD if texts.vectors_UD.stride(1) == 1 else texts.vectors_UD.contiguous()
    if texts.offsets.device.type == "cpu":  # elsewhere a look at them would make the GPU wait
        texts.check()
    offsets = texts.offsets.to(vectors.device, non_blocking=True).contiguous()
    rows, scale = (None if one is None else one.contiguous() for one in (texts.rows_N, texts.scale_U))
    return Texts(vectors, rows, offsets, scale), Parameters(*(one.contiguous() for one in parameters))


def _precision(dtype: torch.dtype) -> str:
    """Of float32 products: what torch's own would have. Half precision has one only."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _flags(texts: Texts) -> dict[str, bool]:
    return {"HAS_ROWS": texts.rows_N is not None, "HAS_SCALE": texts.scale_U is not None}


def _statistics(texts: Texts, eps: float) -> torch.Tensor:
    """`[2, N]` mean and inverse standard deviation."""
    vectors, number = texts.vectors_UD, texts.number
    found_2N = torch.empty(2, number, dtype=torch.float32, device=vectors.device)
    if number:
        block = 16
        statistics_kernel[(triton.cdiv(number, block),)](
            vectors, texts.rows_N, texts.scale_U, found_2N[0], found_2N[1], number, vectors.shape[1],
            vectors.stride(0), eps, **_flags(texts), BLOCK_N=block, BLOCK_D=BLOCK_VECTOR, num_warps=4,
        )  # fmt: skip
    return found_2N


def _row_tiles(number: int, sources: int, block: int) -> int:
    """Enough tiles of rows, however the texts are spread over the sources."""
    return int(triton.cdiv(number, block)) + min(sources, number)


def _up(
    texts: Texts, parameters: Parameters, statistics_2N: torch.Tensor, keep: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`z` if it is kept, else nothing, and `gelu(z)`."""
    up, number = parameters.up_RMD, texts.number
    sources, middle, dim = up.shape
    before_NM = up.new_empty(number if keep else 0, middle)
    middle_NM = up.new_empty(number, middle)
    if number:
        grid = (_row_tiles(number, sources, BLOCK_ROWS), triton.cdiv(middle, BLOCK_COLUMNS))
        up_kernel[grid](
            texts.vectors_UD, texts.rows_N, texts.scale_U, statistics_2N[0], statistics_2N[1], *parameters[:4],
            texts.offsets, before_NM, middle_NM, sources, dim, middle, texts.vectors_UD.stride(0), **_flags(texts),
            KEEP=keep, PRECISION=_precision(up.dtype), BLOCK_N=BLOCK_ROWS, BLOCK_M=BLOCK_COLUMNS, BLOCK_D=BLOCK_INNER,
            num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
    return before_NM, middle_NM


def _product(
    left_NX: torch.Tensor,
    weights: torch.Tensor,
    axes: tuple[int, int],
    offsets: torch.Tensor,
    out_NY: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    before: torch.Tensor | None = None,
    middle: torch.Tensor | None = None,
) -> None:
    """Fills `out_NY`; `axes` are those of the weights that X and Y stand for."""
    (number, inner), columns = left_NX.shape, out_NY.shape[1]
    if not number:
        return
    sources, block = len(weights), BLOCK_COLUMNS if before is None else GELU_COLUMNS
    product_kernel[(_row_tiles(number, sources, BLOCK_ROWS), triton.cdiv(columns, block))](
        left_NX, weights, bias, offsets, before, middle, out_NY, sources, inner, columns,
        weights.stride(0), weights.stride(axes[0]), weights.stride(axes[1]),
        GELU_BACKWARD=before is not None, PRECISION=_precision(weights.dtype),
        BLOCK_N=BLOCK_ROWS, BLOCK_Y=block, BLOCK_X=BLOCK_INNER, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip


def _outer(
    left_NX: torch.Tensor, right: torch.Tensor, texts: Texts, statistics_2N: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[R, X, Y]` sums of outer products and `[R, X]` sums, in float32."""
    (number, x_size), y_size, sources = left_NX.shape, right.shape[1], len(texts.offsets) - 1
    splits = max(1, min(MAX_SPLITS, triton.cdiv(number, _ROWS_OF_A_SPLIT)))
    outer = torch.empty(splits, sources, x_size, y_size, dtype=torch.float32, device=left_NX.device)
    sums = torch.empty(splits, sources, x_size, dtype=torch.float32, device=left_NX.device)
    mean, spread = (None, None) if statistics_2N is None else (statistics_2N[0], statistics_2N[1])
    outer_kernel[(sources * triton.cdiv(x_size, BLOCK_COLUMNS), triton.cdiv(y_size, BLOCK_COLUMNS), splits)](
        left_NX, right, texts.rows_N, texts.scale_U, mean, spread, texts.offsets, outer, sums, sources, x_size, y_size,
        right.stride(0), splits, NORMALISE=mean is not None, **_flags(texts), PRECISION=_precision(left_NX.dtype),
        BLOCK_X=BLOCK_COLUMNS, BLOCK_Y=BLOCK_COLUMNS, BLOCK_N=BLOCK_INNER, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return outer.sum(0), sums.sum(0)
