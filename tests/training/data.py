"""Small data sets whose truth is known: whether a user bought a thing, which the history shows."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from instructue_feast import schema
from instructue_feast.history.pack import PackedHistory
from instructue_feast.history.render import text_id
from instructue_feast.training.run import TrainingData
from instructue_feast.user_qa.dataset import Question, UserQA
from tests.model_data import NUMERIC, PHRASES, SOURCES

THINGS = ("grocery item 1", "grocery item 2", "grocery item 3", "grocery item 4", "app 1", "app 2")
HELD_OUT = ("grocery item 5", "app 3")
DAY_US = 86_400_000_000


def phrasebook() -> pa.Table:
    rows = [(source, text_id(source, text), text) for source in SOURCES for text in PHRASES[source]]
    names, ids, texts = zip(*rows, strict=True)
    return pa.table({"source": names, "text_id": pa.array(ids, pa.int64()), "text": texts}, schema=schema.PHRASEBOOK)


def question(index: int, subject: str, *, held_out: bool = False, family: str = "buys") -> Question:
    return Question(
        id=f"{family}:{subject}", family=family, kind="occurs", source="bill", subject=subject, days=90,
        held_out=held_out, wordings=(f"Is there {subject}?", f"{subject}, any?"),
        held_out_wordings=(f"Do we see {subject}?",), answers=(2 * index, 2 * index + 1),
    )  # fmt: skip


def make_histories(users: int, as_ofs: int, rng: np.random.Generator) -> tuple[PackedHistory, np.ndarray]:
    """Histories of users at every as_of, and who has which of `THINGS + HELD_OUT`."""
    subjects = THINGS + HELD_OUT
    rows = users * as_ofs
    has = rng.random((rows, len(subjects))) < 0.5
    noise = [text for text in PHRASES["bill"] if text not in subjects]
    token_lists = []
    for own in has:
        bought = [subject for subject, yes in zip(subjects, own, strict=True) if yes]
        bill = [one for one in bought if one.startswith("grocery")] + list(rng.choice(noise, rng.integers(1, 4), False))
        apps = [one for one in bought if one.startswith("app")]
        token_lists.append([(0, text_id("bill", one)) for one in bill] + [(1, text_id("app", one)) for one in apps])
    flat = [token for own in token_lists for token in own]
    history = PackedHistory(
        user_ids=[f"user-{user}" for user in range(users) for _ in range(as_ofs)],
        as_of_us=np.tile(np.arange(as_ofs) * 30 * DAY_US, users),
        offsets=np.cumsum([0, *map(len, token_lists)]).astype(np.int64),
        source_index=np.array([source for source, _ in flat], np.int32),
        text_id=np.array([one for _, one in flat], np.int64),
        count_bucket=rng.integers(0, 4, len(flat)).astype(np.int32),
        age_bucket=rng.integers(0, 4, len(flat)).astype(np.int32),
        num_events=np.zeros((rows, len(SOURCES)), np.int32),
        tabular_numeric=rng.normal(0, 50, (rows, len(NUMERIC))).astype(np.float32),
    )
    return history, has


def make_data(users: int = 32, *, as_ofs: int = 1, seed: int = 0, drop: float = 0.0) -> TrainingData:
    """A data set in which every question can be answered from the history.

    Args:
        users: Number of users.
        as_ofs: Histories per user.
        seed: Of everything random.
        drop: Share of the pairs that are left out, so that users differ in what they are asked.
    """
    rng = np.random.default_rng(seed)
    history, has = make_histories(users, as_ofs, rng)
    questions = tuple(
        question(index, subject, held_out=subject in HELD_OUT) for index, subject in enumerate(THINGS + HELD_OUT)
    )
    answers = tuple(text for one in questions for text in (f"Yes, {one.subject}.", f"No {one.subject}."))
    train = _pairs(history, questions, answers, has, range(len(THINGS)), drop, rng)
    held_out = _pairs(history, questions, answers, has, range(len(THINGS), len(questions)), drop, rng)
    return TrainingData(qa_id="tiny", train=train, held_out=held_out, phrasebook=phrasebook(), history_digest="0" * 64)


def _pairs(history, questions, answers, has, asked, drop, rng) -> UserQA:
    keep = rng.random((len(history), len(asked))) >= drop
    row_P, place_P = np.nonzero(keep)
    question_P = np.asarray(asked)[place_P]
    yes_P = has[row_P, question_P]
    asked = question_P[:, None] == np.arange(len(questions))
    rate_Q = (yes_P[:, None] & asked).sum(0) / asked.sum(0).clip(1)
    weight_P = np.where(yes_P, 0.5 / rate_Q[question_P], 0.5 / (1 - rate_Q[question_P]))
    return UserQA(
        history=history,
        questions=questions,
        answers=answers,
        offsets=np.concatenate([[0], np.cumsum(keep.sum(1))]).astype(np.int64),
        question_P=question_P.astype(np.int32),
        answer_P=(2 * question_P + ~yes_P).astype(np.int32),
        weight_P=weight_P.astype(np.float32),
        trained_through="2017-10-01T00:00:00+00:00",
    )
