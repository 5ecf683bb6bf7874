"""Every shipped kernel compiles for GPUs that are not here: no spills, within limits, on the tensor cores."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from compile_table import Case, as_text, cases, compile_case, problems
from info_nce_cases import cases as info_nce_cases


@pytest.fixture(scope="module")
def table():
    chosen = cases()
    return [(case, compile_case(case)) for case in chosen]


def test_no_shipped_kernel_spills_or_leaves_the_tensor_cores(table, capsys):
    with capsys.disabled():
        print("\n" + as_text([row for _, row in table]))
    assert not [line for case, row in table for line in problems(case, row)]


def test_a_rule_that_is_broken_is_named():
    case = info_nce_cases()[0]
    wanted = Case(**{name: getattr(case, name) for name in Case.__slots__} | {"tensor_cores": True, "capability": 90})
    (found,) = problems(wanted, compile_case(wanted))
    assert "norms_kernel bfloat16 sm_90: no wgmma" in found


def test_an_argument_without_a_type_is_named():
    case = info_nce_cases()[0]
    incomplete = {name: kind for name, kind in case.signature.items() if name != "D"}
    with pytest.raises(ValueError, match=r"norms_kernel: no type and no value for \['D'\]"):
        compile_case(Case(**{name: getattr(case, name) for name in Case.__slots__} | {"signature": incomplete}))
