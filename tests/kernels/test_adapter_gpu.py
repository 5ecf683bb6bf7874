"""Adapter, text_pool and prompt_slots on a GPU: as good as torch in bfloat16, and the same bits in every run."""

from __future__ import annotations

import pytest
import torch

from instructue_kernels.adapter import adapter
from instructue_kernels.prompt_slots import Events, prompt_slots
from instructue_kernels.text_pool import text_pool
from tests.kernels.test_adapter_op import ragged, store, weights
from tests.kernels.test_prompt_slots_op import problem as slots_problem
from tests.kernels.test_text_pool_op import problem as pool_problem

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
if torch.cuda.is_available():
    pytest.importorskip("triton", reason="triton is not installed")


def error(ours, exact):
    return ((ours.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-12)).item()


def results(function, leaves):
    """Value and gradients."""
    own = [one.detach().clone().requires_grad_() for one in leaves]
    out = function(*own)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out)
    out.backward(upstream)
    return [out.detach(), *(one.grad for one in own)]


def assert_as_good_as_torch(run, leaves):
    """`run(impl, *leaves)` by Triton errs at most twice as much as plain torch does in the same dtype."""
    exact = results(lambda *own: run("reference", *own), [one.double() for one in leaves])
    torchs = results(lambda *own: run("reference", *own), leaves)
    ours, again = (results(lambda *own: run("triton", *own), leaves) for _ in range(2))
    for one, same, other, truth in zip(ours, again, torchs, exact, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, same)
        assert error(one, truth) <= 2 * error(other, truth) + 1e-5


@pytest.mark.parametrize("sizes", [[700, 0, 300, 1], [37, 70, 1, 5], [4000, 2000, 100, 3000]])
@pytest.mark.parametrize("shape", [(384, 384, 576), (123, 63, 100)])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_adapter(sizes, shape, stored, dtype):
    dim, middle, hidden = shape
    vectors, scale = store(500, dim, dtype=stored)
    rows, offsets = ragged(sizes, 500)
    leaves = [one.cuda() / one.shape[-1] ** 0.5 for one in weights(len(sizes), dim, middle, hidden, dtype=dtype)]
    fixed = {"rows": rows.cuda(), "offsets": offsets, "scale": None if scale is None else scale.cuda()}
    vectors = vectors.cuda()
    assert_as_good_as_torch(lambda impl, *own: adapter(vectors, *own, impl=impl, **fixed), leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("columns", [1, 8, 70])
def test_text_pool(dtype, columns):
    weights_TK, soft, offsets, rows = pool_problem([150, 0, 37, 400], 200, columns, 576, dtype=dtype)
    rows = rows.cuda()
    assert_as_good_as_torch(
        lambda impl, *own: text_pool(*own, offsets, rows=rows, impl=impl), [weights_TK.cuda(), soft.cuda()]
    )


@pytest.mark.parametrize("out", [torch.bfloat16, torch.float32])
def test_prompt_slots(out):
    table, events, slots = slots_problem(40, 900, 300, 576, (7, 200), dtype=torch.float32)
    indices, slots = [one.cuda() for one in events[3:]], slots.cuda()
    leaves = [one.detach().cuda() for one in (table, *events[:3])]

    def run(impl, table, *own):
        return prompt_slots(table, Events(*own, *indices), slots, dtype=out, impl=impl)

    assert_as_good_as_torch(run, leaves)
