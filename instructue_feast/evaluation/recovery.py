"""On synthetic users, whose interests are known: does each instruction bring out its own interest, and no other?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds

from instructue_feast.config import InstructueConfig
from instructue_feast.errors import DataError
from instructue_feast.evaluation.attributions import Attributions, measure_agreement, measure_own_interest
from instructue_feast.evaluation.extracts import Phrasebook, users_in_order
from instructue_feast.evaluation.metrics import Estimate, Labels
from instructue_feast.evaluation.ours import TaskEncoder, encode_texts
from instructue_feast.evaluation.question_words import in_words_of
from instructue_feast.evaluation.scoring import OnTask, RowInput, score_tasks
from instructue_feast.evaluation.suite import Clock, OnStep, SuiteOptions, check_leakage
from instructue_feast.evaluation.tasks import Task
from instructue_feast.history.pack import PackedHistory
from instructue_feast.model.modeling import InstructUEModel

# U = users, K = instructions, I = interests, E = embedding size, D = draws

Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Truth:
    """What is latent in synthetic users.

    Attributes:
        user_ids: U users that have any event.
        interests: I names.
        strength_UI: Strength of each interest; 0 for none.
    """

    user_ids: tuple[str, ...]
    interests: tuple[str, ...]
    strength_UI: npt.NDArray[np.float64]

    @property
    def labels(self) -> Labels:
        """`[I, U]` who has each interest at all."""
        return (self.strength_UI.T > 0).astype(np.int8)


@dataclass(frozen=True, slots=True)
class Recovery:
    """AUC of every interest from the embedding under every instruction.

    Attributes:
        interests: I names; instruction `i` asks about interest `i`.
        auc_KI: AUC of a linear probe.
        none_I: AUC from the embedding without an instruction.
        own: Mean over the diagonal.
        others: Mean off the diagonal.
        gap: `own` minus `others`, paired.
        own_minus_none: `own` minus the mean without an instruction, paired.
    """

    interests: tuple[str, ...]
    auc_KI: npt.NDArray[np.float64]
    none_I: npt.NDArray[np.float64]
    own: Estimate
    others: Estimate
    gap: Estimate
    own_minus_none: Estimate

    @property
    def best_is_own(self) -> float:
        """Share of interests that their own instruction recovers better than any other does."""
        return float((self.auc_KI.argmax(0) == np.arange(len(self.interests))).mean())

    def document(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "interests": list(self.interests),
            "auc": [[round(float(one), 5) for one in row] for row in self.auc_KI],
            "none": [round(float(one), 5) for one in self.none_I],
            "own": self.own.as_dict(),
            "others": self.others.as_dict(),
            "gap": self.gap.as_dict("difference"),
            "own_minus_none": self.own_minus_none.as_dict("difference"),
            "best_is_own": round(self.best_is_own, 5),
        }


def read_truth(folder: Path) -> Truth:
    """Reads the raw table `truth` of a synthetic project.

    Raises:
        DataError: It is missing or damaged.
    """
    try:
        table = ds.dataset(folder).to_table(columns=["user_id", "strengths", "top_interest", "cold"])
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise DataError(
            f"truth table in {folder} cannot be read: {type(error).__name__}",
            "write the data set with `instructue data synthetic`",
        ) from None
    table = table.filter(pa.array(np.logical_not(table["cold"].to_numpy()))).sort_by("user_id")
    strength_UI = np.array(table["strengths"].to_pylist(), np.float64).reshape(table.num_rows, -1)
    # The strongest interest is named; that names the columns.
    names = dict(zip(strength_UI.argmax(1).tolist(), table["top_interest"].to_pylist(), strict=True))
    interests = tuple(names.get(column, f"interest {column}") for column in range(strength_UI.shape[1]))
    return Truth(tuple(table["user_id"].to_pylist()), interests, strength_UI)


def read_vocabulary(folder: Path) -> dict[str, tuple[str, ...]]:
    """Reads the raw table `vocabulary` of a synthetic project: the words of each interest.

    Raises:
        DataError: It is missing, as in a project of an older release, or damaged.
    """
    try:
        table = ds.dataset(folder).to_table(columns=["interest", "word"])
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise DataError(
            f"vocabulary table in {folder} cannot be read: {type(error).__name__}",
            "write the data set again with `instructue data synthetic`, or pass --explain-users 0",
        ) from None
    words: dict[str, list[str]] = {}
    for row in table.to_pylist():
        words.setdefault(row["interest"], []).append(row["word"])
    return {interest: tuple(own) for interest, own in words.items()}


def interest_tasks(interests: Sequence[str]) -> list[Task]:
    """One question per interest."""
    return [
        Task(
            name=f"interested_in_{name}".replace(" ", "_"),
            family="synthetic",
            subject=name,
            question_id=f"interested:{name}",
            instruction=f"Is this user interested in {name}?",
        )
        for name in interests
    ]


def run_recovery(
    config: InstructueConfig,
    model: InstructUEModel,
    history: PackedHistory,
    book: Phrasebook,
    truth: Truth,
    options: SuiteOptions,
    on_step: OnStep | None = None,
    *,
    vocabulary: Mapping[str, Sequence[str]] | None = None,
) -> tuple[Recovery, Attributions | None, dict[str, float]]:
    """Embeds synthetic users under one instruction per interest, and probes every interest from each.

    Args:
        config: The synthetic project.
        model: The model.
        history: Packed histories of its users.
        book: Their texts.
        truth: What is latent.
        options: Seed, processes, batch size, and of how many users attributions are checked.
        on_step: Called as work goes on.
        vocabulary: Words of each interest; without them, nobody knows which texts are about it.

    Returns:
        What was recovered, what was measured of attributions if they were checked, and the wall time by step.

    Raises:
        DataError: A user has no packed history.
        LeakageError: The model has seen events at or after the histories' `as_of`.
    """
    history = users_in_order(history, truth.user_ids)
    check_leakage(model, datetime.fromtimestamp(int(history.as_of_us.max()) / 1e6, UTC), allow=options.allow_leakage)
    tasks = [in_words_of(task, config) for task in interest_tasks(truth.interests)]
    clock = Clock(on_step)
    with clock.step("event texts"):
        encoder = TaskEncoder(model, book, encode_texts(model, book), options.max_batch_tokens)
    with clock.step("ours"):
        embedded = encoder.embed(history, tasks, paraphrased=False, on_users=clock.progress("ours"))
    with clock.step("probes"):
        result = recovery(
            embedded.vector_UKE[:, list(embedded.right)],
            embedded.vector_UKE[:, embedded.none],
            truth,
            seed=options.seed,
            jobs=options.jobs,
            on_task=clock.progress("probes"),
        )
    found = _attributions(encoder, history, tasks, truth, vocabulary, options, clock)
    return result, found, clock.seconds


def _attributions(
    encoder: TaskEncoder,
    history: PackedHistory,
    tasks: Sequence[Task],
    truth: Truth,
    vocabulary: Mapping[str, Sequence[str]] | None,
    options: SuiteOptions,
    clock: Clock,
) -> Attributions | None:
    """Attributions under the interests' instructions, checked against leaving texts out and against the vocabulary."""
    if not options.wants_attributions:
        return None
    texts, embedder = [task.instruction for task in tasks], encoder.embedder()
    users, seed = options.explain_users, options.seed
    with clock.step("attributions"):
        agreement = measure_agreement(
            embedder, history, texts, users=users, seed=seed, on_users=clock.progress("attributions")
        )
    if vocabulary is None:
        return Attributions(agreement)
    with clock.step("own interests"):
        own = measure_own_interest(
            embedder,
            history,
            encoder.book,
            texts,
            [vocabulary.get(name, ()) for name in truth.interests],
            truth.strength_UI,
            users=users,
            seed=seed,
            on_users=clock.progress("own interests"),
        )
    return Attributions(agreement, own)


