"""Triton kernels of InfoNCE in the interpreter: the reference in float64, on any shape and mask."""

from __future__ import annotations

import math
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

LOG = math.log


def problem(n, m, d, seed, **wanted):
    """Vectors in float32 and the options that `wanted` names."""
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    integers = lambda rows, top, low=0: torch.randint(low, top, (rows,), generator=generator)  # noqa: E731
    query, key = random(n, d) * torch.rand(n, 1, generator=generator) * 3, random(m, d) * 10
    if wanted.get("degenerate"):
        key[0], query[n // 2], query[-1] = -query[0], 0, query[0]
        key[m // 2] = key[-1]
    if wanted.get("aligned"):
        key = query[torch.arange(m) % n] * 2
    options = {
        "query_ids": integers(n, 5) - 2,
        "key_ids": integers(m, 7) * 2**40,
        "groups": None,
        "positives": integers(n, m),
        "several": torch.stack([integers(n, m), integers(n, m, -1), integers(n, m, -1)], dim=1),
        "hard": random(n, 3, d),
        "weight": torch.rand(n, generator=generator),
    }
    found = {name: options[name] for name in ("query_ids", "key_ids", "positives", "weight") if wanted.get(name)}
    if wanted.get("several"):
        found["positives"] = options["several"]
    if wanted.get("groups"):
        found |= {"query_group": integers(n, 2), "key_group": integers(m, 2)}
    if wanted.get("hard"):
        found["hard_negatives"] = options["hard"]
    for name in ("margin", "symmetric", "include_query_query", "unique_keys"):
        if name in wanted:
            found[name] = wanted[name]
    return query, key, found


def value_and_gradients(query, key, log_scale, options, impl, dtype):
    from instructue_kernels.info_nce import info_nce

    leaves = [one.to(dtype).requires_grad_() for one in (query, key)]
    leaves.append(torch.tensor(log_scale, dtype=dtype, requires_grad=True))
    if "hard_negatives" in options:
        hard = options["hard_negatives"].to(dtype).requires_grad_()
        options = options | {"hard_negatives": hard}
        leaves.append(hard)
    loss = info_nce(*leaves[:3], **options, impl=impl)
    loss.backward()
    return [loss.detach(), *[one.grad for one in leaves]]


def worst_errors(shape, log_scale, wanted, dtype=torch.float32, chunk_rows=0):
    """Largest error of the loss and of each gradient, over the largest entry of what is right; and of the reference."""
    from instructue_kernels.info_nce import fused

    query, key, options = problem(*shape, seed=sum(shape), **wanted)
    # What is right for the vectors as they are rounded to the dtype.
    rounded = (query.to(dtype), key.to(dtype))
    if "hard_negatives" in options:
        options["hard_negatives"] = options["hard_negatives"].to(dtype)
    log_scale = torch.tensor(log_scale).to(dtype).item()
    right = value_and_gradients(*rounded, log_scale, options, "reference", torch.float64)
    with mock.patch.object(fused, "rows_of_chunk", return_value=chunk_rows) if chunk_rows else nullcontext():
        found = value_and_gradients(*rounded, log_scale, options, "triton", dtype)
    return [error(ours, exact) for ours, exact in zip(found, right, strict=True)]


def error(ours, exact):
    assert ours.isfinite().all()
    if not exact.numel():
        return 0.0
    return ((ours.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-12)).item()


EVERYTHING = {"query_ids": True, "key_ids": True, "groups": True, "hard": True, "weight": True, "margin": 0.237}
CASES = {
    "plain": ((33, 33, 17), 14.0, {}),
    "more keys than queries": ((20, 50, 70), 14.0, {}),
    "one way": ((63, 40, 8), 14.0, {"symmetric": False, "positives": True}),
    "one of everything": ((1, 1, 1), 14.0, {}),
    "one query": ((1, 123, 5), 14.0, {}),
    "one key": ((63, 1, 5), 14.0, {"positives": True}),
    "ids": ((40, 45, 9), 14.0, {"key_ids": True, "query_ids": True}),
    "groups": ((40, 45, 9), 14.0, {"groups": True}),
    "margin": ((40, 45, 9), 14.0, {"margin": 0.237}),
    "everything in order": ((40, 45, 9), 14.0, EVERYTHING),
    "everything": ((40, 45, 9), 14.0, EVERYTHING | {"positives": True, "include_query_query": True}),
    "answers once": ((40, 45, 9), 14.0, {"key_ids": True, "unique_keys": True}),
    "queries too": ((40, 45, 9), 14.0, {"include_query_query": True}),
    "several positives": ((40, 45, 9), 14.0, {"several": True, "hard": True}),
    "several positives, one way, queries too": (
        (40, 45, 9), 14.0, EVERYTHING | {"several": True, "include_query_query": True, "symmetric": False}
    ),
    "scale 100": ((40, 40, 64), 100.0, {}),
    "scale 150": ((40, 45, 64), 150.0, {"key_ids": True}),
    "scale 150, degenerate": ((40, 45, 64), 150.0, {"degenerate": True, "margin": 0.237}),
    "scale 150, aligned": ((40, 40, 3), 150.0, {"aligned": True}),
    "scale 1, aligned": ((40, 45, 64), 1.0, {"aligned": True}),
    "scale 1, degenerate": ((40, 45, 3), 1.0, {"degenerate": True}),
    "odd": ((123, 63, 123), 20.0, {"positives": True}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_kernels_are_the_reference_in_value_and_gradient(interpreted, case):
    shape, scale, wanted = CASES[case]
    errors = interpreted(worst_errors, shape, LOG(scale), wanted)
    # float32 knows a logit of 150 to 1e-5, and with it every gradient.
    assert max(errors) < 1e-5 * max(1.0, scale / 10), errors


FLAGS = (
    "query_ids",
    "key_ids",
    "groups",
    "hard",
    "weight",
    "several",
    "include_query_query",
    "degenerate",
    "symmetric",
)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from([2, 3, 16, 33])),
    scale=st.floats(1, 150),
    flags=st.sets(st.sampled_from(FLAGS)),
    margin=st.sampled_from([None, 0.237]),
    chunk_rows=st.sampled_from([0, 5]),
)
def test_kernels_are_the_reference_for_whatever_comes(interpreted, shape, scale, flags, margin, chunk_rows):
    wanted = {"positives": True, "symmetric": False, "include_query_query": False, "margin": margin}
    wanted |= dict.fromkeys(flags, True)
    errors = interpreted(worst_errors, shape, LOG(scale), wanted, torch.float32, chunk_rows)
    assert max(errors) < 1e-4, errors


@pytest.mark.parametrize("case", ["plain", "everything in order", "scale 150", "several positives"])
def test_float16_is_as_exact_as_its_rounding(interpreted, case):
    shape, scale, wanted = CASES[case]
    loss, *gradients = interpreted(worst_errors, shape, LOG(scale), wanted, torch.float16)
    assert loss < 1e-4
    assert max(gradients) < 4e-3  # 2^-8: gradients are products of numbers rounded to 2^-11


@pytest.mark.parametrize("case", ["everything in order", "one way", "several positives"])
def test_chunks_add_up(interpreted, case):
    shape, scale, wanted = CASES[case]
    assert max(interpreted(worst_errors, shape, LOG(scale), wanted, torch.float32, 7)) < 1e-5


def on_a_line():
    query, key = torch.tensor([[1.0], [-2.0], [3.0], [0.0]]), torch.tensor([[-1.0], [1.0], [1.0], [1.0]])
    return [value_and_gradients(query, key, LOG(150.0), {}, impl, torch.float32) for impl in ("reference", "triton")]


def test_opposite_vectors_at_the_highest_scale(interpreted):
    """All cosines are -1, 0 or 1: exponentials span e^600, more than float32 has."""
    for ours, theirs in zip(*interpreted(on_a_line), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-3)


def beyond_the_largest_scale():
    from instructue_kernels.info_nce import info_nce

    return [
        info_nce(torch.eye(3), torch.eye(3), torch.tensor(LOG(scale)), impl="triton").item() for scale in (160, 161)
    ]


def test_a_scale_that_float32_cannot_carry_is_no_number(interpreted):
    fine, beyond = interpreted(beyond_the_largest_scale)
    assert math.isfinite(fine)
    assert math.isnan(beyond)


def contracts():
    """Torch's own checks of a custom op, a compiled call, and a rerun."""
    from instructue_kernels.info_nce import info_nce
    from instructue_kernels.info_nce.directions import Pairs, directions
    from instructue_kernels.info_nce.fused import contrast_fused

    query, key, options = problem(6, 7, 5, 3, hard=True)
    hard = options["hard_negatives"].requires_grad_()
    pairs = Pairs(query.requires_grad_(), key.requires_grad_(), torch.arange(6)[:, None], hard, *[None] * 4, True)
    switches = {"include_query_query": False, "symmetric": True, "unique_keys": False, "group": None, "merge": True}
    (one,) = directions(pairs, **switches)
    tensors = (one.anchor_ND, one.candidate_KD, torch.tensor(1.0, requires_grad=True), one.hard_NRD, one.positive_NP)
    labels = (one.anchor_labels_LN, one.candidate_labels_LK, one.compared, one.both)
    torch.library.opcheck(contrast_fused, (*tensors, *labels, 0.3, 0))

    def loss(*x):
        return info_nce(*x, margin=0.2, key_ids=torch.arange(7) // 2, impl="triton")

    found = []
    for run in (torch.compile(loss, fullgraph=True, backend="aot_eager"), loss, loss):
        leaves = [query.detach().requires_grad_(), key.detach().requires_grad_(), torch.tensor(1.0, requires_grad=True)]
        run(*leaves).backward()
        found.append([one.grad for one in leaves])
    return found


def test_the_op_keeps_torchs_contract_compiles_whole_and_repeats_itself(interpreted):
    compiled, first, second = interpreted(contracts)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(compiled, first, second, strict=True))


def odd_inputs():
    """Strided, transposed and mixed inputs, and no queries at all."""
    from instructue_kernels.info_nce import info_nce

    wide = torch.randn(20, 16, generator=torch.Generator().manual_seed(1))
    cases = {
        "every second column": (wide[:, ::2], wide[:, 1::2]),
        "transposed": (wide[:16].T, wide[4:].T),
        "one row for all": (wide[:1].expand(9, 16), wide[:9]),
        "float16 and float32": (wide[:8].half(), wide[8:16]),
        "no queries": (wide[:0], wide[:3]),
        "neither": (wide[:0], wide[:0]),
    }
    found = {}
    for name, pair in cases.items():
        for impl in ("triton", "reference"):
            leaves = [one.detach().requires_grad_() for one in pair]
            loss = info_nce(*leaves, torch.tensor(2.0), impl=impl)
            loss.backward()
            found[name, impl] = [loss.detach(), *[one.grad.float() for one in leaves]]
    return found


def test_inputs_need_not_be_contiguous_or_of_one_dtype_or_many(interpreted):
    found = interpreted(odd_inputs)
    for (name, impl), ours in found.items():
        if impl == "triton":
            for one, other in zip(ours, found[name, "reference"], strict=True):
                torch.testing.assert_close(
                    one, other, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
                )


def refusals():
    from instructue_kernels.info_nce import info_nce

    try:
        info_nce(torch.eye(2).double(), torch.eye(2).double(), torch.tensor(0.0), impl="triton")
    except ValueError as error:
        return str(error)
    return ""


def test_float64_is_left_to_the_others(interpreted):
    assert "float64 vectors; use 'auto' or 'chunked'" in interpreted(refusals)
