"""The demo's `report.html`: stages, a user as the model sees it and why, users by instruction, quality of the model."""

from __future__ import annotations

import itertools
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from instructue_feast.cli.demo_quality import Quality
from instructue_feast.cli.explain_view import event_rows, events_figure
from instructue_feast.cli.jobs import JobResult, StageResult
from instructue_feast.cli.pictures import figure_class, inlined
from instructue_feast.config import InstructueConfig, load_config
from instructue_feast.evaluation.extracts import Phrasebook, read_extract
from instructue_feast.feature_store.lookup import UserEmbeddings
from instructue_feast.history.buckets import AGE_EDGES_DAYS, COUNT_EDGES
from instructue_feast.history.pack import PackedHistory
from instructue_feast.inference.embedder import UserEmbedder
from instructue_feast.inference.explain import explain
from instructue_feast.inference.from_run import check_run_model, open_embedder
from instructue_feast.runs.audit import vector_matrix
from instructue_feast.runs.reader import read_run
from instructue_feast.runs.store import OutputStore
from instructue_feast.template import bucket_labels

PARITY_USERS = 20
NEIGHBOURS = 5
WHY_EVENTS = 10
MIN_HEAD = 4
"""A user's favourite must stand in this many distinct texts, so that a single odd purchase does not count."""
_COLOURS = ("#1b6ca8", "#c8553d", "#4c956c", "#8d6a9f", "#b58900", "#5c6b73")


def write_report(
    folder: Path, job: JobResult, stages: list[StageResult], lookup: dict[str, Any], quality: Quality | None
) -> dict[str, Any]:
    """Writes `report.html` and checks online against direct encoding on the way.

    Args:
        folder: The demo's folder.
        job: The backfill.
        stages: All stages.
        lookup: What was measured of the online store.
        quality: What was measured of the model; None leaves the section out.

    Returns:
        `user`, the example user, and `parity` with `users` and `max_difference`.
    """
    import jinja2

    config = load_config(folder / "instructue.yaml")
    store = OutputStore(config.output.path)
    run, extract = job.value["run"], job.value["extract"]
    names = [one["id"] for one in run["instructions"]]
    table = read_run(store, run["run_id"])
    users = [str(user) for user in table.column("user_id").to_pylist()]
    vectors = {name: vector_matrix(table, name, "the run") for name in names}
    history, book = read_extract(config, extract["extract_id"])
    example = _typical_user(history)
    texts = dict(zip(book.text_ids.tolist(), book.texts, strict=True))
    source = files("instructue_feast.cli").joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    top = _favourite(history, texts)
    embedder = open_embedder(
        store, run["run_id"], dtype=config.model.dtype, max_batch_tokens=config.model.max_batch_tokens
    )
    check_run_model(store, run["run_id"], config, embedder)
    parity = _parity(embedder, config, names, history, folder)
    page = environment.from_string(source).render(
        run=run,
        extract=extract,
        stages=stages,
        total=sum(stage.seconds for stage in stages),
        lookup=lookup,
        parity=parity,
        user=history.user_ids[example],
        sections=_sections(config, history, example, texts),
        why=_why(embedder, config, names, history.take([example]), book),
        quality=quality,
        scatters=[(one, _scatter(vectors[one["id"]], users, top)) for one in run["instructions"]],
        neighbours=[
            (one, _neighbours(vectors[one["id"]], users, history.user_ids[example], top)) for one in run["instructions"]
        ],
    )
    (folder / "report.html").write_text(page, encoding="utf-8")
    return {"user": history.user_ids[example], "parity": parity}


