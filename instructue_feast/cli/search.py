"""`instructue similar`, `target`, `recommend`, `index` and `items`: search by embedding."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from instructue_feast.cli.console import JsonOption, out, print_json, print_table
from instructue_feast.cli.materialize import RepoOption
from instructue_feast.errors import ConfigError, DataError

if TYPE_CHECKING:
    from instructue_feast.feature_store.search import Hits

InstructionOption = Annotated[str, typer.Option(help="Instruction id.")]
KOption = Annotated[int, typer.Option("-k", min=1, help="How many.")]
ApproximateOption = Annotated[bool, typer.Option("--approximate", help="Ask the index of `instructue index`.")]


def similar(
    user: Annotated[str, typer.Argument(help="User id.")],
    instruction: InstructionOption,
    k: KOption = 10,
    approximate: ApproximateOption = False,
    repo: RepoOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Find the users most like one, under an instruction.

    Example: [bold]instructue similar 1228 --instruction next_basket --repo feature_repo[/]
    """
    from instructue_feast.feature_store.search import UserSearch

    _show("Like this user", "user", UserSearch(repo).similar(user, instruction, k, exact=not approximate), as_json)


def target(
    audience: Annotated[str, typer.Argument(help="The audience in words, as an answer would put it.")],
    instruction: InstructionOption,
    k: KOption = 10,
    approximate: ApproximateOption = False,
    repo: RepoOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Find the users a description fits best.

    Example: [bold]instructue target "This shopper buys organic baby food." --instruction next_basket -k 500[/]
    """
    from instructue_feast.feature_store.search import UserSearch

    _show("The audience", "user", UserSearch(repo).target(audience, instruction, k, exact=not approximate), as_json)


def recommend(
    user: Annotated[str, typer.Argument(help="User id.")],
    instruction: InstructionOption,
    k: KOption = 10,
    item: Annotated[list[str] | None, typer.Option(help="Choose among these item ids; repeatable.")] = None,
    repo: RepoOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Find the items that fit a user best, among those of `instructue items`.

    Example: [bold]instructue recommend 1228 --instruction next_basket --repo feature_repo[/]
    """
    from instructue_feast.feature_store.search import UserSearch

    _show("For this user", "item", UserSearch(repo).recommend(user, instruction, k, items=item), as_json)


def index(
    instruction: Annotated[list[str] | None, typer.Option(help="Instruction id; repeatable; default: all.")] = None,
    repo: RepoOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Build the approximate index (HNSW) of the served view of each instruction.

    Example: [bold]instructue index --repo feature_repo[/]
    """
    from instructue_feast.feature_store.search import build_indexes

    built = build_indexes(repo, instruction)
    if as_json:
        print_json([{"view": view, "users": users} for view, users in built.items()])
    else:
        print_table("Indexes", ["view", "users"], [[view, users] for view, users in built.items()])


def items(
    file: Annotated[Path, typer.Argument(help="Parquet or CSV with the columns item_id and text.")],
    repo: RepoOption = Path(),
    as_json: JsonOption = False,
) -> None:
    """Embed items through the answer tower of the published model; `instructue materialize` serves them.

    Example: [bold]instructue items products.csv --repo feature_repo[/]
    """
    from instructue_feast.feature_store.search import embed_items

    found = embed_items(repo, *_read_items(file))
    if as_json:
        print_json({"view": found.view, "items": found.items, "model_version": found.model_version})
    else:
        out.print(f"{found.items:,} items in {found.view}. Next: instructue materialize")


def _show(title: str, kind: str, hits: Hits, as_json: bool) -> None:
    pairs = [(one, float(score)) for one, score in zip(hits.ids, hits.scores, strict=True)]
    if as_json:
        print_json({"view": hits.view, "hits": [{f"{kind}_id": one, "score": round(score, 6)} for one, score in pairs]})
        return
    rows = [[place, escape(one), f"{score:+.4f}"] for place, (one, score) in enumerate(pairs, 1)]
    print_table(f"{title} ({hits.view})", ["", kind, "cosine"], rows)


def _read_items(file: Path) -> tuple[list[str], list[str]]:
    import pyarrow as pa
    import pyarrow.csv as pc
    import pyarrow.parquet as pq

    try:
        if file.suffix == ".csv":
            text = pc.ConvertOptions(column_types={"item_id": pa.string(), "text": pa.string()})
            table = pc.read_csv(file, convert_options=text)
        else:
            table = pq.read_table(file)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(
            f"cannot read {file}: {type(error).__name__}", "pass a Parquet file or a .csv with a header"
        ) from None
    missing = [name for name in ("item_id", "text") if name not in table.schema.names]
    if missing:
        raise DataError(
            f"{file} has no column {missing[0]}, only {table.schema.names}", "name the columns item_id, text"
        )
    ids, texts = table.column("item_id").cast(pa.string()).to_pylist(), table.column("text").to_pylist()
    empty = [row for row, one in enumerate(zip(ids, texts, strict=True)) if None in one]
    if empty:
        raise DataError(f"{file}: item_id or text is null in row {empty[0]}", "give every item both")
    return ids, texts
