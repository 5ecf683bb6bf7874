"""`instructue backfill`: one run, from raw tables to published embeddings."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from instructue_feast.cli.console import DEFAULT_CONFIG, ConfigOption, JsonOption, out, print_json, print_table
from instructue_feast.cli.extract import AsOfOption, CoresOption, log_file, print_counts
from instructue_feast.cli.jobs import JobResult, run_job
from instructue_feast.config import load_config
from instructue_feast.runs.manifest import parse_as_of


def backfill(
    as_of: AsOfOption,
    config: ConfigOption = DEFAULT_CONFIG,
    instruction: Annotated[list[str] | None, typer.Option(help="Instruction id; repeatable; default: all.")] = None,
    run_id: Annotated[str | None, typer.Option(help="Id of the new run.")] = None,
    extract_id: Annotated[str | None, typer.Option("--extract", help="Embed this finished extract.")] = None,
    publish: Annotated[bool, typer.Option(help="Move the pointer to the run at the end.")] = True,
    allow_leakage: Annotated[bool, typer.Option("--allow-leakage", help="Embed an as_of seen in training.")] = False,
    cores: CoresOption = None,
    as_json: JsonOption = False,
) -> None:
    """Extract, encode new texts, embed every user for every instruction, and publish the run.

    Example: [bold]instructue backfill --config instructue.yaml --as-of 2017-10-01T00:00:00Z[/]
    """
    result = run_backfill_job(
        config, as_of, instructions=instruction, run_id=run_id, extract_id=extract_id, publish=publish,
        allow_leakage=allow_leakage, cores=cores, quiet=as_json,
    )  # fmt: skip
    if as_json:
        print_json(result.value | {"stages": [vars_of(stage) for stage in result.stages]})
        return
    print_counts(result.value["extract"])
    print_run(result.value["run"], result)
    out.print("Next: instructue materialize --repo <folder of feature_store.yaml>", soft_wrap=True)


def run_backfill_job(
    config: str,
    as_of: str,
    *,
    instructions: list[str] | None = None,
    run_id: str | None = None,
    extract_id: str | None = None,
    publish: bool = True,
    allow_leakage: bool = False,
    cores: int | None = None,
    quiet: bool = False,
) -> JobResult:
    """Checks what can be checked before Spark starts, then runs the job."""
    project = load_config(config)
    parse_as_of(as_of)
    project.registry().select(instructions)
    arguments = ["--config", config, "--as-of", as_of]
    for name in instructions or ():
        arguments += ["--instruction", name]
    arguments += ["--run-id", run_id] if run_id else []
    arguments += ["--extract", extract_id] if extract_id else []
    arguments += [] if publish else ["--no-publish"]
    arguments += ["--allow-leakage"] if allow_leakage else []
    arguments += ["--cores", str(cores)] if cores else []
    return run_job("instructue_spark.backfill", arguments, log=log_file(project.output.path, "backfill"), quiet=quiet)


def print_run(run: dict[str, Any], result: JobResult) -> None:
    """Prints a run: its size, its speed, its views."""
    embed = next(stage.seconds for stage in result.stages if stage.name == "embed")
    print_table(
        f"Run {run['run_id']}",
        ["users", "instructions", "dimensions", "texts encoded", "of texts", "tokens", "users/s", "tokens/s"],
        [
            [
                run["users"], len(run["instructions"]), run["embedding_dim"], run["texts_encoded"],
                run["distinct_texts"], run["tokens"], run["users"] / embed, run["tokens"] / embed,
            ]
        ],
    )  # fmt: skip
    views = [[one["id"], f"{one['id']}__{one['embedding_version'][:8]}", one["text"]] for one in run["instructions"]]
    print_table("Feature views", ["feature", "view", "instruction"], views)
    if not run["trained"]:
        out.print("[yellow]The adapters and heads are seeded but untrained: good for plumbing, not for quality.[/]")


def vars_of(stage: Any) -> dict[str, Any]:
    """A stage as JSON-ready values."""
    return {"name": stage.name, "seconds": stage.seconds, "rows_in": stage.rows_in, "rows_out": stage.rows_out}
