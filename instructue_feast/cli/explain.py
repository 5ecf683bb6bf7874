"""`instructue explain`: which events move a user's embedding, instruction by instruction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from instructue_feast.cli.console import DEFAULT_CONFIG, ConfigOption, JsonOption, err, out, print_json, print_table
from instructue_feast.cli.project import Project, read_user, soft_tokens_of
from instructue_feast.errors import ConfigError, MissingDependencyError, StorageError
from instructue_feast.history.buckets import AGE_EDGES_DAYS, COUNT_EDGES
from instructue_feast.runs.manifest import parse_as_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from instructue_feast.evaluation.extracts import Phrasebook
    from instructue_feast.history.pack import PackedHistory
    from instructue_feast.inference.embedder import UserEmbedder
    from instructue_feast.inference.explain import Attribution
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
        _save(rows, picture, answer)
    if as_json:
        print_json({"user": user, "method": method.value, "answer": answer, "instructions": rows})
        return
    towards = f"towards {answer!r}" if answer else "away from a user without events"
    for name, own in rows.items():
        title = f"{name}: {len(found[name].scores)} texts, score {towards}"
        columns = ["event", "source", "times", "last seen", "score", "share of focus"]
        cells = [[row["text"], row["source"], row["times"], row["last_seen"], f"{row['score']:+.4f}",
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
    from instructue_feast.inference.soft_prompts import soft_prompts_of, vectors_of
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
    prompts = vectors_of(soft_prompts_of(config, instructions, model))
    return UserEmbedder(model, soft_tokens_of(model, book, history), soft_prompts=prompts), history, book


def event_rows(
    source_names: Sequence[str], history: PackedHistory, book: Phrasebook, found: Attribution, top: int
) -> list[dict[str, Any]]:
    """The texts of one user that move the embedding most, either way, in words.

    Args:
        source_names: The project's sources.
        history: Packed history of the user alone.
        book: Where its texts are.
        found: The user's attribution.
        top: How many texts.
    """
    texts = [book.texts[row] for row in book.rows(found.text_ids)]
    order = sorted(range(len(texts)), key=lambda place: -abs(float(found.scores[place])))[:top]
    return [
        {
            "text": texts[place],
            "source": source_names[history.source_index[place]],
            "times": count_words(int(history.count_bucket[place])),
            "last_seen": age_words(int(history.age_bucket[place])),
            "score": float(found.scores[place]),
            "focus": float(found.focus_weights[place]),
        }
        for place in order
    ]


def count_words(bucket: int) -> str:
    """A count bucket in words.

    >>> [count_words(bucket) for bucket in (0, 2, 11)]
    ['1', '3-4', '1000+']
    """
    return _range((1, *COUNT_EDGES), bucket)


def age_words(bucket: int) -> str:
    """An age bucket in words.

    >>> [age_words(bucket) for bucket in (0, 1, 4, 14)]
    ['today', '1 day ago', '5-6 days ago', '365+ days ago']
    """
    if bucket == 0:
        return "today"
    words = _range((0, *AGE_EDGES_DAYS), bucket)
    return f"{words} {'day' if words == '1' else 'days'} ago"


def _range(edges: tuple[int, ...], bucket: int) -> str:
    first = edges[bucket]
    if bucket + 1 == len(edges):
        return f"{first}+"
    last = edges[bucket + 1] - 1
    return str(first) if first == last else f"{first}-{last}"


def events_figure(rows: Mapping[str, list[dict[str, Any]]], answer: str = "") -> Figure:
    """Bars of scores, one panel per instruction.

    Args:
        rows: `event_rows` by instruction.
        answer: The answer the scores speak for, if one was named.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError("a picture needs matplotlib", "pip install 'instructue-feast[demo]'") from None
    height = max(2.5, 0.4 * max(map(len, rows.values()), default=1) + 1.2)
    figure = Figure(figsize=(7.5 * len(rows), height), layout="constrained")
    for axis, (name, own) in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows.items(), strict=True):
        scores = [row["score"] for row in own][::-1]
        colours = ["#2166ac" if score >= 0 else "#b2182b" for score in scores]
        axis.barh(range(len(own)), scores, color=colours)
        labels = [f"{row['text'][:48]} ({row['source']}, {row['times']}x)" for row in own][::-1]
        axis.set_yticks(range(len(own)), labels, fontsize=9)
        axis.axvline(0, color="#555555", linewidth=0.8)
        axis.set_title(name)
        axis.locator_params(axis="x", nbins=5)
        axis.set_xlabel(f"score towards {answer!r}" if answer else "score: what leaving it out takes back")
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
    return figure


def _save(rows: Mapping[str, list[dict[str, Any]]], file: Path, answer: str) -> None:
    figure = events_figure(rows, answer)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=120)
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot write {file}: {error}", "name a .png, .svg or .pdf file") from None
    err.print(f"wrote {file}", soft_wrap=True)
