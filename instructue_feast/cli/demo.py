"""`instructue demo`: the whole path on real purchases, and a report of it."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from instructue_feast.cli.backfill import print_run, run_backfill_job, vars_of
from instructue_feast.cli.console import JsonOption, err, out, print_json, print_table
from instructue_feast.cli.extract import print_counts
from instructue_feast.cli.jobs import JobResult, StageDisplay, StageResult
from instructue_feast.config import load_config
from instructue_feast.errors import ConfigError, InvalidEmbeddingError
from instructue_feast.runs.store import OutputStore

TEMPLATE = "complete_journey"
DATASET = "The Complete Journey (84.51°, 2017)"
LOOKUPS = 200
MARKER = ".instructue-demo"
MAX_DIFFERENCE = {"float32": 1e-5, "bfloat16": 2e-2}
"""How far an online vector may be from a direct encode, by compute type."""


def demo(
    folder: Annotated[Path, typer.Option("--out", help="Folder for data, runs and the report.")] = Path("build/demo"),
    households: Annotated[int, typer.Option(min=3, help="Households to embed.")] = 500,
    as_json: JsonOption = False,
) -> None:
    """Purchases in, user embeddings out of the online store, on The Complete Journey; writes a report.

    Example: [bold]instructue demo --out build/demo --households 500[/]
    """
    report = run_demo(folder, households, quiet=as_json)
    if as_json:
        print_json(report)
        return
    out.print(f"\nReport: {folder / 'report.html'} and {folder / 'report.json'}", soft_wrap=True)
    out.print(f"Try:    instructue get {report['example_user']} --repo {folder}", soft_wrap=True)


def run_demo(folder: Path, households: int, *, quiet: bool) -> dict[str, Any]:
    """Runs every stage from nothing and returns what `report.json` holds."""
    from instructue_feast.cli.demo_quality import read_quality
    from instructue_feast.cli.demo_report import write_report
    from instructue_feast.datasets.complete_journey import DEMO_AS_OF, write_complete_journey
    from instructue_feast.datasets.project import checkpoint_folder
    from instructue_feast.feature_store.lookup import UserEmbeddings
    from instructue_feast.feature_store.materialize import apply_repo, materialize

    if not quiet:
        err.print(f"[bold]{DATASET}[/]: {households} households, as of {DEMO_AS_OF}")
    _start_from_nothing(folder)
    checkpoint = checkpoint_folder(TEMPLATE)
    quality = None if checkpoint is None else read_quality(checkpoint)  # first, as it may fail
    stages: list[StageResult] = []
    with StageDisplay(quiet=quiet) as display:

        def data() -> tuple[int, int]:
            summary = write_complete_journey(folder, households=households)
            return summary.users, sum(summary.rows.values())

        stages.append(display.timed("data", data))
    job = run_backfill_job(str(folder / "instructue.yaml"), DEMO_AS_OF, quiet=quiet)
    stages += job.stages
    run, extract = job.value["run"], job.value["extract"]
    with StageDisplay(quiet=quiet) as display:
        views: list[Any] = []

        def online() -> tuple[int, int]:
            apply_repo(folder)
            views.extend(materialize(folder))
            return run["users"] * len(run["instructions"]), sum(view.rows for view in views)

        stages.append(display.timed("materialize", online))
        lookup: dict[str, Any] = {}

        def look_up() -> tuple[int, int]:
            users = _users(folder, run["run_id"])
            lookup.update(_measure_lookup(UserEmbeddings(folder), users))
            return lookup["users"], lookup["found"]

        stages.append(display.timed("lookup", look_up))
    example = write_report(folder, job, stages, lookup, quality)
    report = {
        "dataset": DATASET,
        "users": run["users"],
        "events": extract["events"],
        "distinct_texts": run["distinct_texts"],
        "texts_encoded": run["texts_encoded"],
        "instructions": [one["id"] for one in run["instructions"]],
        "embedding_dim": run["embedding_dim"],
        "embedding_versions": {one["id"]: one["embedding_version"] for one in run["instructions"]},
        "trained": run["trained"],
        "stages": [vars_of(stage) for stage in stages],
        "online": {
            "store": "sqlite",
            "features": [one["id"] for one in run["instructions"]],
            "rows": sum(view.rows for view in views),
        },
        "lookup": {"users": lookup["users"], "p50_ms": lookup["p50_ms"]},
        "parity": example["parity"],
        "example_user": example["user"],
    }
    OutputStore(str(folder)).write_json(report, "report.json")
    _require_good(folder, run, lookup, example["parity"])
    if not quiet:
        _print_summary(job, stages, lookup, example)
    return report


def _start_from_nothing(folder: Path) -> None:
    """Removes what an earlier demo made, so that figures can be compared, and nothing else.

    Of `models/` only the checkpoint goes: what a user trained beside it stays.

    Raises:
        ConfigError: The folder holds something that no demo made.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise ConfigError(f"{folder} holds files that no demo made", "choose an empty or new folder with --out")
    from instructue_feast.datasets.project import CHECKPOINT

    store = OutputStore(str(folder))
    for old in ("output", "data", CHECKPOINT):
        store.remove(old)
    folder.mkdir(parents=True, exist_ok=True)
    note = f"`instructue demo` may remove output/, data/ and {CHECKPOINT}/ in this folder.\n"
    (folder / MARKER).write_text(note, encoding="utf-8")


