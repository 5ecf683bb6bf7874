"""`instructue materialize`: published embeddings into the online store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from instructue_feast.cli.console import JsonOption, print_json, print_table

RepoOption = Annotated[Path, typer.Option("--repo", help="Folder of feature_store.yaml.")]


def materialize(repo: RepoOption = Path(), as_json: JsonOption = False) -> None:
    """Apply the published feature views and write them to the online store.

    The same as `feast apply` and `feast materialize` over the window of the published run.

    Example: [bold]instructue materialize --repo feature_repo[/]
    """
    from instructue_feast.feature_store.materialize import apply_repo
    from instructue_feast.feature_store.materialize import materialize as materialize_repo

    apply_repo(repo)
    views = materialize_repo(repo)
    if as_json:
        print_json([{"view": view.name, "rows": view.rows, "seconds": view.seconds} for view in views])
        return
    print_table(
        f"In the online store of {repo.resolve()}",
        ["view", "rows", "seconds"],
        [[v.name, v.rows, v.seconds] for v in views],
    )
