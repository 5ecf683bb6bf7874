"""Assembles the `instructue` command line and turns errors into messages and exit codes."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import typer

from instructue_feast import __version__
from instructue_feast.cli import (
    ablate,
    backfill,
    check,
    data,
    demo,
    doctor,
    embed,
    erase,
    explain,
    extract,
    get,
    materialize,
    models,
    plan,
    promote,
    publish,
    qa,
    runs,
    search,
    train,
    tune,
)
from instructue_feast.cli import eval as evaluation
from instructue_feast.cli.console import print_error
from instructue_feast.errors import InstructueError

app = typer.Typer(
    name="instructue",
    help="Instruction-conditioned user embeddings as Feast features: extract, backfill, publish, materialize, get.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(doctor.doctor)
app.add_typer(data.app, name="data")
app.add_typer(models.app, name="models")
app.command()(extract.extract)
app.command()(qa.qa)
app.command()(train.train)
app.command("tune-instruction")(tune.tune_instruction)
app.command("eval")(evaluation.evaluate)
app.command()(ablate.ablate)
app.command("plan")(plan.plan_command)
app.command()(backfill.backfill)
app.command()(publish.publish)
app.add_typer(runs.app, name="runs")
app.command()(materialize.materialize)
app.command()(get.get)
app.command()(embed.embed)
app.command()(check.check)
app.command()(erase.erase)
app.command()(search.similar)
app.command()(search.target)
app.command()(search.recommend)
app.command()(search.index)
app.command()(search.items)
app.command()(promote.promote)
app.command()(promote.drift)
app.command()(explain.explain)
app.command()(demo.demo)


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Assembles the options every command shares."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Exit codes: 0 done, 1 unexpected, 2 usage or config, 3 data, 4 leakage, 5 version mismatch, 6 unsafe artefact,
    7 conflict, 8 invalid embedding, 9 storage, 10 missing dependency, 11 a quality gate, 130 interrupted,
    143 a job was told to stop.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        app(arguments, standalone_mode=True)
    except InstructueError as error:
        if "--json" in arguments:
            document = {"type": type(error).__name__, "message": error.message, "hint": error.hint}
            typer.echo(json.dumps({"error": document}, indent=2, ensure_ascii=False))
        print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0


def run() -> None:
    """Entry point of the `instructue` script."""
    raise SystemExit(main())
