"""The public function of the adapter, as a custom op: opaque to `torch.compile`, with its own backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from instructue_kernels import triton_support
from instructue_kernels.adapter import chunked
from instructue_kernels.adapter.reference import Parameters, Texts, adapter_reference

# U = stored vectors, N = texts, R = sources, D = encoder size, M = middle size, H = hidden size of the LLM

Impl = Literal["auto", "triton", "chunked", "reference"]


MEMORY_BOUND = 1024
"""Up to this encoder and middle size a GPU waits for memory in these products, so fusing what surrounds them pays;
above, cuBLAS has the better products."""

KEPT_ELEMENTS = 2**24
"""Values before GELU that a forward keeps for the backward: 64 MB in float32. Above, they are computed again."""


def adapter(
    vectors_UD: torch.Tensor,
    norm_weight_RD: torch.Tensor,
    norm_bias_RD: torch.Tensor,
    up_RMD: torch.Tensor,
    up_bias_RM: torch.Tensor,
    down_RHM: torch.Tensor,
    down_bias_RH: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    eps: float = 1e-6,
    impl: Impl = "auto",
) -> torch.Tensor:
    """Turns event vectors into soft tokens, each with the weights of its source: LayerNorm -> Linear -> GELU -> Linear.

    Vectors are dequantised and normalised in float32 (float64 for float64 weights); the products run in the dtype of
    the weights, under autocast in autocast's.

    Args:
        vectors_UD: `[U, D]` store of encoder vectors: floating point, or int8 with `scale`.
        norm_weight_RD: `[R, D]` LayerNorm weights of R sources.
        norm_bias_RD: `[R, D]` LayerNorm biases.
        up_RMD: `[R, M, D]` weights of the first product.
        up_bias_RM: `[R, M]` their biases.
        down_RHM: `[R, H, M]` weights of the second product.
        down_bias_RH: `[R, H]` their biases. For one source all six may come without R.
        rows: `[N]` int64 rows of the store, ordered by source; all of it in its order if left out. N may be 0.
        offsets: `[R + 1]` int64: texts `offsets[r]` to `offsets[r + 1]` are of source r. Needed for R > 1.
        scale: `[U]` float32: an int8 vector stands for itself times its scale.
        eps: LayerNorm epsilon; small, because unit vectors of size D have variance 1/D.
        impl: `reference` (plain torch), `chunked` (row chunks, memory bounded, any device), `triton` (GPU; no float64,
            no gradient of the vectors), or `auto`: see `explain_choice`.

    Returns:
        `[N, H]` soft tokens in the dtype of the weights. Once differentiable in the weights and in floating vectors.

    Raises:
        ValueError: A shape or dtype does not fit, or `impl` is unknown.

    Source: adapter of arXiv 2602.14492 (Q-Anchor).

    Example:
        >>> x, m, h = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(2, 5)
        >>> adapter(x, torch.ones(4), torch.zeros(4), m, torch.zeros(5), h, torch.ones(2)).tolist()
        [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    """
    given = (norm_weight_RD, norm_bias_RD, up_RMD, up_bias_RM, down_RHM, down_bias_RH)
    parameters = Parameters(*given)
    if up_RMD.dim() == 2:
        parameters = Parameters(*(one[None] for one in given))
    if offsets is None:
        # From `rows` itself, so that a length that torch.compile does not know stays unknown.
        number = len(vectors_UD) if rows is None else len(rows)
        offsets = torch.tensor([0, number])
    texts = Texts(vectors_UD, rows, offsets, scale)
    _check(texts, parameters)
    device = vectors_UD.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        parameters = Parameters(*(one.to(dtype) for one in parameters))
    chosen = choose(impl, texts, parameters)
    if chosen == "reference":
        return adapter_reference(texts, parameters, eps)
    learns = any(one.requires_grad for one in (vectors_UD, *parameters)) and torch.is_grad_enabled()
    keep = learns and (chosen == "triton" or texts.number * parameters.up_RMD.shape[1] <= KEPT_ELEMENTS)
    soft_NH: torch.Tensor = _adapter(*texts, list(parameters), eps, keep, chosen)[0]
    return soft_NH


def choose(impl: str, texts: Texts, parameters: Parameters) -> str:
    """The implementation behind `impl` for these arguments.

    Raises:
        ValueError: It cannot run here, or there is none of that name.
    """
    if impl not in ("auto", "triton", "chunked", "reference"):
        raise ValueError(f"impl {impl!r} is unknown; use auto, triton, chunked or reference")
    if impl not in ("auto", "triton"):
        return impl
    _, middle, dim = parameters.up_RMD.shape
    dtype, device = parameters.up_RMD.dtype, texts.vectors_UD.device.type
    reason = triton_support.problem(device)
    if reason is None and dtype == torch.float64:
        reason = "float64"
    if reason is None and texts.vectors_UD.requires_grad:
        reason = "vectors that learn"
    if impl == "triton":
        if reason is not None:
            raise ValueError(f"impl 'triton' cannot run: {reason}; use auto or chunked")
        return "triton"
    tensor_cores = dtype != torch.float32 or torch.backends.cuda.matmul.allow_tf32
    worth = triton_support.auto_allowed(device) and tensor_cores and max(dim, middle) <= MEMORY_BOUND
    return "triton" if reason is None and worth else "chunked"


def explain_choice() -> str:
    """What `impl="auto"` does on this machine, in words."""
    leaner = "row chunks of bounded memory; its backward needs one product less than autograd"
    if triton_support.auto_allowed("cuda"):
        return (
            f"triton for half-precision weights up to {MEMORY_BOUND} wide, which memory bounds "
            f"({triton_support.where()}); else chunked: {leaner}"
        )
    return f"chunked: {leaner} (no Triton: {triton_support.why_not()})"


@torch.library.custom_op("instructue::adapter", mutates_args=())
def _adapter(
    vectors_UD: torch.Tensor,
    rows: torch.Tensor | None,
    offsets: torch.Tensor,
    scale: torch.Tensor | None,
    parameters: Sequence[torch.Tensor],
    eps: float,
    keep: bool,
    impl: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Soft tokens, and what GELU was applied to if it is kept, else nothing."""
    texts = Texts(vectors_UD, rows, offsets, scale)
    if impl == "triton":
        from instructue_kernels.adapter import triton

        with triton_support.on_device_of(vectors_UD):
            return triton.forward(texts, Parameters(*parameters), eps, keep)
    return chunked.forward(texts, Parameters(*parameters), eps, keep)


@_adapter.register_fake
def _(
    vectors_UD: torch.Tensor,
    rows: torch.Tensor | None,
    offsets: torch.Tensor,  # noqa: ARG001
    scale: torch.Tensor | None,  # noqa: ARG001
    parameters: Sequence[torch.Tensor],
    eps: float,  # noqa: ARG001
    keep: bool,
    impl: str,  # noqa: ARG001
) -> tuple[torch.Tensor, torch.Tensor]:
    _, _, up_RMD, _, down_RHM, _ = parameters
    number = vectors_UD.shape[0] if rows is None else rows.shape[0]
    return up_RMD.new_empty(number, down_RHM.shape[1]), up_RMD.new_empty(number if keep else 0, up_RMD.shape[1])


@torch.library.custom_op("instructue::adapter_backward", mutates_args=())
def _adapter_backward(
    grad_NH: torch.Tensor,
    before_NM: torch.Tensor,
    vectors_UD: torch.Tensor,
    rows: torch.Tensor | None,
    offsets: torch.Tensor,
    scale: torch.Tensor | None,
    parameters: Sequence[torch.Tensor],
    eps: float,
    of_vectors: bool,
    impl: str,
) -> list[torch.Tensor]:
    """Gradients of the vectors (nothing unless `of_vectors`) and of the six parameters."""
    texts = Texts(vectors_UD, rows, offsets, scale)
    given = (grad_NH, before_NM, texts, Parameters(*parameters), eps)
    if impl == "triton":
        from instructue_kernels.adapter import triton

        with triton_support.on_device_of(vectors_UD):
            of_store, found = triton.backward(*given, of_vectors=of_vectors)
    else:
        of_store, found = chunked.backward(*given, of_vectors=of_vectors)
    return [of_store, *found]


@_adapter_backward.register_fake
def _(
    grad_NH: torch.Tensor,  # noqa: ARG001
    before_NM: torch.Tensor,  # noqa: ARG001
    vectors_UD: torch.Tensor,
    rows: torch.Tensor | None,  # noqa: ARG001
    offsets: torch.Tensor,  # noqa: ARG001
    scale: torch.Tensor | None,  # noqa: ARG001
    parameters: Sequence[torch.Tensor],
    eps: float,  # noqa: ARG001
    of_vectors: bool,
    impl: str,  # noqa: ARG001
) -> list[torch.Tensor]:
    of_store = vectors_UD.new_empty(len(vectors_UD) if of_vectors else 0, vectors_UD.shape[1])
    return [of_store, *(torch.empty_like(one, memory_format=torch.contiguous_format) for one in parameters)]


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    vectors_UD, rows, offsets, scale, parameters, ctx.eps, _, ctx.impl = inputs
    ctx.save_for_backward(output[1], vectors_UD, rows, offsets, scale, *parameters)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad_NH: torch.Tensor, _: torch.Tensor | None) -> tuple[Any, ...]:
    before_NM, *texts, a, b, c, d, e, f = ctx.saved_tensors
    of_vectors, needed = ctx.needs_input_grad[0], ctx.needs_input_grad[4]
    of_store, *found = _adapter_backward(
        grad_NH.contiguous(), before_NM, *texts, [a, b, c, d, e, f], ctx.eps, of_vectors, ctx.impl
    )
    of_parameters = [one if need else None for one, need in zip(found, needed, strict=True)]
    return of_store if of_vectors else None, None, None, None, of_parameters, None, None, None


