"""Every shipped kernel compiles for GPUs that are not here: no spills, within limits, on the tensor cores."""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import compile_table
from compile_table import Case, as_text, compile_case, compile_tested, problems
from info_nce_cases import cases as info_nce_cases


@pytest.fixture(scope="module")
def table():
    return compile_tested(processes=2)


def test_no_shipped_kernel_spills_or_leaves_the_tensor_cores(table, capsys):
    with capsys.disabled():
        print("\n" + as_text([row for _, row in table]))
    assert not [line for case, row in table for line in problems(case, row)]


def test_a_rule_that_is_broken_is_named():
    case = info_nce_cases()[0]
    wanted = Case(**{name: getattr(case, name) for name in Case.__slots__} | {"tensor_cores": True, "capability": 90})
    (found,) = problems(wanted, compile_case(wanted))
    assert "norms_kernel bf16 sm_90: no wgmma" in found


def test_an_argument_without_a_type_is_named():
    case = info_nce_cases()[0]
    incomplete = {name: kind for name, kind in case.signature.items() if name != "D"}
    with pytest.raises(ValueError, match=r"norms_kernel: no type and no value for \['D'\]"):
        compile_case(Case(**{name: getattr(case, name) for name in Case.__slots__} | {"signature": incomplete}))


def test_a_table_keeps_the_rows_of_other_ops_and_capabilities(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_table, "RESULTS", tmp_path)
    zeros = {one.name: 0 for one in dataclasses.fields(compile_table.Compiled)} | {
        "triton": compile_table.triton.__version__
    }
    rows = [compile_table.Compiled(**zeros | {"op": op, "kernel": "k", "variant": "v"}) for op in ("b", "a")]
    for one in rows:
        compile_table._write([one])
    compile_table._write([dataclasses.replace(rows[0], registers=7), dataclasses.replace(rows[0], capability=90)])
    compile_table._write([dataclasses.replace(rows[0], capability=90, registers=8)])
    (file,) = tmp_path.glob("*.md")
    lines = [line.split(" | ") for line in file.read_text().splitlines() if line.startswith(("| a", "| b"))]
    assert [(line[0], line[3], line[6]) for line in lines] == [("| a", "0", "0"), ("| b", "0", "7"), ("| b", "90", "8")]


LENGTHS = {
    "adapter": {"num_texts", "splits"},
    "info_nce": {"first", "N", "num_anchors", "K"},
    "prompt_slots": {"P", "V", "share"},
    "text_pool": set(),
}


def test_no_length_compiles_anything_anew():
    """Triton compiles again for 1 and for multiples of 16, unless it is told not to."""
    kernels = {(one.op, one.kernel) for one in compile_table.cases()}
    assert {op for op, _ in kernels} == set(LENGTHS)
    for op, kernel in kernels:
        lengths = [one for one in kernel.params if one.name in LENGTHS[op]]
        assert all(one.do_not_specialize for one in lengths), kernel.__name__
