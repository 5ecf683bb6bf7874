"""The tables of a UserQA data set on disk.

`<output>/user_qa/<qa_id>/` holds `questions/`, `answers/`, `history/` (`schema.PACKED_HISTORY`, every user and `as_of`
once), `phrasebook/` (`schema.PHRASEBOOK`, every text of those histories), `pairs/split=train/` and
`pairs/split=held_out/`, and `manifest.json`, written last.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pyarrow as pa

from instructue_feast.schema import TIMESTAMP

SPLITS = ("train", "held_out")
"""`held_out` has the pairs of subjects that are never trained on."""


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


QUESTIONS = pa.schema(
    [
        _required("question_id", pa.string()),
        _required("family", pa.string()),
        _required("kind", pa.string()),
        _required("source", pa.string()),
        _required("subject", pa.string()),
        _required("days", pa.int32()),
        _required("held_out", pa.bool_()),
        _required("wordings", pa.list_(pa.string())),
        _required("held_out_wordings", pa.list_(pa.string())),
    ]
)
"""One row per question; the row number is its `question_index`.

`family` is the id of its spec in the config, `days` its window (negative looks back from `as_of`, 0 is a fact known at
`as_of`). The first wording is the canonical one; `held_out_wordings` are for tests only.
"""

ANSWERS = pa.schema(
    [_required("answer_id", pa.int32()), _required("question_index", pa.int32()), _required("text", pa.string())]
)
"""One row per answer of a question; `answer_id` is the row number, answers of a question stand together.

For a yes/no question the first answer is yes, the second no; for levels they rise.
"""

PAIRS = pa.schema(
    [
        _required("user_id", pa.string()),
        _required("as_of", TIMESTAMP),
        _required("question_index", pa.list_(pa.int32())),
        _required("answer_id", pa.list_(pa.int32())),
        _required("weight", pa.list_(pa.float32())),
    ]
)
"""One row per user and `as_of` with any answered question.

`weight` balances: within a question and split, every answer has the same total weight and the mean weight is 1, but no
weight is above `MAX_WEIGHT`.
"""

MAX_WEIGHT = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilySummary:
    """What became of one question family.

    Attributes:
        kind: Kind of its spec.
        source: Source it is about.
        days: Window; negative looks back.
        questions: Number of questions.
        held_out: How many of them are never trained on.
        pairs: Answered questions, both splits.
        first_rate: Share of the first answer (yes, the lowest level, the most common value) over all pairs.
        edges: Lowest value of each level but the first, for `amount`.
        dropped: Questions refused, by reason.
    """

    kind: str
    source: str
    days: int
    questions: int
    held_out: int
    pairs: int
    first_rate: float
    edges: list[float] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class UserQAManifest:
    """What makes a UserQA data set complete.

    Attributes:
        as_ofs: ISO times, ascending.
        extracts: Extract of each `as_of`.
        cut: ISO time at or after which no raw event was looked at.
        trained_through: ISO time; no answer depends on anything at or after it.
        generator: What worded the questions.
        users: Rows of the history, one per user and `as_of`.
        pairs: Number of pairs by split.
        checked: Pairs whose answers were computed a second time, another way, and found equal.
        dropped: Rows of the raw tables and pairs refused, by reason.
        families: Summary by family id.
    """

    qa_id: str
    created: str
    history_digest: str
    questions_digest: str
    as_ofs: list[str]
    trained_through: str
    generator: str
    num_questions: int
    num_held_out: int
    users: int
    pairs: dict[str, int]
    extracts: list[str] = field(default_factory=list)
    cut: str = ""
    checked: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    families: dict[str, FamilySummary] = field(default_factory=dict)
    seconds: float = 0.0
