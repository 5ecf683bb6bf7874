"""`instructue backfill`: one run, from raw tables to published embeddings."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from instructue_feast.cli.backfill_series import run_series
from instructue_feast.cli.console import DEFAULT_CONFIG, ConfigOption, JsonOption, out, print_json, print_table
from instructue_feast.cli.extract import (
    AsOfListOption,
    AsOfOption,
    CoresOption,
    EveryOption,
    FromOption,
    ToOption,
    log_file,
    print_counts,
)
from instructue_feast.cli.jobs import JobResult, run_job
from instructue_feast.cli.moments import moments
from instructue_feast.config import load_config
from instructue_feast.errors import ConfigError
from instructue_feast.runs.manifest import parse_as_of


def backfill(
    as_of: AsOfOption = None,
    config: ConfigOption = DEFAULT_CONFIG,
    as_of_list: AsOfListOption = None,
    every: EveryOption = "7d",
    start: FromOption = None,
    end: ToOption = None,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN", help="Finish this run, or `latest` for the last unfinished one.")
    ] = None,
    incremental: Annotated[
        bool, typer.Option("--incremental", help="Embed only users who changed since the published run.")
    ] = False,
    accept: Annotated[str | None, typer.Option(metavar="WHY", help="Publish even if a quality gate fails.")] = None,
    instruction: Annotated[list[str] | None, typer.Option(help="Instruction id; repeatable; default: all.")] = None,
    run_id: Annotated[str | None, typer.Option(help="Id of the run; an unfinished one goes on.")] = None,
    extract_id: Annotated[str | None, typer.Option("--extract", help="Embed this finished extract.")] = None,
    publish: Annotated[bool, typer.Option(help="Move the pointer to the run at the end.")] = True,
    allow_leakage: Annotated[bool, typer.Option("--allow-leakage", help="Embed an as_of seen in training.")] = False,
    cores: CoresOption = None,
    as_json: JsonOption = False,
) -> None:
    """Extract, encode new texts, embed every user for every instruction, and publish the run.

    A backfill that was stopped or killed goes on with `--resume`: nothing that is finished is computed again.
    With several as_ofs, the raw tables are read once and each as_of becomes a run: what a training set is joined with.

    Example: [bold]instructue backfill --config instructue.yaml --as-of 2017-10-01T00:00:00Z[/]
    """
    as_ofs = [one.isoformat() for one in moments(start, end, every, as_of, as_of_list)]
    if len(as_ofs) > 1:
        if run_id or extract_id or resume or incremental or accept:
            raise ConfigError(
                "--run-id, --extract, --resume, --incremental and --accept are for one as_of",
                "leave them out, or pass one --as-of",
            )
        run_series(
            config, as_ofs, instructions=instruction, publish=publish, allow_leakage=allow_leakage, cores=cores,
            as_json=as_json,
        )  # fmt: skip
        return
    result = run_backfill_job(
        config, as_ofs[0] if as_ofs else None, instructions=instruction, run_id=run_id, extract_id=extract_id,
        publish=publish, allow_leakage=allow_leakage, resume=resume, incremental=incremental, accept=accept,
        cores=cores, quiet=as_json,
    )  # fmt: skip
    if as_json:
        print_json(result.value | {"stages": [vars_of(stage) for stage in result.stages]})
        return
    if result.value["extract"] is not None:
        print_counts(result.value["extract"])
    print_run(result.value["run"], result)
    out.print("Next: instructue materialize --repo <folder of feature_store.yaml>", soft_wrap=True)


def run_backfill_job(
    config: str,
    as_of: str | None,
    *,
    instructions: list[str] | None = None,
    run_id: str | None = None,
    extract_id: str | None = None,
    publish: bool = True,
    allow_leakage: bool = False,
    resume: str | None = None,
    incremental: bool = False,
    accept: str | None = None,
    cores: int | None = None,
    quiet: bool = False,
) -> JobResult:
    """Checks what can be checked before Spark starts, then runs the job."""
    project = load_config(config)
    if as_of is not None:
        parse_as_of(as_of)
    elif resume is None:
        raise ConfigError("neither --as-of nor --resume is given", "say up to when events count, or what to finish")
    if resume is not None and run_id is not None:
        raise ConfigError("--resume and --run-id name two runs", "leave one of them out")
    project.registry().select(instructions)
    arguments = ["--config", config]
    arguments += ["--as-of", as_of] if as_of else []
    arguments += ["--resume", resume] if resume else []
    arguments += ["--incremental"] if incremental else []
    arguments += ["--accept", accept] if accept else []
    for name in instructions or ():
        arguments += ["--instruction", name]
    arguments += ["--run-id", run_id] if run_id else []
    arguments += ["--extract", extract_id] if extract_id else []
    arguments += [] if publish else ["--no-publish"]
    arguments += ["--allow-leakage"] if allow_leakage else []
    arguments += ["--cores", str(cores)] if cores else []
    return run_job("instructue_spark.backfill", arguments, log=log_file(project.output.path, "backfill"), quiet=quiet)


def print_run(run: dict[str, Any], result: JobResult) -> None:
    """Prints a run: its size, its speed, its views, and what was found done."""
    embed = next((stage for stage in result.stages if stage.name == "embed"), None)
    work = result.value.get("work", {})
    kept = work.get("buckets_kept", 0)
    columns = ["users", "carried", "instructions", "dimensions", "texts encoded", "of texts", "tokens"]
    row = [
        run["users"], run["carried"], len(run["instructions"]), run["embedding_dim"], run["texts_encoded"],
        run["distinct_texts"], run["tokens"],
    ]  # fmt: skip
    if embed is not None and not kept:
        columns += ["users/s", "tokens/s"]
        row += [run["users"] / embed.seconds, run["tokens"] / embed.seconds]
    print_table(f"Run {run['run_id']}", columns, [row])
    if work.get("full_reason"):
        out.print(f"[yellow]All users were embedded, because {work['full_reason']}.[/]", soft_wrap=True)
    if kept:
        out.print(f"Attempt {work['attempt']}: {kept:,} buckets were done, {work['buckets_embedded']:,} were computed.")
    views = [[one["id"], f"{one['id']}__{one['embedding_version'][:8]}", one["text"]] for one in run["instructions"]]
    print_table("Feature views", ["feature", "view", "instruction"], views)
    if not run["trained"]:
        out.print("[yellow]The adapters and heads are seeded but untrained: good for plumbing, not for quality.[/]")


def vars_of(stage: Any) -> dict[str, Any]:
    """A stage as JSON-ready values."""
    return {"name": stage.name, "seconds": stage.seconds, "rows_in": stage.rows_in, "rows_out": stage.rows_out}
