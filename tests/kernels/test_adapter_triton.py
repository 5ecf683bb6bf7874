"""The adapter's Triton kernels in the interpreter: they are the reference, for whatever shape and store."""

from __future__ import annotations

import pytest
import torch

SIZES = {
    "odd": ([37, 0, 70, 1], 29, 40, 33, 17),
    "one text": ([0, 1], 3, 16, 16, 16),
    "beyond a tile": ([150], 40, 70, 140, 130),
}


def both(sizes, u, d, m, h, stored, dtype, shared):
    """Values and gradients of the parameters by Triton, and by the reference in float64."""
    from instructue_kernels.adapter import adapter
    from tests.kernels.test_adapter_op import ragged, store, weights

    texts = sum(sizes)
    vectors, scale = store(u if shared else texts, d, dtype=stored)
    rows, offsets = ragged(sizes, u)
    parameters = [one / one.shape[-1] ** 0.5 for one in weights(len(sizes), d, m, h, dtype=torch.float64)]
    upstream = torch.randn(texts, h, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    found = []
    for impl, kind in (("triton", dtype), ("reference", torch.float64)):
        leaves = [one.to(dtype).to(kind).requires_grad_() for one in parameters]
        soft = adapter(vectors, *leaves, rows=rows if shared else None, offsets=offsets, scale=scale, impl=impl)
        (soft * upstream.to(dtype).to(kind)).sum().backward()
        found.append([soft.detach(), *(one.grad for one in leaves)])
    return found


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(
    ("stored", "dtype", "shared"),
    [
        (torch.float32, torch.float32, True),
        (torch.int8, torch.float32, True),
        (torch.float16, torch.float16, False),
        (torch.int8, torch.float16, True),
    ],
)
def test_values_and_gradients(interpreted, sizes, stored, dtype, shared):
    ours, theirs = interpreted(both, *SIZES[sizes], stored, dtype, shared)
    allowed = 1e-5 if dtype == torch.float32 else 3e-3
    for one, other in zip(ours, theirs, strict=True):
        assert one.isfinite().all()
        assert (one.double() - other).norm() <= allowed * other.norm()


def no_texts():
    from instructue_kernels.adapter import adapter
    from tests.kernels.test_adapter_op import store, weights

    parameters = [one.requires_grad_() for one in weights(2, 4, 6, 3)]
    none = torch.zeros(0, dtype=torch.int64)
    soft = adapter(store(3, 4)[0], *parameters, rows=none, offsets=torch.zeros(3, dtype=torch.int64), impl="triton")
    soft.sum().backward()
    return soft.detach(), [one.grad for one in parameters]


def test_no_texts_give_no_tokens_and_zero_gradients(interpreted):
    soft, gradients = interpreted(no_texts)
    assert soft.shape == (0, 3)
    assert all((one == 0).all() for one in gradients)


def refusals():
    from instructue_kernels.adapter import adapter
    from instructue_kernels.text_pool import text_pool
    from tests.kernels.test_adapter_op import store, weights

    messages, beyond = [], torch.tensor([0, 2, 4])
    for call in (
        lambda: adapter(store(3, 4)[0], *weights(2, 4, 6, 3), offsets=beyond, impl="triton"),
        lambda: text_pool(torch.ones(3, 1), torch.ones(3, 5), beyond, impl="triton"),
    ):
        try:
            call()
        except ValueError as error:
            messages.append(str(error))
    for vectors, dtype in ((store(3, 4)[0].requires_grad_(), torch.float32), (store(3, 4)[0], torch.float64)):
        try:
            adapter(vectors, *weights(1, 4, 6, 3, dtype=dtype), impl="triton")
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_what_the_kernels_cannot_do_is_refused(interpreted):
    assert interpreted(refusals) == [
        "offsets must ascend from 0 to 3, the number of texts, not [0, 2, 4]",
        "offsets must ascend from 0 to 3, the number of texts, not [0, 2, 4]",
        "impl 'triton' cannot run: vectors that learn; use auto or chunked",
        "impl 'triton' cannot run: float64; use auto or chunked",
    ]
