"""`instructue erase`: a user's right to be forgotten, with proof."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from instructue_feast.cli.console import JsonOption, err, out, print_json, print_table
from instructue_feast.cli.materialize import RepoOption
from instructue_feast.errors import ConfigError


def erase(
    user: Annotated[list[str] | None, typer.Option(help="User id; repeatable.")] = None,
    users_file: Annotated[Path | None, typer.Option(help="File with one user id per line.")] = None,
    sweep: Annotated[bool, typer.Option(help="Everybody ever erased, by hash; after restoring a backup.")] = False,
    online: Annotated[bool, typer.Option(help="Also erase from the online store.")] = True,
    repo: RepoOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Erase users from the online store, extracts, runs, publications, UserQA and indexes, and prove it.

    A salted hash stays, so that no later backfill brings them back; no id is printed or stored. Run it again when it
    was interrupted. Exits with 9 when the reading afterwards still finds somebody.

    Example: [bold]instructue erase --user 1228 --repo feature_repo[/]
    """
    from instructue_feast.errors import StorageError
    from instructue_feast.feature_store.erase import erase_users

    ids = [*(user or []), *(_read(users_file) if users_file else [])]
    if bool(ids) == sweep:
        raise ConfigError(
            "--sweep takes no users" if sweep else "no user to erase", "pass --user or --users-file, or --sweep alone"
        )
    proof = erase_users(repo, ids, online=online)
    if as_json:
        print_json({**dataclasses.asdict(proof), "absent": proof.absent})
    else:
        rows = [["online store", "left alone" if proof.online_rows is None else proof.online_rows]]
        rows += [[area, count] for area, count in sorted(proof.files.rows.items())]
        rows += [["search indexes dropped", len(proof.files.indexes)]]
        print_table(f"Erased users: {proof.users or 'sweep'}", ["where", "rows removed"], rows)
        found = proof.found_in_files
        out.print(
            f"Read again: {found.files:,} files with {found.rows:,} rows"
            + (f", {proof.found_online.keys:,} online keys" if proof.found_online else ", not the online store")
            + f". Found {found.erased + (proof.found_online.erased if proof.found_online else 0)}. "
            f"{proof.files.others:,} rows of other users are as before."
        )
    if not proof.absent:
        err.print(f"The erasure is not complete: {_what_is_left(proof.found_in_files.unfinished)}.", soft_wrap=True)
        raise typer.Exit(StorageError.exit_code)


def _what_is_left(unfinished: list[str]) -> str:
    if unfinished:
        return (
            f"runs {', '.join(unfinished)} are not finished and may still be written; finish them, or remove them with "
            "`instructue runs gc`, and erase again"
        )
    return "somebody is still there; does another process write?"


def _read(file: Path) -> list[str]:
    try:
        return [line for line in (one.strip() for one in file.read_text(encoding="utf-8").splitlines()) if line]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {type(error).__name__}", "pass a UTF-8 file, one id per line") from None
