"""A new binary task with a new instruction, on any project; the encoder has never seen a label of it."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt

from instructue_feast.config import InstructueConfig
from instructue_feast.evaluation.extracts import Phrasebook, users_in_order
from instructue_feast.evaluation.label_file import LabelFile
from instructue_feast.evaluation.ours import TaskEncoder, encode_texts
from instructue_feast.evaluation.scoring import RowInput, score_tasks
from instructue_feast.evaluation.suite import Clock, OnStep, SuiteOptions, SuiteResult, check_leakage
from instructue_feast.evaluation.tasks import LabelledTasks, Task, require_learnable
from instructue_feast.evaluation.text_rows import bucket_counts, mean_event_vectors
from instructue_feast.history.buckets import AGE_EDGES_DAYS
from instructue_feast.history.pack import PackedHistory
from instructue_feast.model.modeling import InstructUEModel

# U = users, R = sources, C = numeric columns, N = texts

Matrix = npt.NDArray[np.float32]

MIN_OF_A_CLASS = 15
"""Users of each class: three for every inner fold of every outer fold."""

MAX_TEXT_FEATURES = 500
"""The most common texts; each is a count of its own for the hand-feature rows."""

CUSTOM_ROWS = ("gbdt", "logreg", "minilm_events", "ours_none", "ours", "ours_zeroshot", "ours_gbdt")
"""Rows of a custom task; `ours_zeroshot` with answer texts only."""


def run_custom_task(
    config: InstructueConfig,
    model: InstructUEModel,
    history: PackedHistory,
    book: Phrasebook,
    labels: LabelFile,
    task: Task,
    options: SuiteOptions,
    on_step: OnStep | None = None,
) -> SuiteResult:
    """Measures a task that a user defined.

    Args:
        config: The project.
        model: The model.
        history: Packed histories of the project's users.
        book: Their texts.
        labels: Who is positive.
        task: Name, instruction, and answer texts if there are any.
        options: What to compute; rows out of `CUSTOM_ROWS`.
        on_step: Called as work goes on.

    Raises:
        DataError: One class only, too few of one class, or a user without packed history.
        LeakageError: The model has seen events at or after the histories' `as_of`.
    """
    require_learnable(task.name, labels.labels, least=MIN_OF_A_CLASS)
    history = users_in_order(history, labels.user_ids)
    as_of = datetime.fromtimestamp(int(history.as_of_us.max()) / 1e6, UTC)
    check_leakage(model, as_of, allow=options.allow_leakage)
    clock = Clock(on_step)
    with clock.step("features"):
        hand = history_features(history, config)
    with clock.step("event texts"):
        vectors = encode_texts(model, book)
    events = np.column_stack([mean_event_vectors(history, book, one) for one in vectors.values()])
    with clock.step("ours"):
        encoder = TaskEncoder(model, book, vectors, options.max_batch_tokens)
        found = encoder.embed(history, [task], paraphrased=False, on_users=clock.progress("ours"))
    ours = found.vector_UKE[:, found.right[0]]
    rows = {
        "gbdt": RowInput(method="trees", features=hand),
        "logreg": RowInput(method="linear", features=hand),
        "minilm_events": RowInput(method="linear", features=events),
        "ours_none": RowInput(method="linear", features=found.vector_UKE[:, found.none]),
        "ours": RowInput(method="linear", features=ours),
        "ours_gbdt": RowInput(method="stacked", features=hand, embedding=ours),
    }
    if len(task.answers) > 1:
        rows["ours_zeroshot"] = RowInput(method="score", features=found.zero_shot_TU[0][:, None])
    rows = {name: row for name, row in rows.items() if options.wants(name)}
    with clock.step("probes"):
        scores = score_tasks([rows], [labels.labels], seed=options.seed, on_task=clock.progress("probes"))
    labelled = LabelledTasks((task,), labels.user_ids, labels.labels[None])
    return SuiteResult(labelled=labelled, scores=scores, noise={}, mismatch=[], seconds=clock.seconds)


def history_features(history: PackedHistory, config: InstructueConfig) -> Matrix:
    """Hand features that any project has: how much, how recent, what, and the snapshot's numbers.

    Args:
        history: U users.
        config: Their project.

    Returns:
        `[U, R + R + C + N]`: logarithm of the events by source, days since the last event by source (beyond the last
        bucket for none), the numeric columns, and logarithms of the counts of the most common texts.
    """
    users, sources = len(history), len(config.source_names)
    user_T = np.repeat(np.arange(users), history.num_tokens)
    days_of_bucket = np.array([0.5, *(float(edge) for edge in AGE_EDGES_DAYS)])
    last_UR = np.full((users, sources), 2.0 * AGE_EDGES_DAYS[-1])
    np.minimum.at(last_UR, (user_T, history.source_index), days_of_bucket[history.age_bucket])
    texts, place_T, popularity = np.unique(history.text_id, return_inverse=True, return_counts=True)
    common = np.lexsort((texts, -popularity))[:MAX_TEXT_FEATURES]
    column = np.full(len(texts), -1, np.int64)
    column[common] = np.arange(len(common))
    kept = column[place_T] >= 0
    count_UN = np.zeros((users, len(common)))
    count_UN[user_T[kept], column[place_T[kept]]] = np.log1p(bucket_counts()[history.count_bucket[kept]])
    numeric = history.tabular_numeric
    parts = [np.log1p(history.num_events), np.log1p(last_UR), np.sign(numeric) * np.log1p(np.abs(numeric)), count_UN]
    return np.column_stack(parts).astype(np.float32)
