"""The next-token loss: every implementation is cross entropy over the vocabulary at the kept positions."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instructue_kernels.next_token import chunked as chunked_module
from instructue_kernels.next_token import explain_choice, next_token_loss
from instructue_kernels.next_token.chunked import next_token_chunked, torch_has_it
from instructue_kernels.next_token.op import choose
from instructue_kernels.next_token.reference import next_token_reference

IMPLS = ["reference", "chunked", *(["torch"] if torch_has_it() else [])]


def problem(n, v, h, *, dtype=torch.float64, ignored=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed + n + v)
    hidden, weight = (torch.randn(one, generator=generator, dtype=dtype) for one in [(n, h), (v, h)])
    target = torch.randint(0, v, (n,), generator=generator)
    return hidden, weight, target.masked_fill(torch.rand(n, generator=generator) < ignored, -100)


def slow(hidden, weight, target, bias, ignore_index=-100):
    """Plain Python: minus the log of the softmax at the target, averaged over what is not ignored."""
    losses = []
    for row, token in zip(hidden, target, strict=True):
        if token == ignore_index:
            continue
        logits = [sum(x * y for x, y in zip(row, w, strict=True)) + b for w, b in zip(weight, bias, strict=True)]
        top = max(logits)
        losses.append(top + math.log(sum(math.exp(one - top) for one in logits)) - logits[token])
    return sum(losses) / len(losses) if losses else 0.0


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 9),
    st.integers(1, 5),
    st.sampled_from(IMPLS),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_it_is_the_definition_spelled_out(n, v, h, impl, ignored, with_bias, seed):
    hidden, weight, target = problem(n, v, h, ignored=ignored, seed=seed)
    bias = torch.linspace(-1, 1, v, dtype=torch.float64) if with_bias else None
    expected = slow(hidden.tolist(), weight.tolist(), target.tolist(), bias.tolist() if with_bias else [0.0] * v)
    assert next_token_loss(hidden, weight, target, bias=bias, impl=impl).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradients_are_right_in_float64(impl, with_bias):
    hidden, weight, target = problem(6, 5, 4)
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    inputs += [torch.randn(5, dtype=torch.float64, requires_grad=True)] if with_bias else []

    def loss(hidden, weight, bias=None):
        return next_token_loss(hidden, weight, target, bias=bias, impl=impl)

    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("shape", [(1, 1, 1), (63, 123, 17), (1000, 33, 5)])
@pytest.mark.parametrize("rows", [1, 37, None])
def test_chunks_are_the_reference_on_odd_shapes(shape, rows):
    hidden, weight, target = problem(*shape, ignored=0)
    found = []
    for run in (lambda *x: next_token_chunked(*x, None, rows), lambda *x: next_token_reference(*x, None)):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss = run(*leaves, target)
        loss.backward()
        found.append([loss.detach(), *[one.grad for one in leaves]])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("impl", [*IMPLS, "auto"])
def test_a_frozen_head_gets_no_gradient(impl):
    hidden, weight, target = problem(9, 7, 3, dtype=torch.float32)
    hidden.requires_grad_()
    next_token_loss(hidden, weight, target, impl=impl).backward()
    assert weight.grad is None
    assert hidden.grad.abs().sum() > 0
    assert (hidden.grad[target == -100] == 0).all()


@pytest.mark.parametrize("impl", [*IMPLS, "auto"])
def test_nothing_to_predict_is_a_zero_with_zero_gradients(impl):
    hidden, weight, target = problem(4, 5, 3)
    leaves = [hidden.requires_grad_(), weight.requires_grad_(), torch.ones(5, dtype=torch.float64, requires_grad=True)]
    hidden.data[0] = torch.nan  # what stands at an ignored position must not matter
    loss = next_token_loss(*leaves[:2], torch.full_like(target, -7), bias=leaves[2], ignore_index=-7, impl=impl)
    loss.backward()
    assert loss.item() == 0
    assert all((one.grad == 0).all() for one in leaves)
    assert next_token_loss(hidden[:0], weight, target[:0], impl=impl).item() == 0


@pytest.mark.parametrize("impl", [*IMPLS, "auto"])
def test_a_half_precision_head_is_as_good_as_half_precision_gets(impl):
    hidden, weight, target = problem(50, 300, 64, dtype=torch.float32)
    exact = hidden.clone().requires_grad_()
    expected = next_token_loss(exact, weight.bfloat16().float(), target, impl="reference")
    expected.backward()
    leaf = hidden.clone().requires_grad_()
    actual = next_token_loss(leaf, weight.bfloat16(), target, impl=impl)
    actual.backward()
    assert leaf.grad.dtype == torch.float32
    assert (actual - expected).abs() / expected < 2e-2
    assert (leaf.grad - exact.grad).norm() / exact.grad.norm() < 2e-2
    if impl != "torch":
        assert actual.dtype == torch.float32


def test_autocast_does_not_take_digits_off_the_loss():
    hidden, weight, target = problem(50, 300, 64, dtype=torch.float32)
    expected = next_token_loss(hidden, weight, target)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(next_token_loss(hidden, weight, target), expected)


class _Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for one in found if isinstance(found, tuple | list) else [found]:
            if isinstance(one, torch.Tensor):
                self.largest = max(self.largest, one.numel())
        return found


@pytest.mark.parametrize("impl", [one for one in IMPLS if one != "reference"])
def test_no_buffer_holds_the_logits_of_all_positions(impl, monkeypatch):
    n, v, h, rows = 200, 101, 3, 8
    monkeypatch.setattr(chunked_module, "_CHUNK_ELEMENTS", rows * v)
    hidden, weight, target = problem(n, v, h, dtype=torch.float32, ignored=0)
    with _Largest() as seen:
        next_token_loss(hidden.requires_grad_(), weight, target, impl=impl).backward()
    assert seen.largest <= max(rows * v, n * h)
    with _Largest() as seen:
        next_token_loss(hidden, weight, target, impl="reference")
    assert seen.largest >= n * v  # so the measurement sees what it must


def test_chunks_save_no_logits_for_the_backward(monkeypatch):
    n, v, h = 200, 101, 3
    monkeypatch.setattr(chunked_module, "_CHUNK_ELEMENTS", 8 * v)
    hidden, weight, target = problem(n, v, h, dtype=torch.float32, ignored=0)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: saved.append(one.numel()) or one, lambda one: one):
        next_token_loss(hidden.requires_grad_(), weight, target, impl="chunked")
    assert max(saved, default=0) < 8 * v


@pytest.mark.parametrize("impl", IMPLS)
def test_a_graph_may_be_walked_twice(impl):
    hidden, weight, target = problem(9, 7, 3, dtype=torch.float32)
    loss = next_token_loss(hidden.requires_grad_(), weight, target, impl=impl)
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], first)


def test_without_torchs_own_op_auto_chunks(monkeypatch):
    monkeypatch.setattr("instructue_kernels.next_token.op.torch_has_it", lambda: False)
    hidden, weight, target = problem(9, 7, 3)
    torch.testing.assert_close(
        next_token_loss(hidden, weight, target), next_token_loss(hidden, weight, target, impl="reference")
    )
    assert "2.13" in explain_choice()
    with pytest.raises(ValueError, match=r"needs torch 2\.13"):
        next_token_loss(hidden, weight, target, impl="torch")


def test_liger_is_taken_for_half_precision_where_it_runs_and_asked_for_in_words_where_not(monkeypatch):
    gpu, half = torch.device("cuda"), torch.bfloat16
    for module in ("liger", "op"):
        monkeypatch.setattr(f"instructue_kernels.next_token.{module}.liger_installed", lambda: True)
    assert choose("auto", half, gpu) == "liger"
    assert choose("auto", torch.float32, gpu) == ("torch" if torch_has_it() else "liger")
    assert choose("auto", half, torch.device("cpu")) == "chunked"
    monkeypatch.setattr("instructue_kernels.next_token.liger.liger_installed", lambda: False)
    monkeypatch.setattr("instructue_kernels.next_token.op.liger_installed", lambda: False)
    assert choose("auto", half, gpu) == "chunked"
    with pytest.raises(ValueError, match=r"not installed \(pip install 'instructue-feast\[liger\]'\)"):
        choose("liger", half, gpu)


_UNDER_THE_INTERPRETER = """
import torch
from instructue_kernels.next_token import next_token_loss
generator = torch.Generator().manual_seed(0)
hidden, weight = (torch.randn(one, 33, generator=generator) for one in (50, 123))
target = torch.randint(0, 123, (50,), generator=generator).masked_fill(torch.rand(50, generator=generator) < 0.3, -100)
found = []
for impl in ("liger", "reference"):
    leaves = [one.clone().requires_grad_() for one in (hidden, weight, torch.ones(123))]
    loss = next_token_loss(*leaves[:2], target, bias=leaves[2], impl=impl)
    (3 * loss).backward()
    found.append([loss.detach(), *(one.grad for one in leaves)])
for ours, theirs in zip(*found, strict=True):
    torch.testing.assert_close(ours, theirs)
"""


def test_liger_computes_the_same_loss():
    pytest.importorskip("liger_kernel")
    environment = os.environ | {"TRITON_INTERPRET": "1"}  # read when Liger is imported, so in a process of its own
    done = subprocess.run(
        [sys.executable, "-c", _UNDER_THE_INTERPRETER], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_NH": torch.zeros(3, 4)}, r"hidden \(3, 4\) and weight \(5, 2\)"),
        ({"target_N": torch.zeros(4, dtype=torch.int64)}, r"target must be int64 \[3\]"),
        ({"target_N": torch.zeros(3)}, "not torch.float32"),
        ({"target_N": torch.tensor([0, 5, 1])}, "targets go from 0 to 5, but the vocabulary has 5 tokens"),
        ({"bias": torch.zeros(4)}, "does not fit a vocabulary of 5"),
        ({"impl": "fast"}, "use auto, torch, liger, chunked or reference"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    options = {"hidden_NH": torch.zeros(3, 2), "weight_VH": torch.zeros(5, 2), "target_N": torch.tensor([0, 1, -100])}
    with pytest.raises(ValueError, match=message):
        next_token_loss(**(options | change))
