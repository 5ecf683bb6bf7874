"""Reading a finished UserQA data set into memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from instructue_feast import schema
from instructue_feast.config import InstructueConfig
from instructue_feast.errors import ConfigError, DataError, SchemaError, VersionMismatchError, did_you_mean
from instructue_feast.history.pack import PackedHistory
from instructue_feast.runs.manifest import from_json
from instructue_feast.runs.store import OutputStore
from instructue_feast.user_qa import tables
from instructue_feast.user_qa.dataset import Question, UserQA
from instructue_feast.user_qa.tables import SPLITS, FamilySummary, UserQAManifest

# U = (user, as_of) rows, P = pairs


def load_user_qa(store: OutputStore, qa_id: str, config: InstructueConfig, split: str = "train") -> UserQA:
    """Loads one split of a data set.

    Args:
        store: The project's output.
        qa_id: Name of the data set.
        config: The project; its history settings must be those the data set was made with.
        split: `train`, or `held_out` for the subjects that are never trained on.

    Returns:
        Rows ordered by `as_of`, then user id; only those with a pair in the split. `questions` and `answers` are those
        of both splits, so that indices agree between them.

    Raises:
        ConfigError: No such data set or split.
        DataError: The split has no pairs.
        SchemaError: A table is not what it should be.
        VersionMismatchError: The data set was made with other history settings.

    Example:
        `qa = load_user_qa(OutputStore(config.output.path), "20171001T000000-0a1b2c3d", config)`
    """
    if split not in SPLITS:
        raise ConfigError(f"unknown split {split!r}", did_you_mean(split, SPLITS))
    manifest = load_manifest(store, qa_id)
    if manifest.history_digest != config.history_digest():
        raise VersionMismatchError(
            f"UserQA {qa_id} was made with other history settings than the config's",
            "use the config it was made with, or build it again with `instructue qa`",
        )
    questions = _read(store, tables.QUESTIONS, "user_qa", qa_id, "questions")
    answers = _read(store, tables.ANSWERS, "user_qa", qa_id, "answers")
    pairs = _read(store, tables.PAIRS, "user_qa", qa_id, "pairs", f"split={split}")
    if not len(pairs):
        raise DataError(
            f"UserQA {qa_id} has no pairs in split {split}",
            f"it has {manifest.pairs}; ask more questions, or look at why they were dropped: `instructue qa --show 0`",
        )
    pairs = pairs.sort_by([("as_of", "ascending"), ("user_id", "ascending")])
    rows = _read(store, schema.PACKED_HISTORY, "user_qa", qa_id, "history")
    history = PackedHistory.from_arrow(
        rows, num_sources=len(config.sources), num_numeric=len(config.numeric_columns), where=f"history of {qa_id}"
    )
    columns = {name: pairs.column(name).combine_chunks() for name in ("question_index", "answer_id", "weight")}
    lengths = {name: column.value_lengths().to_numpy(zero_copy_only=False) for name, column in columns.items()}
    if any(not np.array_equal(lengths["weight"], one) for one in lengths.values()):
        raise SchemaError(f"pairs of {qa_id}: lists differ in length", "build the data set again")
    return UserQA(
        history=history.take(_positions(rows, pairs, qa_id)),
        questions=_questions(questions, answers),
        answers=tuple(answers.column("text").to_pylist()),
        offsets=np.concatenate([[0], np.cumsum(lengths["weight"], dtype=np.int64)]).astype(np.int64),
        question_P=columns["question_index"].flatten().to_numpy(zero_copy_only=False),
        answer_P=columns["answer_id"].flatten().to_numpy(zero_copy_only=False),
        weight_P=columns["weight"].flatten().to_numpy(zero_copy_only=False),
        trained_through=manifest.trained_through,
    )


def load_phrasebook(store: OutputStore, qa_id: str) -> pa.Table:
    """Every text the histories of a data set refer to (`schema.PHRASEBOOK`)."""
    return _read(store, schema.PHRASEBOOK, "user_qa", qa_id, "phrasebook")


def load_manifest(store: OutputStore, qa_id: str) -> UserQAManifest:
    """What a finished data set says about itself.

    Raises:
        ConfigError: There is no such finished data set.
        SchemaError: It was written by another release.
    """
    finished = [one for one in store.names("user_qa") if store.exists("user_qa", one, "manifest.json")]
    if qa_id not in finished:
        raise ConfigError(f"there is no finished UserQA data set {qa_id!r}", did_you_mean(qa_id, finished))
    value = store.read_json("user_qa", qa_id, "manifest.json")
    families: dict[str, Any] = value.get("families", {})
    where = f"manifest of {qa_id}"
    value["families"] = {name: from_json(FamilySummary, one, where) for name, one in families.items()}
    return from_json(UserQAManifest, value, where)


def _questions(questions: pa.Table, answers: pa.Table) -> tuple[Question, ...]:
    closed: list[list[int]] = [[] for _ in range(len(questions))]
    for number, (answer_id, index) in enumerate(
        zip(answers.column("answer_id").to_pylist(), answers.column("question_index").to_pylist(), strict=True)
    ):
        if answer_id != number or not 0 <= index < len(closed):
            raise SchemaError("answers are not in the order of their ids", "build the data set again")
        closed[index].append(answer_id)
    return tuple(
        Question(
            id=row["question_id"],
            family=row["family"],
            kind=row["kind"],
            source=row["source"],
            subject=row["subject"],
            days=row["days"],
            held_out=row["held_out"],
            wordings=tuple(row["wordings"]),
            held_out_wordings=tuple(row["held_out_wordings"]),
            answers=tuple(ids),
        )
        for row, ids in zip(questions.to_pylist(), closed, strict=True)
    )


def _read(store: OutputStore, expected: pa.Schema, *parts: str) -> pa.Table:
    """Reads every Parquet file of a folder, in the order of their names."""
    where = "/".join(parts)
    found = []
    for file in store.files(*parts):
        with store.fs.open(file, "rb") as stream:
            found.append(pq.ParquetFile(stream).read())
        schema.check(found[-1], expected, where)
    if not found:
        return expected.empty_table()
    return pa.concat_tables([one.select(expected.names).cast(expected) for one in found]).combine_chunks()


def _positions(rows: pa.Table, pairs: pa.Table, qa_id: str) -> npt.NDArray[np.int64]:
    """Where the history of each row of `pairs` stands in `rows`."""
    users = pa.chunked_array(rows.column("user_id").chunks + pairs.column("user_id").chunks).combine_chunks()
    codes = users.dictionary_encode().indices.to_numpy()
    times = [one.column("as_of").cast(pa.int64()).to_numpy() for one in (rows, pairs)]
    _, moments = np.unique(np.concatenate(times), return_inverse=True)
    keys = codes.astype(np.int64) * (int(moments.max(initial=0)) + 1) + moments
    have, want = keys[: len(rows)], keys[len(rows) :]
    order = np.argsort(have, kind="stable")
    if len(np.unique(have)) != len(have) or len(np.unique(want)) != len(want):
        raise SchemaError(f"UserQA {qa_id} has a user twice at one as_of", "build the data set again")
    found = np.searchsorted(have[order], want)
    if len(have) == 0 or np.any(have[order][np.minimum(found, len(have) - 1)] != want):
        raise SchemaError(f"UserQA {qa_id} has pairs without a history", "build the data set again")
    positions: npt.NDArray[np.int64] = order[found]
    return positions
