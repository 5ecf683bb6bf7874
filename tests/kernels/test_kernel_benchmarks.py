"""The kernels' benchmarks run, at tiny sizes, wherever the tests run."""

from __future__ import annotations

import csv
import math

import gpu
import info_nce_cpu
import pytest
import torch
from info_nce_providers import eager, ours, providers
from kernel_bench import resident_peak

from instructue_kernels.info_nce import info_nce


def rows_of(file):
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_gpu_benchmarks_in_small(tmp_path):
    assert gpu.main(["--smoke", "--part", "info_nce_bench", "--seconds", "60", "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path / "gpu.csv")
    measured = {(row["provider"], row["metric"]) for row in rows}
    assert {("chunked", "time"), ("eager", "time"), ("cublas", "time"), ("chunked", "memory")} <= measured
    assert ("eager", "memory exponent") in measured
    assert {row["n"] for row in rows} == {"64", "128"}
    assert (tmp_path / "info_nce_time_16.png").stat().st_size > 1000


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert "No CUDA device" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_cpu_benchmark_in_small(tmp_path):
    assert info_nce_cpu.main(["--rows", "64", "--size", "8", "--repeats", "1", "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path / "info_nce_cpu.csv")
    metrics = ("memory", "time", "cpu time")
    assert {row["metric"] for row in rows} == {*metrics, *(f"{one} over eager" for one in metrics)}


def test_what_is_compared_is_the_same_loss():
    query, key = (torch.randn(9, 5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    scale = torch.tensor(math.log(20.0))
    for loss in providers(query).values():
        torch.testing.assert_close(loss(query, key, scale), eager(query, key, scale))
    one_way = ours("chunked", symmetric=False)(query, key, scale)
    torch.testing.assert_close(one_way, eager(query, key, scale, symmetric=False))


@pytest.mark.parametrize("symmetric", [True, False])
def test_row_chunks_stay_within_their_memory_on_a_cpu(symmetric):
    """Scaled down: all similarities of 8192 rows are 256 MiB in float32, and eager torch holds five times that."""
    query, key = (torch.randn(8192, 32, requires_grad=True) for _ in range(2))
    log_scale = torch.tensor(2.0, requires_grad=True)
    info_nce(query[:1024], key[:1024], log_scale, symmetric=symmetric, impl="chunked").backward()
    with resident_peak() as peak:
        info_nce(query, key, log_scale, symmetric=symmetric, impl="chunked").backward()
    assert peak[0] < 100
