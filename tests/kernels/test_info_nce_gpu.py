"""InfoNCE by kernels on a GPU: what the interpreter cannot say."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from instructue_kernels.info_nce import fused, info_nce

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no CUDA device: kernels run only in the interpreter here"
    ),
]


def vectors(n, m, d, dtype, *, aligned=False):
    generator = torch.Generator().manual_seed(n + m + d)
    query = torch.randn(n, d, generator=generator)
    key = query[torch.arange(m) % n] * 2 if aligned else torch.randn(m, d, generator=generator) * 5
    return query.to("cuda", dtype), key.to("cuda", dtype)


def run(query, key, scale, impl, dtype, **options):
    leaves = [one.to(dtype).detach().requires_grad_() for one in (query, key)]
    leaves.append(torch.tensor(math.log(scale), device="cuda", dtype=torch.float32, requires_grad=True))
    loss = info_nce(*leaves, **options, impl=impl)
    loss.backward()
    return [loss.detach(), *[one.grad for one in leaves]]


def torchs_own(query, key, scale):
    """What one writes in torch in the dtype of the vectors."""
    leaves = [one.detach().requires_grad_() for one in (query, key)]
    logits = scale * F.normalize(leaves[0], dim=1) @ F.normalize(leaves[1], dim=1).T
    own = torch.arange(len(query), device="cuda")
    loss = (F.cross_entropy(logits.float(), own) + F.cross_entropy(logits.T.float(), own)) / 2
    loss.backward()
    return [one.grad for one in leaves]


def error(ours, exact):
    return ((ours.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("scale", [14.0, 100.0, 150.0])
@pytest.mark.parametrize("shape", [(1000, 64), (123, 63), (2048, 512), (1024, 1024)])
def test_gradients_are_no_worse_than_torchs_own(shape, scale, aligned, dtype):
    count, size = shape
    query, key = vectors(count, count, size, dtype, aligned=aligned)
    exact = run(query, key, scale, "reference", torch.float64)
    ours = run(query, key, scale, "triton", dtype)
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=2e-4, atol=1e-7)
    for own, right, theirs in zip(ours[1:3], exact[1:3], torchs_own(query, key, scale), strict=True):
        assert error(own, right) < 2 * error(theirs, right) + 1e-2


@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"margin": 0.2}, {"include_query_query": True}])
@pytest.mark.parametrize("shape", [(1, 1, 8), (63, 123, 128), (1000, 1000, 256), (129, 3000, 1024), (1000, 1000, 123)])
def test_masks_and_odd_shapes(shape, options):
    n, m, d = shape
    query, key = vectors(n, m, d, torch.bfloat16)
    ids = {"key_ids": torch.arange(m, device="cuda") // 2, "query_ids": torch.arange(n, device="cuda") // 3}
    exact = run(query, key, 20.0, "reference", torch.float64, **ids, **options)
    ours = run(query, key, 20.0, "triton", torch.bfloat16, **ids, **options)
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-4, atol=1e-7)
    for own, right in zip(ours[1:3], exact[1:3], strict=True):
        assert own.isfinite().all()
        assert right.norm() == 0 or error(own, right) < 1.5e-2


def test_reruns_are_bit_identical():
    query, key = vectors(3000, 4000, 512, torch.bfloat16)
    first, second = (run(query, key, 50.0, "triton", torch.bfloat16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_chunks_add_up(monkeypatch):
    query, key = vectors(1000, 1000, 512, torch.bfloat16)
    whole = run(query, key, 50.0, "triton", torch.bfloat16)
    monkeypatch.setattr(fused, "rows_of_chunk", lambda *_: 384)
    for ours, theirs in zip(run(query, key, 50.0, "triton", torch.bfloat16), whole, strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=1.6e-2, atol=1e-6)


def test_it_compiles_whole_and_auto_takes_the_kernels():
    query, key = vectors(1024, 1024, 128, torch.bfloat16)
    compiled = torch.compile(lambda *x: info_nce(*x, impl="auto"), fullgraph=True)
    scale = torch.tensor(3.0, device="cuda")
    assert compiled(query, key, scale) == info_nce(query, key, scale, impl="triton")


@pytest.mark.parametrize(("count", "size", "gibibytes"), [(8192, 512, 0.2), (32768, 512, 0.6), (65536, 1024, 1.5)])
def test_memory_is_bounded(count, size, gibibytes):
    query, key = (one.requires_grad_() for one in vectors(count, count, size, torch.bfloat16))
    log_scale = torch.tensor(3.0, device="cuda", requires_grad=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    info_nce(query, key, log_scale, impl="triton").backward()
    torch.cuda.synchronize()
    assert (torch.cuda.max_memory_allocated() - before) / 2**30 < gibibytes
    assert query.grad.isfinite().all()
