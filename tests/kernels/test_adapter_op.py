"""The adapter op: every implementation is the reference, in value and gradient."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instructue_kernels import triton_support
from instructue_kernels.adapter import adapter, explain_choice
from instructue_kernels.adapter import chunked as chunked_module
from instructue_kernels.adapter import op as op_module
from instructue_kernels.adapter.op import _adapter

NAMES = ["norm_weight", "norm_bias", "up", "up_bias", "down", "down_bias"]


def weights(r, d, m, h, *, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(r, d), (r, d), (r, m, d), (r, m), (r, h, m), (r, h)]
    return [torch.randn(one, generator=generator, dtype=torch.float64).to(dtype) for one in shapes]


def store(u, d, *, dtype=torch.float32, seed=0):
    """Vectors of length 1, as encoders give them, and their scale if they are int8."""
    vectors = torch.randn(u, d, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    vectors = torch.nn.functional.normalize(vectors, dim=-1)
    if dtype != torch.int8:
        return vectors.to(dtype), None
    scale = vectors.abs().amax(-1).clamp(min=1e-9) / 127 if d else vectors.new_ones(u)
    return (vectors / scale[:, None]).round().to(torch.int8), scale.float()


def ragged(sizes, u, *, seed=0):
    rows = torch.randint(0, u, (sum(sizes),), generator=torch.Generator().manual_seed(seed + 2))
    return rows, torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()])


def run(impl, vectors, parameters, **options):
    """Value, and gradients of everything that can have one."""
    leaves = [one.clone().requires_grad_(one.is_floating_point()) for one in (vectors, *parameters)]
    soft = adapter(*leaves, impl=impl, **options)
    upstream = torch.randn(soft.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(soft.dtype)
    (soft * upstream).sum().backward()
    return [soft.detach(), *(one.grad for one in leaves)]


def test_it_is_layer_norm_linear_gelu_linear_spelled_out():
    vectors, _ = store(4, 6, dtype=torch.float64)
    weight, bias, up, up_bias, down, down_bias = (one[0] for one in weights(1, 6, 5, 3, dtype=torch.float64))
    spread = (vectors.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    z = ((vectors - vectors.mean(-1, keepdim=True)) / spread * weight + bias) @ up.T + up_bias
    gelu = z * 0.5 * (1 + torch.erf(z / 2**0.5))
    for impl in ("reference", "chunked"):
        actual = adapter(vectors, weight, bias, up, up_bias, down, down_bias, impl=impl)
        torch.testing.assert_close(actual, gelu @ down.T + down_bias)


def test_each_text_gets_the_weights_of_its_source():
    vectors, _ = store(9, 6)
    parameters = weights(3, 6, 5, 4)
    rows, offsets = ragged([2, 0, 4], 9)
    together = adapter(vectors, *parameters, rows=rows, offsets=offsets)
    first = adapter(vectors[rows[:2]], *(one[0] for one in parameters))
    last = adapter(vectors[rows[2:]], *(one[2] for one in parameters))
    torch.testing.assert_close(together, torch.cat([first, last]))


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("kept", [0, 10**6])
def test_gradients_are_right_in_float64(impl, kept, monkeypatch):
    monkeypatch.setattr(op_module, "KEPT_ELEMENTS", kept)
    vectors, _ = store(5, 4, dtype=torch.float64)
    rows, offsets = ragged([3, 0, 4], 5)
    leaves = [one.requires_grad_() for one in (vectors, *weights(3, 4, 6, 3, dtype=torch.float64))]
    assert torch.autograd.gradcheck(lambda *x: adapter(*x, rows=rows, offsets=offsets, impl=impl), leaves)


SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 33), st.integers(1, 19), st.integers(1, 35))


@settings(max_examples=60, deadline=None)
@given(
    SHAPES,
    st.lists(st.integers(0, 40), min_size=5, max_size=5),
    st.sampled_from([torch.float64, torch.bfloat16, torch.int8]),
    st.booleans(),
    st.integers(1, 23),
)
def test_chunked_is_the_reference_whatever_the_shape(shape, sizes, stored, keep, chunk):
    sources, d, m, h = shape
    vectors, scale = store(7, d, dtype=stored)
    rows, offsets = ragged(sizes[:sources], 7)
    options = {"rows": rows, "offsets": offsets, "scale": scale}
    parameters = weights(sources, d, m, h, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked_module, "CHUNK", chunk)
        patch.setattr(op_module, "KEPT_ELEMENTS", 10**9 * keep)
        actual = run("chunked", vectors, parameters, **options)
    for ours, theirs in zip(actual, run("reference", vectors, parameters, **options), strict=True):
        if ours is None:
            assert theirs is None
        elif ours.dtype == torch.bfloat16:  # autograd adds up in bfloat16 where a text occurs twice
            assert (ours - theirs).double().norm() <= 3e-2 * theirs.double().norm() + 1e-6
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_torchs_own(dtype):
    vectors, _ = store(50, 64)
    rows, offsets = ragged([60, 1, 40], 50)
    parameters = weights(3, 64, 48, 32, dtype=dtype)
    parameters = [one / one.shape[-1] ** 0.5 for one in parameters]
    options = {"rows": rows, "offsets": offsets}
    exact = run("reference", vectors, [one.double() for one in parameters], **options)
    plain = run("reference", vectors, parameters, **options)
    ours = run("chunked", vectors, parameters, **options)
    for one, torchs, truth in list(zip(ours, plain, exact, strict=True))[2:]:
        error, allowed = ((got.double() - truth).norm() / truth.norm() for got in (one, torchs))
        assert one.dtype == dtype
        assert error <= 2 * allowed + 1e-3


def test_int8_vectors_stand_for_themselves_times_their_scale():
    vectors, scale = store(20, 32, dtype=torch.int8)
    parameters = weights(1, 32, 8, 5)
    actual = adapter(vectors, *parameters, scale=scale)
    torch.testing.assert_close(actual, adapter(vectors.float() * scale[:, None], *parameters))


def test_frozen_vectors_get_no_gradient_and_parameters_do():
    vectors, _ = store(9, 4)
    parameters = [one.requires_grad_() for one in weights(1, 4, 6, 3)]
    parameters[2].requires_grad_(False)
    adapter(vectors, *parameters).sum().backward()
    assert vectors.grad is None
    assert parameters[2].grad is None
    assert all(one.grad.abs().sum() > 0 for one in parameters if one.requires_grad)


@pytest.mark.parametrize(("kept", "extra"), [(0, 0), (10**6, 5000 * 64)])
def test_the_backward_is_given_the_inputs_and_what_may_be_kept(kept, extra, monkeypatch):
    monkeypatch.setattr(op_module, "KEPT_ELEMENTS", kept)
    vectors, _ = store(5000, 8)
    parameters = [one.requires_grad_() for one in weights(1, 8, 64, 4)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: saved.append(one.numel()) or one, lambda one: one):
        adapter(vectors, *parameters)
    assert sum(saved) == vectors.numel() + sum(map(torch.numel, parameters)) + extra + 2  # two offsets


@pytest.mark.parametrize("keep", [True, False])
def test_it_is_a_well_behaved_custom_op(keep):
    vectors, scale = store(9, 6, dtype=torch.int8)
    rows, offsets = ragged([2, 0, 4], 9)
    parameters = [one.requires_grad_() for one in weights(3, 6, 5, 4)]
    torch.library.opcheck(_adapter, (vectors, rows, offsets, scale, parameters, 1e-6, keep, "chunked"))
    floating, _ = store(9, 6)
    torch.library.opcheck(
        _adapter,
        (floating.requires_grad_(), None, torch.tensor([0, 3, 3, 9]), None, parameters, 1e-6, keep, "chunked"),
    )


def test_it_compiles_without_a_break_and_not_again_for_other_lengths():
    vectors, _ = store(9, 6)
    parameters = [one.requires_grad_() for one in weights(2, 6, 5, 4)]
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=backend)
    def compiled(rows, offsets):
        return adapter(vectors, *parameters, rows=rows, offsets=offsets).relu()

    for sizes in ([2, 4], [3, 2], [9, 1], [5, 6]):
        rows, offsets = ragged(sizes, 9)
        expected = adapter(vectors, *parameters, rows=rows, offsets=offsets).relu()
        torch.testing.assert_close(compiled(rows, offsets), expected)
    assert len(graphs) <= 2  # the first length, then any


def test_torch_compile_does_not_look_into_how_triton_is_found():
    def asked(x):
        return x + (triton_support.problem("cpu") is None)

    with mock.patch.object(triton_support, "_problem", return_value=None) as answer:
        compiled = torch.compile(asked, fullgraph=True, backend="eager")
        assert compiled(torch.zeros(1)).item() == 1
    assert answer.call_count == 1


def test_autocast_chooses_the_dtype_of_the_products():
    vectors, _ = store(9, 6)
    parameters = [one.requires_grad_() for one in weights(1, 6, 5, 4)]
    with torch.autocast("cpu", torch.bfloat16):
        soft = adapter(vectors, *parameters)
    soft.sum().backward()
    assert soft.dtype == torch.bfloat16
    assert all(one.grad.dtype == torch.float32 for one in parameters)
    torch.testing.assert_close(soft.float(), adapter(vectors, *parameters), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("impl", ["auto", "reference", "chunked"])
def test_no_texts_give_no_tokens_and_zero_gradients(impl):
    vectors, _ = store(3, 4)
    none = torch.zeros(0, dtype=torch.int64)
    parameters = [one.requires_grad_() for one in weights(2, 4, 6, 3)]
    soft = adapter(vectors, *parameters, rows=none, offsets=torch.zeros(3, dtype=torch.int64), impl=impl)
    assert soft.shape == (0, 3)
    soft.sum().backward()
    assert all((one.grad == 0).all() for one in parameters)


@pytest.mark.parametrize("position", range(7))
def test_a_wrong_shape_is_named(position):
    inputs = [store(4, 6)[0], *(one[0] for one in weights(1, 6, 5, 3))]
    inputs[position] = torch.cat([inputs[position], inputs[position]], dim=-1)
    with pytest.raises(ValueError, match="do not fit"):
        adapter(*inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"impl": "fast", "offsets": torch.tensor([0, 3, 4])}, "auto, triton, chunked or reference"),
        ({"impl": "triton", "offsets": torch.tensor([0, 3, 4])}, "cannot run: CPU tensors; use auto or chunked"),
        ({"offsets": torch.tensor([0, 4])}, r"offsets \[2\]"),
        ({"offsets": torch.tensor([0, 3, 2])}, r"ascend from 0 to 4, the number of texts, not \[0, 3, 2\]"),
        ({"offsets": torch.tensor([0, 3, 5])}, "ascend from 0 to 4"),
        ({"offsets": torch.tensor([0, 3, 4]), "rows": torch.zeros(4)}, "must be int64"),
        ({"scale": torch.ones(4), "offsets": torch.tensor([0, 3, 4])}, "int8 with one, not torch.float32"),
        ({"scale": torch.ones(3), "offsets": torch.tensor([0, 3, 4])}, r"scale \[3\]"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        adapter(store(4, 6)[0], *weights(2, 6, 5, 3), **options)


def test_the_choice_is_explained():
    assert explain_choice().startswith("chunked")
