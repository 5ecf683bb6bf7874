"""`adapter`, `text_pool` and `prompt_slots` against what a user would take instead; part of `gpu.py`.

Time and peak memory in turns, and ratios over our own. Weights are bfloat16 on a GPU, as `grouped_mm` wants them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from kernel_bench import Clock, Row, Shape, interleaved, peak_mib, row
from torch.nn import functional as F

from instructue_kernels.adapter import adapter
from instructue_kernels.prompt_slots import Events, prompt_slots
from instructue_kernels.text_pool import text_pool
from instructue_kernels.triton_support import problem

SHARE = 0.25
"""Of the whole time budget."""

SOURCES = 6
SIZES = (384, 384, 576)
"""Encoder, middle, LLM: MiniLM and SmolLM2-135M."""

ROWS = (4096, 32768, 131072)
USERS = (64, 256)
LENGTH = 200
QUESTIONS = 8
SMOKE_ROWS, SMOKE_USERS, SMOKE_SIZES = (96, 192), (3, 6), (16, 16, 24)

Function = Callable[..., torch.Tensor]


class Problem(NamedTuple):
    """Texts of all sources, a store of vectors, and the adapters."""

    vectors: torch.Tensor
    rows: torch.Tensor
    offsets: torch.Tensor
    parameters: list[torch.Tensor]
    upstream: torch.Tensor


def run(seconds: float, *, smoke: bool = False) -> list[Row]:
    """All measurements that the time allows, each op in turn."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    rows, users, sizes = (SMOKE_ROWS, SMOKE_USERS, SMOKE_SIZES) if smoke else (ROWS, USERS, SIZES)
    clock, found, cases = Clock(seconds), list[Row](), len(rows) + len(users)
    repeats, peers = (2, ("eager", "grouped_mm")) if smoke else (30, ("eager", "compile", "grouped_mm"))
    for place, number in enumerate(rows):
        if clock.left:
            given = make(number, sizes, device, dtype)
            share = clock.left / (cases - place)
            found += measure_adapter(given, share, repeats=repeats, peers=peers)
    for place, number in enumerate(users):
        if clock.left:
            share = clock.left / (len(users) - place)
            found += measure_texts(number, LENGTH if not smoke else 9, sizes[2], device, share, repeats=repeats)
    return found


def make(number: int, sizes: tuple[int, int, int], device: str, dtype: torch.dtype) -> Problem:
    """Seeded weights and unit vectors; sources of different size, one of them empty."""
    generator = torch.Generator().manual_seed(0)
    dim, middle, hidden = sizes
    share = torch.tensor([0.4, 0.3, 0.0, 0.15, 0.1, 0.05])
    own = (share * number).long()
    own[0] += number - own.sum()
    shapes = [(SOURCES, dim), (SOURCES, dim), (SOURCES, middle, dim), (SOURCES, middle), (SOURCES, hidden, middle)]
    parameters = [torch.randn(one, generator=generator) / one[-1] ** 0.5 for one in [*shapes, (SOURCES, hidden)]]
    vectors = F.normalize(torch.randn(2 * number, dim, generator=generator), dim=-1)
    return Problem(
        vectors=vectors.to(device, dtype),
        rows=torch.randint(0, len(vectors), (number,), generator=generator).to(device),
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), own.cumsum(0)]),
        parameters=[one.to(device, dtype).requires_grad_() for one in parameters],
        upstream=torch.randn(number, hidden, generator=generator).to(device, dtype),
    )


