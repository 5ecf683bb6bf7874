"""`instructue check`: is what is served what was computed? For CI and for operators."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from instructue_feast.cli.console import JsonOption, err, print_json, print_table
from instructue_feast.cli.materialize import RepoOption
from instructue_feast.errors import QualityError


def check(
    repo: RepoOption = Path(),
    sample: Annotated[int, typer.Option(min=1, help="Users of each view to compare.")] = 256,
    encode: Annotated[int, typer.Option(min=0, help="Users of each view to embed again; 0 for none.")] = 4,
    min_coverage: Annotated[float, typer.Option(min=0, max=1, help="Share of users that must be online.")] = 1.0,
    max_age_days: Annotated[float | None, typer.Option(min=0, help="How old the newest run may be.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check what is served: version, coverage, offline = online = direct encode, staleness and ttl.

    Exits with 11 when a check fails. Users are sampled from the published run; none is named.

    Example: [bold]instructue check --repo feature_repo --max-age-days 2[/]
    """
    from instructue_feast.feature_store.check import CheckSettings, check_repo

    checks = check_repo(
        repo,
        CheckSettings(
            sample=sample,
            encode=encode,
            min_coverage=min_coverage,
            max_age=None if max_age_days is None else timedelta(days=max_age_days),
        ),
    )
    failed = [one for one in checks if one.ok is False]
    if as_json:
        print_json({"ok": not failed, "checks": [dataclasses.asdict(one) for one in checks]})
    else:
        words = {True: "[green]ok[/]", False: "[bold red]failed[/]", None: "not asked"}
        rows = [[words[one.ok], one.name, one.view, escape(one.detail)] for one in checks]
        print_table("Checks", ["", "check", "view", "found"], rows)
    if failed:
        err.print(f"{len(failed)} of {len(checks)} checks failed")
        raise typer.Exit(QualityError.exit_code)