def recovery(
    vector_UKE: Matrix,
    none_UE: Matrix,
    truth: Truth,
    *,
    seed: int = 0,
    jobs: int = 1,
    on_task: OnTask | None = None,
) -> Recovery:
    """Probes every interest from the embedding under every instruction.

    Args:
        vector_UKE: Embeddings; instruction `k` asks about interest `k`.
        none_UE: Embeddings without an instruction.
        truth: What is latent, of the same users; at least two interests.
        seed: Seed of folds and draws.
        jobs: Processes.
        on_task: Called with interests done and interests in all.
    """
    size = len(truth.interests)
    rows = {str(k): RowInput(method="linear", features=vector_UKE[:, k]) for k in range(size)}
    rows["none"] = RowInput(method="linear", features=none_UE)
    scores = score_tasks([rows] * size, list(truth.labels), seed=seed, jobs=jobs, on_task=on_task)
    auc_KI = np.array([[own[str(k)].auc for own in scores] for k in range(size)])
    auc_KID = np.array([[own[str(k)].auc_D for own in scores] for k in range(size)])
    none_I = np.array([own["none"].auc for own in scores])
    none_ID = np.array([own["none"].auc_D for own in scores])
    same = np.eye(size, dtype=bool)
    own, others = auc_KI[same].mean(), auc_KI[~same].mean()
    own_D, others_D = auc_KID[same].mean(0), auc_KID[~same].mean(0)
    return Recovery(
        interests=truth.interests,
        auc_KI=auc_KI,
        none_I=none_I,
        own=Estimate.of(float(own), own_D),
        others=Estimate.of(float(others), others_D),
        gap=Estimate.of(float(own - others), own_D - others_D),
        own_minus_none=Estimate.of(float(own - none_I.mean()), own_D - none_ID.mean(0)),
    )
