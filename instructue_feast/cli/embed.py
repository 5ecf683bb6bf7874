"""`instructue embed`: any instruction, answered from the online store."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from instructue_feast.cli.console import JsonOption, out, print_json, print_table
from instructue_feast.cli.materialize import RepoOption


def embed(
    users: Annotated[list[str], typer.Argument(help="User ids.")],
    instruction: Annotated[str, typer.Option(help="The instruction, in words.")],
    repo: RepoOption = ".",  # type: ignore[assignment]
    service: Annotated[str, typer.Option(help="Name of the feature service.")] = "user_embeddings",
    as_json: JsonOption = False,
) -> None:
    """Embed users under an instruction nobody planned for: packed history from the online store, one forward pass.

    Example: [bold]instructue embed 1001 1002 --instruction "Would this shopper try oat milk?" --repo feature_repo[/]
    """
    from instructue_feast.feature_store.lookup import UserEmbeddings

    found = UserEmbeddings(repo, service=service).embed(users, instruction)
    if as_json:
        print_json(
            {
                "instruction": instruction,
                "model_version": found.model_version,
                "tokens": found.tokens,
                "seconds": round(found.seconds, 4),
                "users": [
                    {
                        "user_id": user,
                        "found": bool(found.found[row]),
                        "as_of": str(found.as_of[row]),
                        "embedding": found.vectors[row].tolist() if found.found[row] else None,
                    }
                    for row, user in enumerate(users)
                ],
            }
        )
        return
    rows = []
    for row, user in enumerate(users):
        known = bool(found.found[row])
        head = ", ".join(f"{value:+.3f}" for value in found.vectors[row][:6]) + ", …" if known else "not in the store"
        rows.append([escape(user), str(found.as_of[row])[:10] if known else "", head])
    print_table("User embeddings", ["user", "as of", "vector"], rows)
    out.print(f"{found.tokens:,} prompt tokens in {found.seconds:.2f} s, model version {found.model_version[:8]}")
