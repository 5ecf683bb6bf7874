"""How a plan is printed."""

from __future__ import annotations

from instructue_feast.cli.console import out, print_table
from instructue_feast.runs.plan import Cost, Plan


def print_plan(result: Plan) -> None:
    """Prints a plan as tables, and what it rests on."""
    work = result.workload
    title = f"{work.users:,} users, {work.instructions} instructions, {work.workers:,} workers"
    columns = ["", "tokens", "core hours", "GPU hours", "wall time"]
    jobs: list[tuple[str, Cost]] = [("full backfill", result.full), ("incremental backfill", result.incremental)]
    if work.days > 1:
        jobs += [(f"{work.days} days, incremental", result.all_days), (f"{work.days} days, full", result.all_days_full)]
    rows = [
        [name, _short(one.tokens), one.core_seconds / 3600, one.gpu_seconds / 3600, _duration(one.seconds)]
        for name, one in jobs
    ]
    print_table(title, columns, rows)
    stages = result.full.seconds_by_stage
    print_table("Full backfill by stage", list(stages), [[_duration(one) for one in stages.values()]])
    names = [one if one != "all days" else f"{work.days} days kept" for one in result.storage_bytes]
    print_table("Storage", names, [[_bytes(one) for one in result.storage_bytes.values()]])
    print_table("Online store", list(result.online_bytes), [[_bytes(one) for one in result.online_bytes.values()]])
    out.print(
        f"{result.buckets:,} buckets: a worker holds {_bytes(result.worker_bytes)} of users beside its model; "
        f"{result.distinct_texts:,.0f} distinct texts",
        soft_wrap=True,
    )
    out.print("[bold]Assumptions[/]")
    for one in result.assumptions:
        out.print(f"- {one}", soft_wrap=True)


def _short(number: float) -> str:
    for size, unit in ((1e15, " quadrillion"), (1e12, " trillion"), (1e9, " billion"), (1e6, " million")):
        if number >= size:
            return f"{number / size:,.1f}{unit}"
    return f"{number:,.0f}"


def _bytes(number: float) -> str:
    for size, unit in ((2**50, "PiB"), (2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number:,.0f} B"


def _duration(seconds: float) -> str:
    if seconds >= 2 * 86_400:
        return f"{seconds / 86_400:,.1f} days"
    if seconds >= 2 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.1f} s"
