"""`instructue backfill` with several as_ofs: a run each, out of one pass over the raw tables."""

from __future__ import annotations

from instructue_feast.cli.console import out, print_json, print_table
from instructue_feast.cli.extract import log_file
from instructue_feast.cli.jobs import run_job
from instructue_feast.config import load_config


def run_series(
    config: str,
    as_ofs: list[str],
    *,
    instructions: list[str] | None,
    publish: bool,
    allow_leakage: bool,
    cores: int | None,
    as_json: bool,
) -> None:
    """Runs the job and prints its runs."""
    project = load_config(config)
    project.registry().select(instructions)
    arguments = ["--config", config]
    for one in as_ofs:
        arguments += ["--as-of", one]
    for name in instructions or ():
        arguments += ["--instruction", name]
    arguments += [] if publish else ["--no-publish"]
    arguments += ["--allow-leakage"] if allow_leakage else []
    arguments += ["--cores", str(cores)] if cores else []
    log = log_file(project.output.path, "backfill")
    result = run_job("instructue_spark.backfill_series", arguments, log=log, quiet=as_json)
    if as_json:
        print_json(result.value)
        return
    runs = result.value["runs"]
    columns = ["as_of", "run", "users", "tokens", "texts encoded"]
    rows = [[run[key] for key in ("as_of", "run_id", "users", "tokens", "texts_encoded")] for run in runs]
    print_table(f"{len(runs)} runs", columns, rows)
    out.print("Next: join them with `store.get_historical_features`", soft_wrap=True)
