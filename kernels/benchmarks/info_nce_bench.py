"""`info_nce` on a GPU against what a user would take instead; part of `gpu.py`.

Time and peak memory of forward and backward over the shapes of README.md, in turns with the bare matrix products, the
ratios of both, and the growth of memory with the number of queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from info_nce_providers import Loss, bare_products, providers
from kernel_bench import Clock, Row, Shape, exponent, interleaved, peak_mib, row

SHARE = 0.6
"""Of the whole time budget."""

SHAPES = ((8192, 512), (32768, 512), (32768, 1024), (65536, 1024), (131072, 1024))
SMOKE_SHAPES = ((64, 16), (128, 16))
SCALE = 100.0
LOGITS_BYTES = 20
"""Of eager torch for each similarity; where that does not fit, it and torch.compile are left out."""


def run(seconds: float, *, smoke: bool = False) -> list[Row]:
    """All measurements that the time allows, the targets' shapes first."""
    clock, found = Clock(seconds), []
    shapes = SMOKE_SHAPES if smoke else SHAPES
    for place, (count, size) in enumerate(shapes):
        if not clock.left:
            break
        found += _shape(count, size, clock.left / (len(shapes) - place), smoke=smoke)
    return found + _exponents(found)


def _shape(count: int, size: int, seconds: float, *, smoke: bool) -> list[Row]:
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    query, key = (_vectors(count, size, seed).to(device, dtype).requires_grad_() for seed in (0, 1))
    log_scale = torch.tensor(math.log(SCALE), device=device, requires_grad=True)
    shape = Shape(op="info_nce", mode="forward+backward", n=count, m=count, d=size, dtype=str(dtype)[6:])
    calls: dict[str, Callable[[], object]] = {"cublas": bare_products(query.detach(), key.detach())}
    memory: dict[str, float] = {}
    for name, loss in providers(query).items():
        if name in ("eager", "compile") and count * count * LOGITS_BYTES > _free_bytes():
            continue
        call = _call(loss, query, key, log_scale)
        try:
            call()  # compiles
            memory[name] = peak_mib(call)
        except (RuntimeError, ValueError, TypeError, AssertionError, AttributeError) as problem:
            print(f"{name} at {count} x {size}: {type(problem).__name__}: {str(problem).splitlines()[0]}")
            query.grad = key.grad = log_scale.grad = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        calls[name] = call
    times = interleaved(calls, repeats=3 if smoke else 30, seconds=seconds)
    rows = [row(shape, name, values, metric="time", unit="ms") for name, values in times.items()]
    rows += [row(shape, name, [value], metric="memory", unit="MiB") for name, value in memory.items()]
    own = "triton" if "triton" in times else "chunked"
    for name in times:
        if name != own:
            ratios = [theirs / ours for theirs, ours in zip(times[name], times[own], strict=True)]
            rows.append(row(shape, name, ratios, metric=f"time over {own}", unit="1"))
    return rows


def _vectors(count: int, size: int, seed: int) -> torch.Tensor:
    """Normal vectors: the pairs of a model that has learned nothing."""
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def _call(loss: Loss, query: torch.Tensor, key: torch.Tensor, log_scale: torch.Tensor) -> Callable[[], object]:
    def call() -> None:
        query.grad = key.grad = log_scale.grad = None
        loss(query, key, log_scale).backward()

    return call


def _free_bytes() -> float:
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 2**32


def _exponents(rows: Sequence[Row]) -> list[Row]:
    """Growth of each provider's memory with the number of queries, at the size measured most."""
    found = []
    memory = [one for one in rows if one.metric == "memory"]
    for size in sorted({one.d for one in memory}):
        for name in dict.fromkeys(one.provider for one in memory):
            own = [one for one in memory if (one.provider, one.d) == (name, size)]
            if len(own) >= 2:
                last = own[-1]
                shape = Shape(op=last.op, mode=last.mode, n=last.n, m=last.m, d=size, dtype=last.dtype)
                value = exponent([one.n for one in own], [max(one.p50, 1e-3) for one in own])
                found.append(row(shape, name, [value], metric="memory exponent", unit="1"))
    return found
