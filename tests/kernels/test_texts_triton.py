"""The Triton kernels of `text_pool` and `prompt_slots` in the interpreter: they are the reference."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from instructue_kernels import triton_support


def pooled_both_ways(sizes, n, k, h, dtype, shared):
    from instructue_kernels.text_pool import text_pool
    from tests.kernels.test_text_pool_op import gradients, problem

    weights, soft, offsets, rows = problem(sizes, n if shared else sum(sizes), k, h, dtype=dtype)
    rows = rows if shared else None
    ours = gradients(text_pool(weights, soft, offsets, rows=rows, impl="triton"), weights, soft)
    exact = [one.detach().double().requires_grad_() for one in (weights, soft)]
    return ours, gradients(text_pool(*exact, offsets, rows=rows, impl="reference"), *exact)


def filled_both_ways(v, t, n, h, shape, dtype, out):
    from instructue_kernels.prompt_slots import Events, prompt_slots
    from tests.kernels.test_prompt_slots_op import gradients, problem

    table, events, slots = problem(v, t, n, h, shape, dtype=dtype)
    slots = slots.clamp(max=v + t - 1)
    leaves = [table, *events[:3]]
    ours = gradients(prompt_slots(table, events, slots, dtype=out, impl="triton"), *leaves)
    exact = [one.detach().double().requires_grad_() for one in leaves]
    filled = prompt_slots(exact[0], Events(*exact[1:], *events[3:]), slots, impl="reference")
    return ours, gradients(filled, *exact)


def assert_close(ours, theirs, dtype):
    allowed = 1e-5 if dtype == torch.float32 else 3e-3
    for one, other in zip(ours, theirs, strict=True):
        assert one.isfinite().all()
        assert (one.double() - other).norm() <= allowed * other.norm() + 1e-9


@pytest.mark.parametrize(
    ("sizes", "n", "k", "h"),
    [
        ([37, 0, 70, 1], 29, 3, 33),
        ([5], 9, 1, 130),
        ([3, 4], 5, 66, 7),
        ([0, 0], 3, 2, 5),
        ([], 3, 2, 5),
        ([4], 3, 0, 5),
    ],
)
@pytest.mark.parametrize(("dtype", "shared"), [(torch.float32, True), (torch.float16, False)])
def test_pooling(interpreted, sizes, n, k, h, dtype, shared):
    assert_close(*interpreted(pooled_both_ways, sizes, n, k, h, dtype, shared), dtype)


@pytest.mark.parametrize(
    ("v", "t", "n", "h", "shape"),
    [
        (7, 40, 9, 33, (3, 50)),
        (1, 1, 1, 1, (1,)),
        (5, 600, 70, 20, (1200,)),
        (4, 0, 3, 5, (2, 9)),
        (3, 5, 2, 4, (0, 7)),
    ],
)
@pytest.mark.parametrize(("dtype", "out"), [(torch.float32, torch.float32), (torch.float32, torch.float16)])
def test_filling(interpreted, v, t, n, h, shape, dtype, out):
    assert_close(*interpreted(filled_both_ways, v, t, n, h, shape, dtype, out), out)


def check_ops():
    from instructue_kernels.adapter.op import _adapter
    from instructue_kernels.prompt_slots.op import _prompt_slots
    from instructue_kernels.text_pool.op import _text_pool
    from tests.kernels import test_adapter_op, test_prompt_slots_op, test_text_pool_op

    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    vectors, scale = test_adapter_op.store(9, 6, dtype=torch.int8)
    rows, offsets = test_adapter_op.ragged([2, 0, 4], 9)
    parameters = [one.requires_grad_() for one in test_adapter_op.weights(3, 6, 5, 4)]
    adapter = (vectors, rows, offsets, scale, parameters, 1e-6, True, "triton")
    table, events, slots = test_prompt_slots_op.problem(3, 5, 4, 2, (12,), dtype=torch.float32)
    pool = test_text_pool_op.problem([3, 0, 2], 4, 2, 5, dtype=torch.float32)
    filled = (table, list(events), slots, torch.float16, "triton")
    checked = [(_adapter, adapter), (_text_pool, (*pool, "triton")), (_prompt_slots, filled)]
    return [torch.library.opcheck(op, arguments, test_utils=tests) for op, arguments in checked]


def test_they_are_well_behaved_custom_ops(interpreted):
    assert all(set(one.values()) == {"SUCCESS"} for one in interpreted(check_ops))


def strided_both_ways():
    """Rows, buckets, scales and slots that are columns of something wider, by Triton and by the reference."""
    from instructue_kernels.adapter import adapter
    from instructue_kernels.prompt_slots import Events, prompt_slots
    from instructue_kernels.text_pool import text_pool
    from tests.kernels import test_adapter_op, test_prompt_slots_op, test_text_pool_op

    def column(one):
        return torch.stack([one, one.flip(0)], dim=-1)[..., 0]

    found = []
    for impl in ("triton", "reference"):
        vectors, scale = test_adapter_op.store(9, 6, dtype=torch.int8)
        rows, offsets = map(column, test_adapter_op.ragged([2, 1, 4], 9))
        weights = [one.float().requires_grad_() for one in test_adapter_op.weights(3, 6, 5, 4)]
        soft = adapter(vectors, *weights, rows=rows, offsets=offsets, scale=column(scale), impl=impl)
        found.append([soft, *torch.autograd.grad(soft.sum(), weights)])
        own, soft, offsets, rows = test_text_pool_op.problem([3, 0, 2], 4, 2, 5, dtype=torch.float32)
        pooled = text_pool(own, soft, column(offsets), rows=column(rows), impl=impl)
        found[-1] += test_text_pool_op.gradients(pooled, own, soft)
        table, events, slots = test_prompt_slots_op.problem(3, 5, 4, 2, (12,), dtype=torch.float32)
        filled = prompt_slots(table, Events(*events[:3], *map(column, events[3:])), column(slots), impl=impl)
        found[-1] += test_prompt_slots_op.gradients(filled, table, *events[:3])
    return [[one.detach() for one in own] for own in found]


def test_indices_need_not_be_contiguous(interpreted):
    for ours, theirs in zip(*interpreted(strided_both_ways), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_kernels_start_on_the_gpu_of_their_tensors():
    with FakeTensorMode():
        second, host = torch.empty(1, device="cuda:1"), torch.empty(1)
    assert triton_support.on_device_of(second).idx == 1
    assert isinstance(triton_support.on_device_of(host), nullcontext)