def providers(given: Problem, peers: Sequence[str]) -> dict[str, Function]:
    """Soft tokens from the parameters, by provider."""
    fixed = {"rows": given.rows, "offsets": given.offsets}
    bounds = given.offsets.tolist()
    ends = given.offsets[1:].to(given.rows.device, torch.int32)
    source_of = torch.repeat_interleave(torch.arange(SOURCES), given.offsets.diff()).to(given.rows.device)

    def eager(*parameters: torch.Tensor) -> torch.Tensor:
        """What one would write: a loop over sources."""
        soft = []
        for source in range(SOURCES):
            norm_weight, norm_bias, up, up_bias, down, down_bias = (one[source] for one in parameters)
            own = given.vectors[given.rows[bounds[source] : bounds[source + 1]]].to(up.dtype)
            middle = F.gelu(F.linear(F.layer_norm(own, own.shape[-1:], norm_weight, norm_bias, 1e-6), up, up_bias))
            soft.append(F.linear(middle, down, down_bias))
        return torch.cat(soft)

    def grouped_mm(*parameters: torch.Tensor) -> torch.Tensor:
        """All sources at once; biases are gathered, since `grouped_mm` has none."""
        norm_weight, norm_bias, up, up_bias, down, down_bias = parameters
        own = given.vectors[given.rows].to(up.dtype)
        normed = F.layer_norm(own, own.shape[-1:], None, None, 1e-6) * norm_weight[source_of] + norm_bias[source_of]
        middle = F.gelu(F.grouped_mm(normed, up.transpose(1, 2), offs=ends) + up_bias[source_of])
        return F.grouped_mm(middle, down.transpose(1, 2), offs=ends) + down_bias[source_of]

    known: dict[str, Function] = {"chunked": lambda *own: adapter(given.vectors, *own, **fixed, impl="chunked")}
    if problem(given.vectors.device.type) is None:
        known["triton"] = lambda *own: adapter(given.vectors, *own, **fixed, impl="triton")
    others: dict[str, Function] = {"eager": eager, "grouped_mm": grouped_mm}
    if "compile" in peers:
        others["compile"] = torch.compile(eager, dynamic=True)
        others["compile+grouped_mm"] = torch.compile(grouped_mm, dynamic=True)
    return known | {name: one for name, one in others.items() if name.split("+")[0] in peers}


def measure_adapter(given: Problem, seconds: float, *, repeats: int, peers: Sequence[str]) -> list[Row]:
    """Forward without gradients, as the soft-token table is built, and forward with backward."""
    number, dim, hidden = len(given.rows), given.vectors.shape[1], given.upstream.shape[1]
    dtype = str(given.vectors.dtype).removeprefix("torch.")
    known = providers(given, peers)
    found = []
    for mode in ("forward", "forward+backward"):
        shape = Shape(op="adapter", mode=mode, n=number, m=hidden, d=dim, dtype=dtype)
        calls = {name: called(one, given.parameters, given.upstream, mode) for name, one in known.items()}
        found += measured(shape, calls, seconds / 2, repeats)
    return found


