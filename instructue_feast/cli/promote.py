"""`instructue promote` and `instructue drift`: from one embedding version to the next, with eyes open."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from instructue_feast.cli.console import DEFAULT_CONFIG, ConfigOption, JsonOption, out, print_json, print_table
from instructue_feast.cli.materialize import RepoOption
from instructue_feast.errors import ConfigError


def promote(
    view: Annotated[
        list[str] | None, typer.Option(help="View to serve; repeatable; default: all as published.")
    ] = None,
    back: Annotated[bool, typer.Option("--back", help="Return to what was served before the last promotion.")] = False,
    repo: RepoOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Move the feature service to other versions, once the online store serves them.

    With `feast: {promotion: manual}` in instructue.yaml, publishing and materializing prepare a new version beside the
    old one, and only this command moves what recommenders read.

    Example: [bold]instructue promote --view churn__1a2b3c4d --repo feature_repo[/]
    """
    from instructue_feast.feature_store.promote import promote as promote_repo

    if back and view:
        raise ConfigError("--back takes no views", "pass either")
    wanted = {one.rpartition("__")[0]: one for one in view} if view else None
    found = promote_repo(repo, wanted, back=back)
    if as_json:
        print_json({"moved": found.moved, "checked": found.checked})
    elif found.moved:
        rows = [[name, old, new, found.checked[name]] for name, (old, new) in found.moved.items()]
        print_table("The feature service moved", ["feature", "from", "to", "users looked up"], rows)
    else:
        out.print("The feature service is there already.")


def drift(
    instruction: Annotated[str, typer.Argument(help="Instruction id.")],
    first: Annotated[str | None, typer.Option("--from", help="View; default: the one before the current.")] = None,
    second: Annotated[str | None, typer.Option("--to", help="View; default: the current one.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Neighbours to compare.")] = 10,
    sample: Annotated[int, typer.Option(min=4, help="Users to compare.")] = 5_000,
    config: ConfigOption = DEFAULT_CONFIG,
    as_json: JsonOption = False,
) -> None:
    """Compare two published versions of an instruction: neighbours kept, and what no rotation explains.

    Example: [bold]instructue drift churn --config feature_repo/instructue.yaml[/]
    """
    from instructue_feast.config import load_config
    from instructue_feast.runs.drift import compare_versions
    from instructue_feast.runs.store import OutputStore
    from instructue_feast.runs.vectors import publication_of, published_view, read_view

    store = OutputStore(load_config(config).output.path)
    publication = publication_of(store)
    new = published_view(publication, second or instruction)
    others = [view.name for view in publication.views if view.instruction == instruction and view.name != new.name]
    if first is None and not others:
        raise ConfigError(f"instruction {instruction!r} has one published version", "publish a run of another model")
    old = published_view(publication, first or others[-1])
    found = compare_versions(read_view(store, publication, old), read_view(store, publication, new), k=k, sample=sample)
    if as_json:
        print_json(dataclasses.asdict(found))
        return
    rows = [
        [f"of the {k} nearest users stay", f"{found.neighbours_kept:.1%}"],
        ["by chance", f"{found.by_chance:.1%}"],
        ["cosine of a user's two vectors", f"{found.cosine_raw:+.3f}"],
        ["after the best rotation, other users", f"{found.cosine_aligned:+.3f}"],
        ["of it the lowest 5%", f"{found.cosine_aligned_p5:+.3f}"],
    ]
    print_table(f"{found.first} and {found.second}, {found.users:,} users", ["measure", "value"], rows)
