"""Filling prompts: every implementation is the reference, in value and gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instructue_kernels.prompt_slots import Events, explain_choice, prompt_slots
from instructue_kernels.prompt_slots import chunked as chunked_module
from instructue_kernels.prompt_slots.op import _prompt_slots


def problem(v, t, n, h, shape, *, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    floats = [torch.randn(one, h, generator=generator, dtype=torch.float64).to(dtype) for one in (v, n, 3, 4)]
    table, soft, count, age = (one.requires_grad_() for one in floats)
    row, counts, ages = (torch.randint(0, size, (t,), generator=generator) for size in (n, 3, 4))
    slots = torch.randint(-1, v + t, shape, generator=generator)
    return table, Events(soft, count, age, row, counts, ages), slots


def gradients(filled, *leaves):
    upstream = torch.randn(filled.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return [filled.detach(), *torch.autograd.grad((filled * upstream.to(filled.dtype)).sum(), leaves)]


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_every_slot_holds_what_it_names(impl):
    table, events, _ = problem(3, 5, 4, 2, (1,))
    slots = torch.tensor([[-1, 2, 3, 7]])
    filled = prompt_slots(table, events, slots, impl=impl)[0]
    assert (filled[0] == 0).all()
    torch.testing.assert_close(filled[1], table[2])
    for place, text in ((2, 0), (3, 4)):
        parts = (
            events.soft_NH[events.row_T[text]],
            events.count_CH[events.count_T[text]],
            events.age_AH[events.age_T[text]],
        )
        torch.testing.assert_close(filled[place], sum(parts))


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_gradients_are_right_in_float64(impl):
    table, events, slots = problem(3, 5, 4, 2, (2, 6))

    def filled(table, *floats):
        return prompt_slots(table, Events(*floats, *events[3:]), slots, impl=impl)

    assert torch.autograd.gradcheck(filled, [table, *events[:3]])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(0, 20),
    st.integers(1, 5),
    st.integers(1, 7),
    st.lists(st.integers(0, 7), min_size=1, max_size=3),
    st.integers(1, 9),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_chunked_is_the_reference_whatever_the_shape(v, t, n, h, shape, chunk, dtype):
    table, events, slots = problem(v, t, n, h, tuple(shape))
    leaves = [table, *events[:3]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked_module, "CHUNK", chunk)
        ours = gradients(prompt_slots(table, events, slots, dtype=dtype, impl="chunked"), *leaves)
    theirs = gradients(prompt_slots(table, events, slots, dtype=dtype, impl="reference"), *leaves)
    assert ours[0].dtype == dtype
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **close)


def test_it_is_a_well_behaved_custom_op():
    table, events, slots = problem(3, 5, 4, 2, (12,), dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(_prompt_slots, (table, list(events), slots, dtype, "chunked"))


def test_it_compiles_without_a_break():
    table, events, slots = problem(3, 5, 4, 2, (2, 6), dtype=torch.float32)

    def filled(table, *floats):
        return prompt_slots(table, Events(*floats, *events[3:]), slots, dtype=torch.bfloat16) * 2

    leaves = [table, *events[:3]]
    compiled = torch.compile(filled, fullgraph=True, backend="aot_eager")
    for one, other in zip(gradients(compiled(*leaves), *leaves), gradients(filled(*leaves), *leaves), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"impl": "triton"}, "cannot run: CPU tensors; use auto or chunked"),
        ({"impl": "fast"}, "use auto, triton, chunked or reference"),
        ({"table_VH": torch.ones(3, 3, dtype=torch.float64)}, r"with one H, not \[\[3, 3\], \[4, 2\]"),
        ({"table_VH": torch.ones(3, 2)}, "must have one dtype"),
        ({"slots": torch.zeros(3)}, "must be int64"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    table, events, slots = problem(3, 5, 4, 2, (2, 6))
    with pytest.raises(ValueError, match=message):
        prompt_slots(**({"table_VH": table, "events": events, "slots": slots} | change))
    with pytest.raises(ValueError, match=r"must be \[T\]"):
        prompt_slots(table, events._replace(age_T=events.age_T[:2]), slots)


def test_the_choice_is_explained():
    assert explain_choice().startswith("chunked")


@pytest.mark.parametrize("frozen", range(4))
def test_what_is_frozen_gets_no_gradient(frozen):
    table, events, slots = problem(3, 5, 4, 2, (20,))
    leaves = [table, *events[:3]]
    leaves[frozen].requires_grad_(False)
    prompt_slots(table, events, slots).sum().backward()
    assert [one.grad is None for one in leaves] == [place == frozen for place in range(4)]
