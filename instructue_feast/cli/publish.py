"""`instructue publish`: move the pointer to a finished run."""

from __future__ import annotations

from typing import Annotated

import typer

from instructue_feast.cli.console import DEFAULT_CONFIG, ConfigOption, JsonOption, out, print_json, print_table
from instructue_feast.config import load_config


def publish(
    run_id: Annotated[str, typer.Argument(help="The finished run to publish.")],
    config: ConfigOption = DEFAULT_CONFIG,
    accept: Annotated[str | None, typer.Option(metavar="WHY", help="Publish even if a quality gate fails.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check a finished run, judge it by its quality gates, and make it the current one, in one atomic step.

    Example: [bold]instructue publish 20171001T000000-1a2b3c4d --config instructue.yaml[/]
    """
    import dataclasses

    from instructue_feast.runs.release import release
    from instructue_feast.runs.store import OutputStore

    project = load_config(config)
    store = OutputStore(project.output.path)
    publication, report = release(store, run_id, project, accept=accept)
    if as_json:
        print_json({**dataclasses.asdict(publication), "quality": report.to_json()})
        return
    rows = [[view.instruction, view.name, len(view.runs)] for view in publication.views]
    print_table(f"Publication {publication.id}", ["feature", "view", "runs"], rows)
    out.print("Next: instructue materialize --repo <folder of feature_store.yaml>", soft_wrap=True)
