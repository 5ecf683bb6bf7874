"""The helpers that the kernels' benchmarks share."""

from __future__ import annotations

import csv

import pytest
import torch
from kernel_bench import Row, Shape, append_csv, exponent, interleaved, peak_mib, row

SHAPE = Shape(op="info_nce", mode="forward", n=4, m=5, d=6, dtype="float32")


def test_rows_carry_what_they_were_measured_on(tmp_path):
    file = tmp_path / "rows.csv"
    append_csv(file, [row(SHAPE, "ours", [3.0, 1.0, 2.0], metric="time", unit="ms")])
    append_csv(file, [row(SHAPE, "eager", [4.0], metric="time", unit="ms")])
    with file.open(newline="", encoding="utf-8") as stream:
        ours, eager = csv.DictReader(stream)
    assert list(ours) == list(Row.__slots__)
    assert (ours["p50"], ours["p20"], ours["p80"], eager["p50"]) == ("2.0", "1.4", "2.6", "4.0")
    assert (ours["n"], ours["m"], ours["d"], ours["torch"]) == ("4", "5", "6", torch.__version__)


def test_nothing_measured_is_no_row():
    with pytest.raises(ValueError, match="nothing was measured of ours"):
        row(SHAPE, "ours", [], metric="time", unit="ms")


def test_functions_take_turns_and_stop_at_the_budget():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    found = interleaved(functions, repeats=3)
    assert calls == list("abababab")
    assert {name: len(times) for name, times in found.items()} == {"a": 3, "b": 3}
    assert [len(times) for times in interleaved(functions, repeats=9, seconds=0).values()] == [1, 1]


def test_peak_memory_is_that_of_the_call():
    assert 60 < peak_mib(lambda: torch.ones(2**24).add_(1)) < 90


def test_an_exponent_is_a_slope():
    assert exponent([10, 20, 40], [5, 10, 20]) == pytest.approx(1.0)
