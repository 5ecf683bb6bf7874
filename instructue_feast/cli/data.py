"""`instructue data`: worked examples, each a folder of raw tables with a ready config and Feast repo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from instructue_feast.cli.console import JsonOption, out, print_json, print_table
from instructue_feast.cli.jobs import run_job

app = typer.Typer(help="Write a worked example: raw tables, instructue.yaml and a Feast repo.", no_args_is_help=True)

OutOption = Annotated[Path, typer.Option("--out", help="Folder to write; made if missing.")]


@app.command("complete-journey")
def complete_journey(
    folder: OutOption = Path("complete-journey"),
    households: Annotated[int | None, typer.Option(min=1, help="Households to keep; default: all 2,469.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Real purchases of 2,469 households in 2017 (84.51°, The Complete Journey), mapped to six sources.

    Example: [bold]instructue data complete-journey --out build/cj --households 500[/]
    """
    from instructue_feast.datasets.complete_journey import write_complete_journey

    summary = write_complete_journey(folder, households=households)
    rows = dict(summary.rows)
    if as_json:
        print_json({"folder": str(folder), "rows": rows})
        return
    print_table(f"The Complete Journey in {folder}", ["table", "rows"], [[name, count] for name, count in rows.items()])
    _next_steps(folder, summary.as_of)


@app.command()
def synthetic(
    folder: OutOption = Path("synthetic"),
    users: Annotated[int, typer.Option(min=1, help="How many users.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Same seed, same rows.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Six Alipay-like sources generated in Spark, with latent interests that are known. All of it is made up.

    Example: [bold]instructue data synthetic --out build/synthetic --users 10000 --seed 7[/]
    """
    from instructue_feast.datasets.project import write_project

    arguments = ["--out", str(folder), "--users", str(users), "--seed", str(seed)]
    result = run_job("instructue_spark.synthetic", arguments, log=folder / "logs" / "synthetic.log", quiet=as_json)
    write_project(folder, "synthetic")
    if as_json:
        print_json({"folder": str(folder), **result.value})
        return
    rows = result.value["rows"]
    print_table(f"Synthetic users in {folder}", ["table", "rows"], [[name, count] for name, count in rows.items()])
    _next_steps(folder, result.value["as_of"])


def _next_steps(folder: Path, as_of: str) -> None:
    out.print(f"Next: instructue backfill --config {folder}/instructue.yaml --as-of {as_of}", soft_wrap=True)
