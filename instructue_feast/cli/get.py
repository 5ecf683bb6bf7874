"""`instructue get`: what a recommender would read."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from instructue_feast.cli.console import JsonOption, print_json, print_table
from instructue_feast.cli.materialize import RepoOption


def get(
    users: Annotated[list[str], typer.Argument(help="User ids.")],
    repo: RepoOption = ".",  # type: ignore[assignment]
    instruction: Annotated[list[str] | None, typer.Option(help="Instruction id; repeatable; default: all.")] = None,
    service: Annotated[str, typer.Option(help="Name of the feature service.")] = "user_embeddings",
    as_json: JsonOption = False,
) -> None:
    """Look users up in the online store: one vector per instruction.

    Users that are not in the store are shown as such and change nothing about the exit code.

    Example: [bold]instructue get 1001 1002 --repo feature_repo --instruction churn[/]
    """
    from instructue_feast.feature_store.lookup import UserEmbeddings

    found = UserEmbeddings(repo, service=service).get(users, instruction)
    if as_json:
        print_json(
            [
                {
                    "user_id": user,
                    "found": {name: bool(found.found[name][row]) for name in found.vectors},
                    "as_of": {name: str(found.as_of[name][row]) for name in found.vectors},
                    "embeddings": {
                        name: vectors[row].tolist() if found.found[name][row] else None
                        for name, vectors in found.vectors.items()
                    },
                }
                for row, user in enumerate(users)
            ]
        )
        return
    rows = []
    for row, user in enumerate(users):
        for name, vectors in found.vectors.items():
            known = bool(found.found[name][row])
            head = ", ".join(f"{value:+.3f}" for value in vectors[row][:6]) + ", …" if known else "not in the store"
            rows.append(
                [
                    escape(user),
                    name,
                    str(found.as_of[name][row])[:10] if known else "",
                    vectors.shape[1] if known else "",
                    head,
                ]
            )
    print_table("User embeddings", ["user", "instruction", "as of", "dimensions", "vector"], rows)