def measure_texts(users: int, length: int, hidden: int, device: str, seconds: float, *, repeats: int) -> list[Row]:
    """Focus pooling and the prompt, forward and backward in float32, against padded tensors in plain torch."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(length // 4, length + 1, (users,), generator=generator)
    number = int(lengths.sum())
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    soft = torch.randn(max(1, number // 4), hidden, generator=generator).to(device).requires_grad_()
    count, age = (torch.randn(one, hidden, generator=generator).to(device).requires_grad_() for one in (12, 9))
    rows, counts, ages = (
        torch.randint(0, one, (number,), generator=generator).to(device) for one in (len(soft), 12, 9)
    )
    weights = torch.rand(number, QUESTIONS, generator=generator).to(device).requires_grad_()
    pooled_upstream = torch.randn(users, QUESTIONS, hidden, generator=generator).to(device)
    implementations = ["chunked", *(["triton"] if problem(device) is None else [])]
    known: dict[str, Function] = {
        name: lambda *own, name=name: text_pool(*own, offsets, rows=rows, impl=name) for name in implementations
    }
    padded = padding(lengths, device)
    known["eager"] = lambda *own: padded_pool(*own, rows, padded)
    calls = {name: called(one, [weights, soft], pooled_upstream, "forward+backward") for name, one in known.items()}
    mode, dtype = "forward+backward", "float32"
    found = measured(
        Shape(op="text_pool", mode=mode, n=number, m=users, d=hidden, dtype=dtype), calls, seconds / 2, repeats
    )
    table = torch.randn(40 * users, hidden, generator=generator).to(device).requires_grad_()
    slots = torch.full((users, length + 40), -1)
    for user, own in enumerate(lengths.tolist()):
        slots[user, :40] = torch.arange(40) + 40 * user
        slots[user, 40 : 40 + own] = len(table) + offsets[user] + torch.arange(own)
    slots = slots.to(device)
    upstream = torch.randn(*slots.shape, hidden, generator=generator).to(device, torch.bfloat16)

    def filled(name: str) -> Function:
        return lambda table, *own: prompt_slots(
            table, Events(*own, rows, counts, ages), slots, dtype=torch.bfloat16, impl=name
        )

    known = {{"reference": "eager"}.get(name, name): filled(name) for name in (*implementations, "reference")}
    leaves = [table, soft, count, age]
    calls = {name: called(one, leaves, upstream, "forward+backward") for name, one in known.items()}
    shape = Shape(op="prompt_slots", mode=mode, n=slots.numel(), m=users, d=hidden, dtype=dtype)
    return found + measured(shape, calls, seconds / 2, repeats)


def padding(lengths: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    """`[B, L]` position of each text, -1 where there is none."""
    place = torch.arange(int(lengths.max()))
    starts = lengths.cumsum(0) - lengths
    return torch.where(place < lengths[:, None], starts[:, None] + place, -1).to(device)


def padded_pool(
    weights_TK: torch.Tensor, soft_NH: torch.Tensor, rows: torch.Tensor | None, padded_BL: torch.Tensor
) -> torch.Tensor:
    """`text_pool` as one would write it: users padded to the longest."""
    there_BL1 = (padded_BL >= 0)[:, :, None]
    text_BL = padded_BL.clamp(min=0)
    soft_BLH = soft_NH[text_BL if rows is None else rows[text_BL]] * there_BL1
    return (weights_TK[text_BL] * there_BL1).transpose(1, 2) @ soft_BLH


def one_thread() -> bool:
    """Whether a benchmark runs on one thread of a CPU: then its processor time is what counts."""
    return torch.get_num_threads() == 1 and not torch.cuda.is_available()


def called(
    function: Function, leaves: Sequence[torch.Tensor], upstream: torch.Tensor, mode: str
) -> Callable[[], object]:
    """A forward without gradients, or a forward with its backward."""

    def forward() -> None:
        with torch.no_grad():
            function(*leaves)

    def both() -> None:
        for one in leaves:
            one.grad = None
        function(*leaves).backward(upstream)

    return forward if mode == "forward" else both


def measured(shape: Shape, calls: Mapping[str, Callable[[], object]], seconds: float, repeats: int) -> list[Row]:
    """Rows of time, memory, and times over our own; whoever cannot run is left out and named."""
    memory, running = {}, {}
    for name, call in calls.items():
        try:
            call()  # compiles
            memory[name] = peak_mib(call)
        except (RuntimeError, ValueError, TypeError, AssertionError) as trouble:
            print(f"{name} at {shape}: {type(trouble).__name__}: {str(trouble).splitlines()[0]}")
            continue
        running[name] = call
    processor = one_thread()
    times = interleaved(running, repeats=repeats, seconds=seconds, processor=processor)
    metric = "processor time" if processor else "time"
    rows = [row(shape, name, values, metric=metric, unit="ms") for name, values in times.items()]
    rows += [row(shape, name, [value], metric="memory", unit="MiB") for name, value in memory.items()]
    own = "triton" if "triton" in times else "chunked"
    for name in times:
        if name != own:
            ratios = [theirs / ours for theirs, ours in zip(times[name], times[own], strict=True)]
            rows.append(row(shape, name, ratios, metric=f"time over {own}", unit="1"))
    return rows