_adapter.register_autograd(_differentiate, setup_context=_remember)


def _check(texts: Texts, parameters: Parameters) -> None:
    vectors, rows, offsets, scale = texts
    if vectors.dim() != 2 or parameters.up_RMD.dim() != 3 or parameters.down_RHM.dim() != 3:
        shapes = [list(one.shape) for one in (vectors, parameters.up_RMD, parameters.down_RHM)]
        raise ValueError(f"vectors, up and down must be [U, D], [R, M, D] and [R, H, M], not {shapes}")
    (sources, middle, dim), hidden = parameters.up_RMD.shape, parameters.down_RHM.shape[1]
    expected: list[tuple[int, ...]] = [(sources, dim), (sources, dim), (sources, middle, dim)]
    expected += [(sources, middle), (sources, hidden, middle), (sources, hidden)]
    wrong = [
        f"{name[: name.rindex('_')]} {list(one.shape)}"
        for name, one, size in zip(Parameters._fields, parameters, expected, strict=True)
        if one.shape != size
    ]
    if vectors.shape[1] != dim:
        wrong.append(f"vectors {list(vectors.shape)}")
    if scale is not None and scale.shape != (len(vectors),):
        wrong.append(f"scale {list(scale.shape)}")
    if offsets.shape != (sources + 1,):
        wrong.append(f"offsets {list(offsets.shape)}")
    if wrong:
        sizes = f"up [{sources}, {middle}, {dim}] and down [{sources}, {hidden}, {middle}]"
        raise ValueError(f"shapes do not fit {sizes}: {', '.join(wrong)}")
    if (vectors.dtype == torch.int8) != (scale is not None) or not (
        vectors.dtype == torch.int8 or vectors.is_floating_point()
    ):
        raise ValueError(f"vectors must be floating point without scale, or int8 with one, not {vectors.dtype}")
    if len({one.dtype for one in parameters}) > 1:
        raise ValueError(f"parameters must have one dtype, not {[str(one.dtype) for one in parameters]}")
    if offsets.dtype != torch.int64 or (rows is not None and (rows.dim() != 1 or rows.dtype != torch.int64)):
        raise ValueError("rows and offsets must be int64 with one axis")
