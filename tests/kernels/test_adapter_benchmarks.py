"""The benchmarks of adapter, texts, next-token loss and training step run in small, and compare like with like."""

from __future__ import annotations

import csv

import adapter_bench
import adapter_cpu
import gpu
import step_bench
import torch


def test_every_part_runs_in_small(tmp_path):
    assert adapter_cpu.main(["--smoke", "--out", str(tmp_path)]) == 0
    with (tmp_path / "adapter_cpu.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["op"] for row in rows} == {"adapter", "text_pool", "prompt_slots", "next_token", "step"}
    assert {row["metric"] for row in rows} == {"processor time", "memory", "time over chunked", "time over ours"}
    for op, providers in {"adapter": {"eager", "grouped_mm"}, "text_pool": {"eager"}, "next_token": {"eager"}}.items():
        assert providers < {row["provider"] for row in rows if row["op"] == op}


def test_the_gpu_benchmark_takes_them_as_parts(tmp_path):
    parts = ["--part", "adapter_bench", "--part", "next_token_bench", "--part", "step_bench"]
    assert gpu.main(["--smoke", *parts, "--seconds", "20", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "gpu.csv").stat().st_size > 1000


def test_providers_of_the_adapter_give_the_same_tokens():
    given = adapter_bench.make(96, adapter_bench.SMOKE_SIZES, "cpu", torch.float32)
    known = adapter_bench.providers(given, ("eager", "grouped_mm"))
    expected = known.pop("eager")(*given.parameters)
    for function in known.values():
        torch.testing.assert_close(function(*given.parameters), expected)


def test_a_step_in_plain_torch_is_the_same_step():
    torch.set_num_threads(1)
    step = step_bench.Step(step_bench.SMOKE, "cpu")
    loss = step()
    gradients = {name: one.grad.clone() for name, one in step.model.named_parameters() if one.grad is not None}
    with step_bench.plain_torch():
        torch.testing.assert_close(step(), loss)
    assert len(gradients) > 40
    for name, one in step.model.named_parameters():
        if one.grad is not None:
            torch.testing.assert_close(one.grad, gradients[name], rtol=1e-4, atol=1e-6)