def _typical_user(history: PackedHistory) -> int:
    """The user whose number of tokens is the upper quartile: enough to look at, not a whale."""
    order = np.lexsort((np.asarray(history.user_ids), history.num_tokens))
    return int(order[(3 * len(order)) // 4])


def _favourite(history: PackedHistory, texts: dict[int, str]) -> dict[str, str]:
    """What each user buys more of than others do: the head (up to the colon) of texts of the first source, by lift.

    The most frequent head would be groceries for nearly everybody.
    """
    heads = [
        Counter(
            texts[int(text)].split(":")[0]
            for text, source in zip(history.text_id[a:b], history.source_index[a:b], strict=True)
            if source == 0
        )
        for a, b in itertools.pairwise(history.offsets)
    ]
    everybody = sum(heads, Counter[str]())
    favourite = {}
    for user, own in zip(history.user_ids, heads, strict=True):
        often = [name for name, count in own.items() if count >= MIN_HEAD] or list(own)
        best = max(often, key=lambda name: (own[name] / everybody[name], name), default="nothing")
        favourite[user] = best
    return favourite


def _sections(
    config: InstructueConfig, history: PackedHistory, row: int, texts: dict[int, str]
) -> list[dict[str, Any]]:
    """The user's prompt, source by source: texts with how often and how long ago, newest first."""
    counts = (
        "once",
        *(_range(low, high, "×") for low, high in zip(COUNT_EDGES, (*COUNT_EDGES[1:], None), strict=True)),
    )
    ages = bucket_labels(tuple(float(edge) for edge in AGE_EDGES_DAYS))
    span = slice(int(history.offsets[row]), int(history.offsets[row + 1]))
    sections = []
    for index, name in enumerate(config.source_names):
        chosen = np.flatnonzero(history.source_index[span] == index) + span.start
        tabular = name in config.tabular_sources
        tokens = [
            {
                "text": texts[int(history.text_id[token])],
                "count": "" if tabular else counts[history.count_bucket[token]],
                "age": "" if tabular else f"{ages[history.age_bucket[token]]} d ago",
            }
            for token in reversed(chosen)
        ]
        numeric = [
            {"text": f"{column.replace('_', ' ')}: {value:,.4g}", "count": "", "age": group}
            for (source, group, column), value in zip(config.numeric_columns, history.tabular_numeric[row], strict=True)
            if source == name and not np.isnan(value)
        ]
        sections.append({"name": name, "events": int(history.num_events[row, index]), "tokens": tokens + numeric})
    return sections


def _range(low: int, high: int | None, sign: str) -> str:
    if high is None:
        return f"{low}+{sign}"
    return f"{low}{sign}" if high == low + 1 else f"{low}-{high - 1}{sign}"


def _scatter(vectors: npt.NDArray[np.float32], users: list[str], favourite: dict[str, str]) -> str:
    """Two principal components of the users' embeddings, coloured by what they buy most; PNG as base64."""
    centred = vectors - vectors.mean(axis=0)
    _, scale, basis = np.linalg.svd(centred, full_matrices=False)
    points = centred @ basis[:2].T
    explained = 100 * (scale[:2] ** 2).sum() / max(float((scale**2).sum()), 1e-12)
    groups = [favourite[user] for user in users]
    shown = [name for name, _ in Counter(groups).most_common(len(_COLOURS) - 1)]
    figure = figure_class()(figsize=(4.6, 4.0), layout="tight")
    axes = figure.subplots()
    for name, colour in zip([*shown, None], _COLOURS, strict=False):
        rows = [row for row, group in enumerate(groups) if (group == name if name else group not in shown)]
        if rows:
            axes.scatter(points[rows, 0], points[rows, 1], s=9, alpha=0.7, color=colour, label=name or "other")
    axes.set_title(f"first two components, {explained:.0f} % of the variance", fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])
    for text in axes.legend(fontsize=7, frameon=False, loc="best").get_texts():
        text.set_parse_math(False)  # words of the shop, not formulas
    return inlined(figure)


def _neighbours(
    vectors: npt.NDArray[np.float32], users: list[str], user: str, favourite: dict[str, str]
) -> list[dict[str, Any]]:
    """The users with the highest cosine, exact."""
    cosine = vectors @ vectors[users.index(user)]
    order = [row for row in np.argsort(-cosine, kind="stable") if users[row] != user][:NEIGHBOURS]
    return [{"user": users[row], "cosine": float(cosine[row]), "favourite": favourite[users[row]]} for row in order]


def _parity(
    embedder: UserEmbedder, config: InstructueConfig, names: list[str], history: PackedHistory, repo: Path
) -> dict[str, Any]:
    """Largest difference between what the online store serves and what the model says now, on a sample."""
    step = max(1, len(history) // PARITY_USERS)
    rows = list(range(0, len(history), step))[:PARITY_USERS]
    sample = history.take(rows)
    direct = embedder.encode(sample, config.registry().select(names))
    online = UserEmbeddings(repo).get(sample.user_ids, names)
    served = np.stack([online.vectors[name] for name in names], axis=1)
    return {"users": len(rows), "max_difference": float(np.abs(direct - served).max())}


def _why(
    embedder: UserEmbedder, config: InstructueConfig, names: list[str], user: PackedHistory, book: Phrasebook
) -> str:
    """What moves the user's embedding under the first and the last instruction, side by side; PNG as base64."""
    rows = {}
    for instruction in config.registry().select(list(dict.fromkeys((names[0], names[-1])))):
        (found,) = explain(embedder, user, instruction)
        rows[instruction.id] = event_rows(config.source_names, user, book, found, WHY_EVENTS)
    return inlined(events_figure(rows))
