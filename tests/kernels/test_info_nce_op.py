"""InfoNCE: every implementation is the definition, in value and gradient, on any shape and mask."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from info_nce_oracle import oracle

from instructue_kernels.info_nce import explain_choice, info_nce, info_nce_stats
from instructue_kernels.info_nce.chunked import contrast, contrast_once
from instructue_kernels.info_nce.directions import Pairs, directions
from instructue_kernels.info_nce.reference import contrast_reference

SCALES = [1.0, 1 / 0.07, 100.0, 150.0]


@st.composite
def batches(draw):
    """Arguments of `info_nce` in float64, with everything that can be left out left out at times."""
    n, m, d = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.sampled_from([1, 2, 3, 7]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    query, key = (torch.randn(rows, d, generator=generator, dtype=torch.float64) for rows in (n, m))
    query, key = query * torch.rand(n, 1, generator=generator), key * 10
    if draw(st.booleans()):
        key[draw(st.integers(0, m - 1))] = 0
    if draw(st.booleans()):
        query[draw(st.integers(0, n - 1))] = 0
    if draw(st.booleans()):  # opposite, and duplicate
        key[draw(st.integers(0, m - 1))] = -query[0]
        query[draw(st.integers(0, n - 1))] = query[0].clone()
    integers = lambda rows, top: torch.randint(0, top, (rows,), generator=generator)  # noqa: E731
    found = {"positives": integers(n, m)}
    if draw(st.booleans()):  # several positives, some queries with fewer, some with one twice
        found["positives"] = torch.stack([integers(n, m), integers(n, m + 1) - 1, integers(n, m + 1) - 1], dim=1)
    if n <= m and draw(st.booleans()):
        del found["positives"]
    if draw(st.booleans()):
        found["query_ids"] = integers(n, 4) - 2
    if draw(st.booleans()):
        found |= {"key_ids": integers(m, 4) * -(2**61), "unique_keys": draw(st.booleans())}
    if draw(st.booleans()):
        found |= {"query_group": integers(n, 3), "key_group": integers(m, 3)}
    if draw(st.booleans()):
        found["hard_negatives"] = torch.randn(n, draw(st.integers(0, 3)), d, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        found["weight"] = integers(n, 3).double()
    # Duplicates, opposites and zeros differ by 0, 1 or 2: with these margins no decision is on a knife's edge.
    found["margin"] = draw(st.sampled_from([None, 0.1 + math.pi / 1e3, 0.7 + math.pi / 1e3]))
    found["include_query_query"], found["symmetric"] = draw(st.booleans()), draw(st.booleans())
    return query, key, math.log(draw(st.sampled_from(SCALES))), found


def leaves(query, key, log_scale, options):
    """Fresh copies that want gradients."""
    options = dict(options)
    tensors = [query.clone(), key.clone(), torch.tensor(log_scale, dtype=torch.float64)]
    if options.get("hard_negatives") is not None:
        options["hard_negatives"] = options["hard_negatives"].clone()
        tensors.append(options["hard_negatives"])
    for one in tensors:
        one.requires_grad_()
    return tensors, options


def gradients(batch, impl, run=info_nce):
    tensors, options = leaves(*batch)
    loss = run(*tensors[:3], **options, impl=impl)
    loss.backward()
    return loss.detach(), [one.grad for one in tensors]


def plain(options):
    return {name: one.tolist() if isinstance(one, torch.Tensor) else one for name, one in options.items()}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(batches())
def test_the_reference_is_the_definition_spelled_out(batch):
    query, key, log_scale, options = batch
    expected, _ = oracle(query.tolist(), key.tolist(), log_scale, **plain(options))
    actual = info_nce(query, key, torch.tensor(log_scale, dtype=torch.float64), **options, impl="reference")
    assert actual.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(batches(), st.sampled_from([0, 1, 2, 5]), st.booleans())
def test_chunks_are_the_reference_in_value_and_gradient(batch, chunk_rows, merge):
    """In two passes, which one direction alone can do too, and in one pass where that is possible."""

    def chunked(query, key, log_scale, *, impl, weight=None, margin=None, **options):
        assert impl in ("two passes", "one pass")
        pairs = as_pairs(query, key, **options)
        switches = {name: options[name] for name in ("include_query_query", "symmetric")}
        switches["unique_keys"] = options.get("unique_keys", False)
        found = directions(pairs, **switches, group=None, merge=merge)
        weight = torch.ones(len(query), dtype=torch.float64) if weight is None else weight
        weight = weight / (weight.sum().clamp(min=1) * (1 + options["symmetric"]))
        total = 0
        for one in found:
            own = weight if one.share_N is None else weight.repeat_interleave(one.several) * one.share_N
            tensors = arguments(one, log_scale)
            if impl == "one pass" and not one.both:
                needs = [x is not None and x.requires_grad for x in tensors[:4]]
                total = total + contrast_once(own, needs, *tensors[:-1], margin, chunk_rows)[0]
            else:
                total = total + (contrast(*tensors, margin, chunk_rows)[0] * own).sum()
        return total

    expected, expected_grads = gradients(batch, "reference")
    for impl in ("two passes", "one pass"):
        actual, actual_grads = gradients(batch, impl, chunked)
        torch.testing.assert_close(actual, expected)
        for ours, theirs in zip(actual_grads, expected_grads, strict=True):
            torch.testing.assert_close(ours, theirs)


def as_pairs(query, key, **options):
    positives = options.get("positives")
    in_order = positives is None
    positives = torch.arange(len(query)) if in_order else positives
    positives = positives[:, None] if positives.dim() == 1 else positives
    names = ("hard_negatives", "query_ids", "key_ids", "query_group", "key_group")
    return Pairs(query, key, positives, *[options.get(name) for name in names], in_order)


def arguments(one, log_scale):
    tensors = (one.anchor_ND, one.candidate_KD, log_scale, one.hard_NRD, one.positive_NP)
    return (*tensors, one.anchor_labels_LN, one.candidate_labels_LK, one.compared, one.both)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(batches())
def test_statistics_are_the_definition_spelled_out(batch):
    query, key, log_scale, options = batch
    del options["symmetric"]
    _, kept_of = oracle(query.tolist(), key.tolist(), log_scale, **plain(options))
    weight = options.get("weight", torch.ones(len(query), dtype=torch.float64)).tolist()
    stats = info_nce_stats(query, key, **options)
    assert stats.without_negatives.item() == sum(
        1 for (_, kept), w in zip(kept_of, weight, strict=True) if w and not kept
    )
    contested = [(positive, kept, w) for (positive, kept), w in zip(kept_of, weight, strict=True) if kept and w]
    clear = all(abs(positive - max(kept)) > 1e-9 for positive, kept, _ in contested)
    if contested and clear:
        right = sum(w for positive, kept, w in contested if positive > max(kept))
        assert stats.accuracy.item() == pytest.approx(right / sum(w for _, _, w in contested))
    if not contested:
        assert stats.accuracy.isnan()
    if sum(weight):
        mean = lambda values: sum(v * w for v, w in zip(values, weight, strict=True)) / sum(weight)  # noqa: E731
        assert stats.positive_similarity.item() == pytest.approx(mean([p for p, _ in kept_of]), abs=1e-12)
        assert stats.negatives.item() == pytest.approx(mean([len(kept) for _, kept in kept_of]))


def numbers(n, m, d, *, hard=0, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n, d), (m, d)] + ([(n, hard, d)] if hard else [])
    return [torch.randn(one, generator=generator, dtype=dtype) for one in shapes]


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_are_right_in_float64(impl, symmetric):
    query, key, hard = numbers(5, 7, 3, hard=2)
    options = {"positives": torch.tensor([0, 3, 3, 6, 1]), "key_ids": torch.tensor([0, 1, 2, 3, 3, 0, 6])}
    options |= {"query_group": torch.tensor([0, 0, 0, 1, 1]), "key_group": torch.tensor([0, 0, 0, 0, 1, 1, 1])}
    weight = torch.tensor([1.0, 2, 0, 0.5, 1], dtype=torch.float64)

    def loss(query, key, log_scale, hard):
        return info_nce(
            query,
            key,
            log_scale,
            **options,
            hard_negatives=hard,
            weight=weight,
            include_query_query=True,
            symmetric=symmetric,
            impl=impl,
        )

    inputs = [one.requires_grad_() for one in (query, key, torch.tensor(1.3, dtype=torch.float64), hard)]
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_a_tiny_loss_at_a_high_scale_keeps_its_digits(impl):
    query, key = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [math.cos(0.6), math.sin(0.6)]])
    loss = info_nce(query, key, torch.tensor(math.log(100.0)), symmetric=False, impl=impl)
    excess = 100 * (math.cos(0.6) - 1)  # about exp(-17.5): far below the float32 epsilon
    assert loss.item() == pytest.approx(math.exp(excess), rel=1e-4)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_opposite_positives_at_a_high_scale_do_not_overflow(impl):
    query, key = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    leaf = query.clone().requires_grad_()
    loss = info_nce(leaf, key, torch.tensor(math.log(150.0)), symmetric=False, impl=impl)
    loss.backward()
    assert loss.item() == pytest.approx(300.0)
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_yes_no_answers_with_no_signal_cost_log_two(impl):
    """Two answers per question, shared by all users of the batch: chance is the entropy of a fair coin."""
    answers = torch.eye(4)
    query, group = torch.ones(6, 4), torch.tensor([0, 0, 0, 1, 1, 1])
    loss = info_nce(
        query,
        answers,
        torch.tensor(2.0),
        positives=torch.tensor([0, 1, 0, 2, 3, 3]),
        query_group=group,
        key_group=torch.tensor([0, 0, 1, 1]),
        symmetric=False,
        impl=impl,
    )
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)


def test_the_margin_drops_what_is_far_closer_than_the_positive():
    query = torch.tensor([[1.0, 0.0]])
    key = torch.tensor([[math.cos(0.5), math.sin(0.5)], [1.0, 0.0], [0.0, 1.0]])
    kept = info_nce(query, key[[0, 2]], torch.tensor(1.0), symmetric=False)
    assert info_nce(query, key, torch.tensor(1.0), margin=0.1, symmetric=False) == kept
    assert info_nce(query, key, torch.tensor(1.0), margin=0.2, symmetric=False) > kept


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("options", [{"key_ids": torch.zeros(4, dtype=torch.int64)}, {"weight": torch.zeros(4)}])
def test_nothing_to_learn_is_a_zero_with_zero_gradients(impl, options):
    query, key = (one.requires_grad_() for one in numbers(4, 4, 3))
    log_scale = torch.tensor(1.0, requires_grad=True)
    loss = info_nce(query, key, log_scale, **options, impl=impl)
    loss.backward()
    assert loss.item() == 0
    assert all((one.grad == 0).all() for one in (query, key, log_scale))


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("keys", [0, 3])
def test_an_empty_batch_is_zero(impl, keys):
    query = torch.zeros(0, 5, requires_grad=True)
    loss = info_nce(query, torch.zeros(keys, 5), torch.tensor(0.0), impl=impl)
    loss.backward()
    assert (loss.item(), query.grad.shape) == (0.0, (0, 5))


def test_weights_are_those_of_a_batch_with_repeats():
    """Against a fixed list of answers a query of weight 2 is the same query twice."""
    query, key = numbers(3, 4, 5)
    where = torch.tensor([0, 1, 3])
    twice = torch.tensor([0, 1, 1, 2])
    weighted = info_nce(
        query, key, torch.tensor(2.0), positives=where, weight=torch.tensor([1.0, 2, 1]), symmetric=False
    )
    repeated = info_nce(query[twice], key, torch.tensor(2.0), positives=where[twice], symmetric=False)
    torch.testing.assert_close(weighted, repeated)


@pytest.mark.parametrize("shape", [(1, 1, 1), (63, 123, 17), (257, 31, 128), (1000, 333, 5)])
def test_float32_chunks_agree_on_odd_shapes(shape):
    generator = torch.Generator().manual_seed(3)
    query, key = numbers(*shape, dtype=torch.float32)
    options = {"positives": torch.randint(0, shape[1], (shape[0],), generator=generator), "symmetric": False}
    options |= {
        name: torch.randint(0, 3, (n,), generator=generator)
        for name, n in zip(("query_group", "key_group"), shape[:2], strict=True)
    }
    found = {}
    for impl in ("reference", "chunked"):
        tensors = [one.clone().requires_grad_() for one in (query, key, torch.tensor(math.log(14.0)))]
        loss = info_nce(*tensors, **options, impl=impl)
        loss.backward()
        found[impl] = [loss.detach(), *[one.grad for one in tensors]]
    for ours, theirs in zip(found["chunked"], found["reference"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("aligned", [True, False])
def test_float32_chunks_are_as_exact_as_the_reference_at_the_lowest_temperature(aligned, symmetric):
    query, key = numbers(200, 200, 4, dtype=torch.float32)
    key = query * 2 if aligned else key
    found = {}
    for impl, dtype in (("chunked", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        leaves = [one.detach().to(dtype).requires_grad_() for one in (query, key)]
        leaves.append(torch.tensor(math.log(150.0), dtype=dtype, requires_grad=True))
        loss = info_nce(*leaves, symmetric=symmetric, impl=impl)
        loss.backward()
        found[impl, dtype] = [loss.detach().double(), *[one.grad.double() for one in leaves]]
    ours, theirs, exact = found.values()
    for own, other, right in zip(ours, theirs, exact, strict=True):
        error, usual = ((one - right).abs().max() / right.abs().max() for one in (own, other))
        assert error < 5 * usual + 1e-5


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_half_precision_inputs_are_computed_in_float32_even_under_autocast(impl):
    query, key = (one.bfloat16() for one in numbers(20, 20, 33, dtype=torch.float32))
    expected = info_nce(query.float(), key.float(), torch.tensor(3.0), impl="reference")
    leaf = query.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        actual = info_nce(leaf, key, torch.tensor(3.0), impl=impl)
    actual.backward()
    assert (actual.dtype, leaf.grad.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_scaled_loss_keeps_float16_gradients(symmetric):
    """As torch.amp.GradScaler scales it: by more than float16 holds, since gradients are less than it holds."""
    query, key = ((one * 60).half() for one in numbers(512, 512, 64, dtype=torch.float32))
    gradients = []
    for impl in ("chunked", "reference"):
        leaves = [query.clone().requires_grad_(), key.clone().requires_grad_()]
        loss = info_nce(*leaves, torch.tensor(2.0), symmetric=symmetric, impl=impl)
        (loss * 2.0**16).backward()
        gradients.append([one.grad for one in leaves])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-5)


def test_only_what_wants_a_gradient_gets_one():
    query, key = numbers(4, 6, 3)
    key.requires_grad_()
    info_nce(query, key, torch.tensor(1.0), impl="chunked").backward()
    assert query.grad is None
    assert key.grad.abs().sum() > 0


def test_chunks_keep_only_the_inputs_for_the_backward_and_no_similarity_matrix():
    n = m = 700
    query, key = (one.requires_grad_() for one in numbers(n, m, 4, dtype=torch.float32))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: saved.append(one.numel()) or one, lambda one: one):
        info_nce(query, key, torch.tensor(1.0, requires_grad=True), symmetric=False, impl="chunked")
    assert max(saved) <= n * 4
    assert sum(saved) <= 2 * n * 4 + 12 * n


class _Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for one in found if isinstance(found, tuple | list) else [found]:
            if isinstance(one, torch.Tensor):
                self.largest = max(self.largest, one.numel())
        return found


def test_no_buffer_of_the_chunked_path_grows_with_queries_times_keys():
    n, m, rows = 300, 200, 7
    query, key, hard = (one.requires_grad_() for one in numbers(n, m, 3, hard=2, dtype=torch.float32))
    (one,) = directions(
        as_pairs(query, key, positives=torch.arange(n) % m, hard_negatives=hard),
        include_query_query=False,
        symmetric=False,
        unique_keys=False,
        group=None,
    )
    with _Largest() as seen:
        contrast(*arguments(one, torch.tensor(1.0)), 0.1, rows)[0].sum().backward()
    assert seen.largest <= max(rows * m, hard.numel())
    with _Largest() as seen:
        contrast_reference(*arguments(one, torch.tensor(1.0))[:-2], 0.1)
    assert seen.largest >= n * m  # so the measurement sees what it must


def test_the_custom_op_keeps_torchs_contract():
    query, key, hard = (one.requires_grad_() for one in numbers(5, 4, 3, hard=2, dtype=torch.float32))
    log_scale = torch.tensor(1.0, requires_grad=True)
    for own in (hard, None):
        (one,) = directions(
            as_pairs(query, key, positives=torch.arange(5) % 4, hard_negatives=own),
            include_query_query=False,
            symmetric=False,
            unique_keys=False,
            group=None,
        )
        torch.library.opcheck(contrast, (*arguments(one, log_scale), 0.3, 2))
        torch.library.opcheck(contrast, (*arguments(one, log_scale.detach()), None, 0))
        once = (torch.rand(5), [True, True, True, own is not None], *arguments(one, log_scale)[:-1])
        torch.library.opcheck(contrast_once, (*once, 0.3, 2))


def test_torch_compile_takes_it_in_one_graph():
    query, key = numbers(6, 6, 4, dtype=torch.float32)
    compiled = torch.compile(
        lambda *x: info_nce(*x, margin=0.2, key_ids=torch.arange(6) // 2, impl="chunked"),
        fullgraph=True,
        backend="aot_eager",
    )
    found = []
    for run in (compiled, lambda *x: info_nce(*x, margin=0.2, key_ids=torch.arange(6) // 2, impl="reference")):
        tensors = [one.clone().requires_grad_() for one in (query, key, torch.tensor(1.0))]
        loss = run(*tensors)
        loss.backward()
        found.append([loss.detach(), *[one.grad for one in tensors]])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_rerun_is_bit_identical():
    batch = (*numbers(400, 400, 32), 2.0, {"margin": 0.2})
    (one, first), (two, second) = (gradients(batch, "chunked") for _ in range(2))
    assert one == two
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_auto_gives_the_same_on_both_sides_of_its_threshold():
    query, key = numbers(600, 600, 8)
    torch.testing.assert_close(
        info_nce(query, key, torch.tensor(2.0)), info_nce(query, key, torch.tensor(2.0), impl="reference")
    )
    assert "262,144" in explain_choice()


LONG = {"dtype": torch.int64}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(3, 4)}, r"query \(3, 4\) and key \(5, 2\)"),
        ({"query": torch.zeros(6, 2)}, "6 queries but 5 keys; say in `positives`"),
        ({"positives": torch.tensor([0, 1, 5])}, "positives go from 0 to 5, but there are 5 keys"),
        ({"positives": torch.tensor([0, -1, 2])}, "positives go from -1 to 2"),
        ({"positives": torch.zeros(3)}, r"positives must be int64 \[3\], not torch.float32"),
        ({"key_ids": torch.zeros(3, **LONG)}, r"key_ids must be int64 \[5\]"),
        ({"query_group": torch.zeros(3, **LONG)}, "query_group and key_group must be given together"),
        ({"weight": torch.zeros(5)}, "weight has shape"),
        ({"unique_keys": True}, "unique_keys needs key_ids"),
        ({"margin": -0.1}, "margin -0.1 must be a number from 0 up"),
        ({"margin": float("nan")}, "margin nan"),
        ({"hard_negatives": torch.zeros(3, 2)}, r"hard_negatives \(3, 2\) must be \[3, R, 2\]"),
        ({"log_scale": torch.zeros(2)}, "log_scale must be one floating point number"),
        ({"impl": "triton"}, "impl 'triton' cannot run here: .*; use 'auto' or 'chunked'"),
        ({"positives": torch.zeros(2, 2, **LONG)}, r"positives must be int64 \[3, P\]"),
        ({"positives": torch.tensor([[0, 1], [-1, 2], [3, -1]])}, "every query needs a positive"),
        ({"positives": torch.tensor([[0, 1], [1, 5], [3, -1]])}, "positives go from 0 to 5"),
        ({"impl": "fast"}, "use auto, triton, chunked or reference"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    options = {"query": torch.zeros(3, 2), "key": torch.zeros(5, 2), "log_scale": torch.tensor(0.0)} | change
    with pytest.raises(ValueError, match=message):
        info_nce(**options)
