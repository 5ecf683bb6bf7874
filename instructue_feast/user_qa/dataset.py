"""`UserQA`: a data set in memory, as a few flat arrays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from instructue_feast.history.pack import PackedHistory

# U = (user, as_of) rows, P = pairs, Q = questions, A = answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question.

    Attributes:
        id: Unique name such as `buys:diapers`.
        family: Id of its spec in the config.
        kind: Kind of the spec.
        source: Source it is about.
        subject: What it is about; the family's id where it has no subject.
        days: Window in days; negative looks back, 0 is a fact known at `as_of`.
        held_out: The subject is never trained on.
        wordings: Canonical wording first.
        held_out_wordings: Wordings for tests only.
        answers: Answer ids, the closed set it is answered from.
    """

    id: str
    family: str
    kind: str
    source: str
    subject: str
    days: int
    held_out: bool
    wordings: tuple[str, ...]
    held_out_wordings: tuple[str, ...]
    answers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class UserQA:
    """Questions, answers, and who answered what when.

    Attributes:
        history: U packed histories, one per user and `as_of`.
        questions: Q questions by `question_index`.
        answers: A answer texts by `answer_id`.
        offsets: `[U + 1]` int64; pairs of row `u` are `offsets[u]:offsets[u + 1]`.
        question_P: `[P]` int32.
        answer_P: `[P]` int32.
        weight_P: `[P]` float32.
        trained_through: ISO time after which nothing was used.
    """

    history: PackedHistory
    questions: tuple[Question, ...]
    answers: tuple[str, ...]
    offsets: npt.NDArray[np.int64]
    question_P: npt.NDArray[np.int32]
    answer_P: npt.NDArray[np.int32]
    weight_P: npt.NDArray[np.float32]
    trained_through: str

    def __len__(self) -> int:
        return len(self.history)

    @property
    def num_pairs(self) -> int:
        """P."""
        return len(self.question_P)

    def take(self, rows: Sequence[int] | npt.NDArray[np.int64]) -> UserQA:
        """Returns the given rows, by position, in the given order; questions and answers keep their numbers."""
        chosen = np.asarray(rows, dtype=np.int64)
        lengths = np.diff(self.offsets)[chosen]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        pairs = np.arange(int(offsets[-1])) - np.repeat(offsets[:-1] - self.offsets[chosen], lengths)
        return UserQA(
            history=self.history.take(chosen),
            questions=self.questions,
            answers=self.answers,
            offsets=offsets,
            question_P=self.question_P[pairs],
            answer_P=self.answer_P[pairs],
            weight_P=self.weight_P[pairs],
            trained_through=self.trained_through,
        )

    def triplets(self) -> Iterator[tuple[int, str, str]]:
        """Every pair as the paper has it: row of the user history, instruction (canonical wording), answer."""
        for row in range(len(self)):
            for pair in range(self.offsets[row], self.offsets[row + 1]):
                yield row, self.questions[self.question_P[pair]].wordings[0], self.answers[self.answer_P[pair]]
