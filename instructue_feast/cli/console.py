"""Output of the command line: tables for people, one JSON document for machines, errors on standard error."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from instructue_feast.errors import InstructueError

PIPED_WIDTH = 120
"""Columns when the output is no terminal; rich would take 80 and cut words."""

out = Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)
err = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else PIPED_WIDTH)

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]
ConfigOption = Annotated[str, typer.Option("--config", "-c", help="The project's instructue.yaml.")]
DEFAULT_CONFIG = "instructue.yaml"


def print_json(value: Any) -> None:
    """Prints one JSON document, and nothing else, on standard output."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def print_table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """Prints a table; numbers are right-aligned with thousands separators."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for position, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[position], int | float) for row in rows)
        table.add_column(column, justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    out.print(table)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.2f}" if isinstance(value, float) else str(value)


def print_error(error: InstructueError) -> None:
    """Prints what happened and how to mend it, on standard error."""
    err.print("[bold red]Error:[/] ", end="")
    err.print(error.message, markup=False, soft_wrap=True)
    if error.hint:
        err.print("[bold]Hint:[/]  ", end="")
        err.print(error.hint, markup=False, soft_wrap=True)
