"""`instructue extract`: raw tables to packed histories and a phrasebook."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from instructue_feast.cli.console import DEFAULT_CONFIG, ConfigOption, JsonOption, out, print_json, print_table
from instructue_feast.cli.jobs import run_job
from instructue_feast.cli.moments import moments
from instructue_feast.config import load_config
from instructue_feast.errors import ConfigError

AsOfOption = Annotated[
    list[str] | None,
    typer.Option("--as-of", help="Events before it count; ISO 8601 with zone, or a date for midnight UTC; repeatable."),
]
AsOfListOption = Annotated[Path | None, typer.Option("--as-of-list", help="A file with one as_of in each line.")]
EveryOption = Annotated[str, typer.Option(help="Step of a series of as_ofs: 7d, 4w.")]
FromOption = Annotated[str | None, typer.Option("--from", help="First as_of of a series.")]
ToOption = Annotated[str | None, typer.Option("--to", help="Last possible as_of of the series.")]
CoresOption = Annotated[int | None, typer.Option(min=1, help="Local Spark cores; default: all.")]


def extract(
    as_of: AsOfOption = None,
    config: ConfigOption = DEFAULT_CONFIG,
    as_of_list: AsOfListOption = None,
    every: EveryOption = "7d",
    start: FromOption = None,
    end: ToOption = None,
    extract_id: Annotated[str | None, typer.Option(help="Id of the new extract.")] = None,
    cores: CoresOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run the Spark extraction only: canonical events, phrasebook and packed histories.

    Several as_ofs are extracted in one pass over the raw tables.

    Example: [bold]instructue extract --config instructue.yaml --as-of 2017-10-01T00:00:00Z[/]
    """
    project = load_config(config)
    as_ofs = [one.isoformat() for one in moments(start, end, every, as_of, as_of_list)]
    if not as_ofs:
        raise ConfigError("no as_of given", "pass --as-of 2017-10-01, or --from, --to and --every")
    arguments = ["--config", config]
    for one in as_ofs:
        arguments += ["--as-of", one]
    arguments += ["--extract-id", extract_id] if extract_id else []
    arguments += ["--cores", str(cores)] if cores else []
    result = run_job("instructue_spark.extract", arguments, log=log_file(project.output.path, "extract"), quiet=as_json)
    if as_json:
        print_json(result.value)
        return
    for manifest in result.value.get("extracts", [result.value]):
        print_counts(manifest)
        out.print(f"Extract {manifest['extract_id']}: embed it with `instructue backfill --extract`", soft_wrap=True)


def print_counts(manifest: dict[str, Any]) -> None:
    """Prints what became of the raw rows of every source."""
    columns = ["source", "read", "kept", "duplicate or superseded", "at or after as_of", "before window", "quarantined"]
    rows = []
    for name, counts in manifest["counts"].items():
        refused = ", ".join(f"{reason}: {count:,}" for reason, count in counts["quarantined"].items() if count) or "0"
        kept = [counts[key] for key in ("read", "kept", "duplicates", "at_or_after_as_of", "before_window")]
        rows.append([name, *kept, refused])
    print_table(f"Rows by source, as of {manifest['as_of']}", columns, rows)


def log_file(output_path: str, job: str) -> Path:
    """Where a job's log goes: beside its output when that is local, else below the current folder."""
    root = Path("instructue-logs") if "://" in output_path else Path(output_path) / "logs"
    return root / f"{job}.log"
