"""Pooling a user's texts, and filling prompts with them: every implementation is the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instructue_kernels.text_pool import chunked as chunked_module
from instructue_kernels.text_pool import explain_choice, text_pool
from instructue_kernels.text_pool.op import _text_pool


def problem(sizes, n, k, h, *, dtype=torch.float64, seed=0, grad=True):
    """Weights, soft tokens, where users begin, and which soft token each text has."""
    generator = torch.Generator().manual_seed(seed)
    number = sum(sizes)
    weights = torch.randn(number, k, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)
    soft = torch.randn(n, h, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)
    rows = torch.randint(0, max(n, 1), (number,), generator=generator)
    return weights, soft, torch.tensor([0, *torch.tensor(sizes, dtype=torch.int64).cumsum(0).tolist()]), rows


def gradients(pooled, *leaves):
    upstream = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return [pooled.detach(), *torch.autograd.grad((pooled * upstream.to(pooled.dtype)).sum(), leaves)]


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_it_is_a_weighted_sum_over_each_users_texts_spelled_out(impl):
    weights, soft, offsets, rows = problem([3, 0, 2], 4, 2, 5)
    pooled = text_pool(weights, soft, offsets, rows=rows, impl=impl)
    for user, (start, end) in enumerate([(0, 3), (3, 3), (3, 5)]):
        for column in range(2):
            expected = sum((weights[t, column] * soft[rows[t]] for t in range(start, end)), torch.zeros(5))
            torch.testing.assert_close(pooled[user, column], expected.double())


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("shared", [True, False])
def test_gradients_are_right_in_float64(impl, shared):
    weights, soft, offsets, rows = problem([3, 0, 2], 4 if shared else 5, 2, 3)
    rows = rows if shared else None
    assert torch.autograd.gradcheck(lambda w, s: text_pool(w, s, offsets, rows=rows, impl=impl), [weights, soft])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 13), max_size=7),
    st.integers(1, 9),
    st.integers(0, 5),
    st.integers(1, 7),
    st.booleans(),
    st.integers(1, 200),
)
def test_chunked_is_the_reference_whatever_the_lengths(sizes, n, k, h, shared, elements):
    weights, soft, offsets, rows = problem(sizes, n if shared else sum(sizes), k, h)
    rows = rows if shared else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked_module, "CPU_ELEMENTS", elements)
        ours = gradients(text_pool(weights, soft, offsets, rows=rows, impl="chunked"), weights, soft)
    theirs = gradients(text_pool(weights, soft, offsets, rows=rows, impl="reference"), weights, soft)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


class _Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for one in found if isinstance(found, tuple | list) else [found]:
            if isinstance(one, torch.Tensor):
                self.largest = max(self.largest, one.numel())
        return found


def test_no_tensor_of_all_texts_is_made(monkeypatch):
    monkeypatch.setattr(chunked_module, "CPU_ELEMENTS", 40 * 8)
    weights, soft, offsets, rows = problem([10] * 50, 6, 2, 8, grad=False)
    with _Largest() as seen:
        pooled = chunked_module.forward(weights, soft, offsets, rows)
        chunked_module.backward(pooled, weights, soft, offsets, rows, of_weights=True, of_soft=True)
    assert seen.largest <= max(50 * 2 * 8, 500 * 2)  # the result, or the weights' gradient; 500 texts of 8 are more
    with _Largest() as seen:
        text_pool(weights, soft, offsets, rows=rows, impl="reference")
    assert seen.largest >= 500 * 8


def test_it_is_a_well_behaved_custom_op():
    weights, soft, offsets, rows = problem([3, 0, 2], 4, 2, 5, dtype=torch.float32)
    torch.library.opcheck(_text_pool, (weights, soft, offsets, rows, "chunked"))
    torch.library.opcheck(_text_pool, (weights.detach(), soft, offsets, torch.arange(4).repeat(2)[:5], "chunked"))


def test_it_compiles_without_a_break():
    weights, soft, offsets, rows = problem([3, 0, 2], 4, 2, 5, dtype=torch.float32)
    compiled = torch.compile(lambda w, s: text_pool(w, s, offsets, rows=rows) * 2, fullgraph=True, backend="aot_eager")
    theirs = gradients(text_pool(weights, soft, offsets, rows=rows) * 2, weights, soft)
    for one, other in zip(gradients(compiled(weights, soft), weights, soft), theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"impl": "triton"}, "cannot run: CPU tensors; use auto or chunked"),
        ({"impl": "fast"}, "use auto, triton, chunked or reference"),
        ({"weights_TK": torch.ones(4, 2)}, r"weights \[4, 2\] and soft \[4, 5\] must be .* T being 5"),
        ({"soft_NH": torch.ones(4, 5)}, "torch.float64 and torch.float32"),
        ({"offsets": torch.tensor([0, 2, 4])}, r"ascend from 0 to 5, the number of texts, not \[0, 2, 4\]"),
        ({"offsets": torch.tensor([0.0, 5.0])}, "must be int64"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    weights, soft, offsets, rows = problem([3, 0, 2], 4, 2, 5)
    with pytest.raises(ValueError, match=message):
        text_pool(**({"weights_TK": weights, "soft_NH": soft, "offsets": offsets, "rows": rows} | change))


def test_the_choice_is_explained():
    assert explain_choice().startswith("chunked")


def test_what_is_frozen_gets_no_gradient():
    weights, soft, offsets, rows = problem([3, 0, 2], 4, 2, 5)
    for frozen, other in ((soft, weights), (weights, soft)):
        leaves = {id(one): one.detach() for one in (frozen,)}
        given = [leaves.get(id(one), one) for one in (weights, soft)]
        text_pool(*given, offsets, rows=rows).sum().backward()
        assert frozen.grad is None
        assert other.grad.abs().sum() > 0
        other.grad = None
