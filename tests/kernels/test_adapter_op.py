"""The adapter op: every implementation is the reference, in value and gradient."""

from __future__ import annotations

import pytest
import torch

from instructue_kernels.adapter import adapter, explain_choice
from instructue_kernels.adapter.chunked import adapter_chunked
from instructue_kernels.adapter.reference import adapter_reference

SHAPES = [(0, 5, 7, 3), (1, 1, 1, 1), (63, 24, 17, 32), (123, 384, 100, 576), (1000, 3, 5, 7)]


def arguments(n, d, m, h, *, dtype=torch.float32, grad=False):
    generator = torch.Generator().manual_seed(n + d)
    shapes = [(n, d), (d,), (d,), (m, d), (m,), (h, m), (h,)]
    return [torch.randn(one, generator=generator, dtype=dtype).requires_grad_(grad) for one in shapes]


def test_it_is_layer_norm_linear_gelu_linear_spelled_out():
    x, weight, bias, up, up_bias, down, down_bias = arguments(4, 6, 5, 3, dtype=torch.float64)
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt() * weight + bias
    z = normed @ up.T + up_bias
    gelu = z * 0.5 * (1 + torch.erf(z / 2**0.5))
    actual = adapter(x, weight, bias, up, up_bias, down, down_bias, impl="reference")
    torch.testing.assert_close(actual, gelu @ down.T + down_bias)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_gradients_are_right_in_float64(impl):
    inputs = arguments(5, 4, 6, 3, dtype=torch.float64, grad=True)
    assert torch.autograd.gradcheck(lambda *x: adapter(*x, impl=impl), inputs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk", [1, 37, 4096])
def test_chunked_is_the_reference_on_odd_shapes(shape, chunk):
    if shape[0] > 200 and chunk == 1:
        chunk = 3
    plain, chunked = (arguments(*shape, dtype=torch.float64, grad=True) for _ in range(2))
    expected, actual = adapter_reference(*plain, 1e-6), adapter_chunked(*chunked, 1e-6, chunk)
    torch.testing.assert_close(actual, expected)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (expected * weights).sum().backward()
    (actual * weights).sum().backward()
    for ours, theirs in zip(chunked, plain, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_frozen_vectors_get_no_gradient_and_parameters_do():
    inputs = arguments(9, 4, 6, 3, grad=True)
    inputs[0] = inputs[0].detach()
    adapter(*inputs, impl="chunked").sum().backward()
    assert inputs[0].grad is None
    assert all(one.grad is not None and one.grad.abs().sum() > 0 for one in inputs[1:])


def test_chunks_keep_only_the_inputs_for_the_backward():
    inputs = arguments(5000, 8, 64, 4, grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: saved.append(one.numel()) or one, lambda one: one):
        adapter_chunked(*inputs, 1e-6, 100)
    assert sum(saved) == sum(one.numel() for one in inputs)


def test_auto_gives_the_same_on_both_sides_of_its_threshold():
    inputs = arguments(8200, 4, 3, 2)
    torch.testing.assert_close(adapter(*inputs), adapter_reference(*inputs, 1e-6))
    torch.testing.assert_close(adapter(inputs[0][:10], *inputs[1:]), adapter_reference(*inputs, 1e-6)[:10])
    assert "8,192" in explain_choice()


@pytest.mark.parametrize("position", range(7))
def test_a_wrong_shape_is_named(position):
    inputs = arguments(4, 6, 5, 3)
    inputs[position] = torch.cat([inputs[position], inputs[position]], dim=-1)
    with pytest.raises(ValueError, match="do not fit"):
        adapter(*inputs)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="auto, chunked or reference"):
        adapter(*arguments(1, 1, 1, 1), impl="fast")
