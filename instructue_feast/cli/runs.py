"""`instructue runs`: the runs of a project: list, show, compare, roll back, collect garbage."""

from __future__ import annotations

import dataclasses
import math
from datetime import timedelta
from typing import Annotated, Any

import typer

from instructue_feast.cli.console import DEFAULT_CONFIG, ConfigOption, JsonOption, out, print_json, print_table
from instructue_feast.config import InstructueConfig, load_config

app = typer.Typer(name="runs", help="The runs of a project.", no_args_is_help=True, rich_markup_mode="rich")

RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Id of the run.")]


def _open(config: str) -> tuple[Any, InstructueConfig]:
    from instructue_feast.runs.store import OutputStore

    project = load_config(config)
    return OutputStore(project.output.path), project


@app.command("list")
def list_runs(config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False) -> None:
    """List all runs: where each stands, and who works on it.

    Example: [bold]instructue runs list --config instructue.yaml[/]
    """
    from instructue_feast.runs.overview import run_statuses

    store, _ = _open(config)
    statuses = run_statuses(store)
    if as_json:
        print_json([dataclasses.asdict(one) for one in statuses])
        return
    rows = [
        [
            one.run_id, one.state, one.as_of, one.users, one.carried, f"{one.buckets}/{one.of_buckets}",
            one.owner or "", one.note,
        ]
        for one in statuses
    ]  # fmt: skip
    print_table("Runs", ["run", "state", "as_of", "users", "carried", "buckets", "worked on by", "note"], rows)


@app.command()
def show(run_id: RunArgument, config: ConfigOption = DEFAULT_CONFIG, as_json: JsonOption = False) -> None:
    """Show one run: its steps, its views and what its quality gates found.

    Example: [bold]instructue runs show 20171001T000000-1a2b3c4d[/]
    """
    from instructue_feast.runs.gates import GATES_FILE
    from instructue_feast.runs.ledger import read_ledger
    from instructue_feast.runs.manifest import to_json
    from instructue_feast.runs.overview import run_status
    from instructue_feast.runs.publish import current_publication
    from instructue_feast.runs.reader import run_manifest

    store, _ = _open(config)
    status = run_status(store, run_id, current_publication(store))
    ledger = read_ledger(store, run_id)
    finished = store.exists("runs", run_id, "manifest.json")
    manifest = run_manifest(store, run_id) if finished else None
    quality = store.read_json("runs", run_id, *GATES_FILE) if store.exists("runs", run_id, *GATES_FILE) else None
    if as_json:
        print_json(
            {
                "status": dataclasses.asdict(status),
                "ledger": dataclasses.asdict(ledger) if ledger else None,
                "manifest": to_json(manifest) if manifest else None,
                "quality": quality,
            }
        )
        return
    print_table(
        f"Run {run_id}",
        ["state", "as_of", "users", "carried", "from run", "buckets", "worked on by"],
        [
            [
                status.state, status.as_of, status.users, status.carried, status.base_run or "",
                f"{status.buckets}/{status.of_buckets}", status.owner or "",
            ]
        ],
    )  # fmt: skip
    if ledger:
        print_table("Steps", ["state", "at", "note"], [[step.state, step.at, step.note] for step in ledger.steps])
    if manifest:
        views = [[one.id, one.view, one.text] for one in manifest.instructions]
        print_table("Feature views", ["feature", "view", "instruction"], views)
    if quality:
        gates = [
            [one["name"], one["instruction"] or "", _number(one["value"]), one["limit"], one["passed"]]
            for one in quality["gates"]
        ]
        print_table("Quality gates", ["gate", "instruction", "value", "limit", "passed"], gates)
        for note in quality["notes"]:
            out.print(note, soft_wrap=True, markup=False)
        out.print(f"Pictures: {store.url('runs', run_id, 'quality', 'report.html')}", soft_wrap=True, markup=False)


@app.command()
def compare(
    first: RunArgument,
    second: Annotated[str, typer.Argument(metavar="RUN", help="The other run.")],
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Compare two finished runs, user by user.

    Example: [bold]instructue runs compare 20171001T000000-1a2b3c4d 20171002T000000-5e6f7a8b[/]
    """
    from instructue_feast.runs.overview import compare_runs

    store, _ = _open(config)
    found = compare_runs(store, first, second)
    if as_json:
        document = dataclasses.asdict(found)
        for one in document["instructions"]:
            one.update({name: None for name in ("largest", "cosine") if math.isnan(one[name])})
        print_json(document)
        return
    same = "the same" if found.same_digest else "not the same"
    alone = f"{found.only_first:,} users are only in the first, {found.only_second:,} only in the second"
    out.print(f"Value digests are {same}; {alone}.")
    columns = ["instruction", "same version", "users in both", "identical", "largest difference", "mean cosine"]
    rows = [
        [one.instruction, one.same_version, one.users, one.identical, f"{one.largest:.2e}", f"{one.cosine:.6f}"]
        for one in found.instructions
    ]
    print_table(f"{first} and {second}", columns, rows)


@app.command()
def rollback(
    run_id: Annotated[str | None, typer.Argument(metavar="[RUN]", help="The run to go back to.")] = None,
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Make an earlier run current again: one move of the pointer, nothing is computed.

    Without a run, the one that was published before. Materialize afterwards to take the online store back as well.

    Example: [bold]instructue runs rollback[/]
    """
    from instructue_feast.runs.rollback import rollback as roll_back

    store, project = _open(config)
    publication = roll_back(store, run_id, keep_runs=project.output.keep_runs)
    if as_json:
        print_json(dataclasses.asdict(publication))
        return
    out.print(f"Run {publication.run_id} is current again (as of {publication.as_of}).", soft_wrap=True)
    out.print("Next: instructue materialize --repo <folder of feature_store.yaml>", soft_wrap=True)


@app.command()
def gc(
    config: ConfigOption = DEFAULT_CONFIG,
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; without this, only list it.")] = False,
    grace_days: Annotated[float, typer.Option(help="Nothing touched within these days is removed.")] = 7.0,
    unpublished: Annotated[
        bool, typer.Option("--unpublished", help="Also finished runs that were never published.")
    ] = False,
    extracts: Annotated[bool, typer.Option("--extracts", help="Also finished extracts no run was made of.")] = False,
    keep_folders: Annotated[
        int | None, typer.Option(help="Published runs that keep model and extract, the newest; default: all.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List what nobody needs any more, and remove it with --yes.

    What is published, worked on, or needed by another run is never removed.

    Example: [bold]instructue runs gc --grace-days 30 --yes[/]
    """
    from instructue_feast.runs.collect import CollectOptions, find_garbage, remove_garbage

    store, project = _open(config)
    options = CollectOptions(
        grace=timedelta(days=grace_days),
        keep_publications=project.output.keep_publications,
        unpublished=unpublished,
        extracts=extracts,
        keep_folders=keep_folders,
    )
    garbage = find_garbage(store, options)
    if yes:
        garbage = remove_garbage(store, garbage, options)
    if as_json:
        print_json({"removed": yes, "garbage": [{**dataclasses.asdict(one), "name": one.name} for one in garbage]})
        return
    rows = [[one.kind, one.name, one.reason, one.size / 2**20, one.touched] for one in garbage]
    print_table("Removed" if yes else "Garbage", ["kind", "folder", "why", "MiB", "last touched"], rows)
    if garbage and not yes:
        out.print("Nothing was removed; --yes removes it.")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