def _require_good(folder: Path, run: dict[str, Any], lookup: dict[str, Any], parity: dict[str, Any]) -> None:
    """A demo that served a wrong vector, or missed a user, has failed.

    Raises:
        InvalidEmbeddingError: An online vector differs from a direct encode, or a user of the run is not online.
    """
    limit = MAX_DIFFERENCE[load_config(folder / "instructue.yaml").model.dtype]
    if parity["max_difference"] > limit:
        raise InvalidEmbeddingError(
            f"online vectors differ from a direct encode by {parity['max_difference']:.1e}, more than {limit:.0e}",
            f"compare run {run['run_id']} with the online store",
        )
    if lookup["found"] != lookup["users"]:
        missing = lookup["users"] - lookup["found"]
        raise InvalidEmbeddingError(f"{missing} of {lookup['users']} users are not online", "materialize again")


def _users(folder: Path, run_id: str) -> list[str]:
    from instructue_feast.runs.reader import read_run

    store = OutputStore(load_config(folder / "instructue.yaml").output.path)
    return [str(user) for user in read_run(store, run_id, columns=[]).column("user_id").to_pylist()]


def _measure_lookup(embeddings: Any, users: list[str]) -> dict[str, Any]:
    """Looks users up one by one, as a recommender does, after one lookup that opens the store."""
    sample = users[:LOOKUPS]
    embeddings.get(sample[:1])
    times, found = [], 0
    for user in sample:
        started = time.perf_counter()
        result = embeddings.get([user])
        times.append((time.perf_counter() - started) * 1000)
        found += all(bool(one[0]) for one in result.found.values())
    ordered = sorted(times)
    return {
        "users": len(sample),
        "found": found,
        "p50_ms": round(statistics.median(ordered), 3),
        "p99_ms": round(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 3),
    }


def _print_summary(job: JobResult, stages: list[StageResult], lookup: dict[str, Any], example: dict[str, Any]) -> None:
    print_counts(job.value["extract"])
    print_run(job.value["run"], job)
    print_table(
        "Online lookup, one user at a time, all instructions",
        ["users", "found", "p50 ms", "p99 ms"],
        [[lookup["users"], lookup["found"], lookup["p50_ms"], lookup["p99_ms"]]],
    )
    out.print(
        f"Parity: the online vectors of {example['parity']['users']} users differ from a direct encode by at most "
        f"{example['parity']['max_difference']:.1e}.",
        soft_wrap=True,
    )
    out.print(f"All stages: {sum(stage.seconds for stage in stages):.0f} s")
