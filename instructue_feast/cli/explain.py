"""`instructue explain`: which events move a user's embedding, instruction by instruction."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from instructue_feast.cli.console import DEFAULT_CONFIG, ConfigOption, JsonOption, err, out, print_json, print_table
from instructue_feast.cli.explain_view import event_rows, events_figure
from instructue_feast.cli.pictures import check_picture, save_picture
from instructue_feast.cli.project import Project, read_user, soft_tokens_of
from instructue_feast.errors import ConfigError
from instructue_feast.runs.manifest import parse_as_of

if TYPE_CHECKING:
    from instructue_feast.evaluation.extracts import Phrasebook
    from instructue_feast.history.pack import PackedHistory
    from instructue_feast.inference.embedder import UserEmbedder
    from instructue_feast.instructions import Instruction


class How(StrEnum):
    """How scores are computed."""

    gates = "gates"
    path = "path"
    leave_one_out = "leave_one_out"
    focus = "focus"


def explain(
    user: Annotated[str, typer.Option(help="Id of the user.")],
    instruction: Annotated[list[str], typer.Option(help="Instruction id; repeat to compare.")],
    config: ConfigOption = DEFAULT_CONFIG,
    model: Annotated[str | None, typer.Option(help="Folder of a trained model; default: the config's.")] = None,
    run_id: Annotated[str | None, typer.Option("--run", help="Explain the embeddings of this run.")] = None,
    as_of: Annotated[str | None, typer.Option(help="Moment of the history; default: the latest extract's.")] = None,
    answer: Annotated[str, typer.Option(help="Explain the cosine to this answer instead.")] = "",
    method: Annotated[How, typer.Option(help="leave_one_out is exact and slow.")] = How.gates,
    top: Annotated[int, typer.Option(min=1, help="Events to show of each instruction.")] = 12,
    picture: Annotated[Path | None, typer.Option(help="Draw the instructions side by side into this file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show which events of a user move the embedding, under one instruction or several side by side.

    A score is how far the embedding goes back when the event is left out: away from the same user without any event,
    or towards the answer that is named. Below zero, the event speaks against it.

    Example: [bold]instructue explain --user 1228 --instruction churn --instruction deals --picture why.png[/]
    """
    if run_id is not None and (model is not None or as_of is not None):
        raise ConfigError("--run brings its own model and as_of", "drop --model and --as-of")
    if picture is not None:
        check_picture(picture)
    import instructue_feast.inference.explain as explaining

    project = Project.open(config, model)
    instructions = project.config.registry().select(instruction)
    embedder, history, book = _open(project, user, instructions, run_id, as_of)
    target = None
    if answer:
        target = embedder.model.answer_embeddings([embedder.model.answer_ids(answer)])[0].detach().cpu().numpy()
    found = {
        one.id: explaining.explain(embedder, history, one, method=method.value, target=target)[0]
        for one in instructions
    }
    names = project.config.source_names
    rows = {name: event_rows(names, history, book, one, top) for name, one in found.items()}
    if picture is not None:
        save_picture(events_figure(rows, answer), picture)
        err.print(f"wrote {picture}", soft_wrap=True)
    if as_json:
        print_json({"user": user, "method": method.value, "answer": answer, "instructions": rows})
        return
    towards = escape(f"towards {answer!r}") if answer else "away from a user without events"
    for name, own in rows.items():
        title = f"{name}: {len(found[name].scores)} texts, score {towards}"
        columns = ["event", "source", "times", "last seen", "score", "share of focus"]
        cells = [[escape(row["text"]), row["source"], row["times"], row["last_seen"], f"{row['score']:+.4f}",
                  f"{row['focus']:.1%}"] for row in own]  # fmt: skip
        print_table(title, columns, cells)
    if not any(rows.values()):
        out.print("This user has no events in the window.")


def _open(
    project: Project, user: str, instructions: tuple[Instruction, ...], run_id: str | None, as_of: str | None
) -> tuple[UserEmbedder, PackedHistory, Phrasebook]:
    from instructue_feast.evaluation.extracts import latest_extract
    from instructue_feast.inference.embedder import UserEmbedder
    from instructue_feast.inference.from_run import check_run_model, open_embedder
    from instructue_feast.inference.soft_prompts import soft_prompts_of
    from instructue_feast.runs.store import OutputStore

    config = project.config
    if run_id is not None:
        store = OutputStore(config.output.path)
        embedder = open_embedder(store, run_id, dtype=config.model.dtype)
        manifest = check_run_model(store, run_id, config, embedder)
        return embedder, *read_user(config, manifest.extract_id, user)
    extract_id = project.extract(parse_as_of(as_of)) if as_of else latest_extract(config)
    history, book = read_user(config, extract_id, user)
    model = project.load_model()
    prompts = soft_prompts_of(config, instructions, model)
    return UserEmbedder(model, soft_tokens_of(model, book, history), soft_prompts=prompts), history, book
