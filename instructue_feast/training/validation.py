"""Validation: does the cosine between a user and an answer rank held-out users?

Three kinds of questions are asked of users that never trained: trained questions in trained words, the same in held-out
words, and questions about subjects that were never trained on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import xxhash
from sklearn.metrics import roc_auc_score

from instructue_feast.training.losses import Learner
from instructue_feast.training.plan import Ints
from instructue_feast.training.settings import TrainingSettings
from instructue_feast.training.vectors import TextVectors, embed
from instructue_feast.user_qa.dataset import UserQA

# V = rows looked at, Q = questions asked, A = answers of a question, K = questions per pass, B = users per pass

_QUESTIONS_PER_PASS = 32


@dataclass(frozen=True, slots=True)
class Probe:
    """One kind of question.

    Attributes:
        name: Metric name.
        data: Where the true answers are.
        rows: V rows of held-out users.
        questions: Q positions in `data.questions`.
        held_out_words: Whether to ask in held-out words.
    """

    name: str
    data: UserQA
    rows: Ints
    questions: Ints
    held_out_words: bool

    def wording(self, question: int) -> str:
        """The words a question is asked in."""
        asked = self.data.questions[question]
        return asked.held_out_wordings[0] if self.held_out_words else asked.wordings[0]


def is_validation_user(user_id: str, fraction: float) -> bool:
    """Whether a user is held out, by a hash of the id: the same for every data set and `as_of`."""
    return xxhash.xxh64_intdigest(f"validation/{user_id}".encode()) < fraction * 2**64


def split_rows(data: UserQA, fraction: float) -> tuple[Ints, Ints]:
    """Rows that train, and rows of held-out users."""
    held = np.array([is_validation_user(one, fraction) for one in data.history.user_ids], bool)
    return np.flatnonzero(~held), np.flatnonzero(held)


def make_probes(train: UserQA, held_out: UserQA | None, asked: Ints, settings: TrainingSettings) -> list[Probe]:
    """The probes a data set allows; none without held-out users.

    Args:
        train: The training split.
        held_out: The split of subjects that are never trained on.
        asked: Questions that are trained on.
        settings: Sizes and the seed.
    """
    probes = []
    rows, questions = _rows(train, settings), _questions(asked, settings)
    if len(rows):
        probes.append(Probe("auc_users", train, rows, questions, False))
        worded = np.array([one for one in questions if train.questions[one].held_out_wordings], np.int64)
        if len(worded):
            probes.append(Probe("auc_wordings", train, rows, worded, True))
    if held_out is not None and len(rows := _rows(held_out, settings)):
        subjects = np.unique(held_out.question_P).astype(np.int64)
        if len(subjects):
            probes.append(Probe("auc_subjects", held_out, rows, _questions(subjects, settings), False))
    return probes


def _rows(data: UserQA, settings: TrainingSettings) -> Ints:
    rows = split_rows(data, settings.validation_fraction)[1]
    return np.sort(np.random.default_rng([settings.seed, 3]).permutation(rows)[: settings.validation_rows])


def _questions(questions: Ints, settings: TrainingSettings) -> Ints:
    return np.sort(np.random.default_rng([settings.seed, 4]).permutation(questions)[: settings.validation_questions])


@torch.no_grad()
def validate(learner: Learner, probe: Probe, words: TextVectors, *, rank: int = 0, world: int = 1) -> dict[str, float]:
    """AUC of the cosine score, averaged over questions.

    The score of an answer is its cosine with the user minus the mean cosine of the other answers: for yes/no, yes minus
    no. Each answer is ranked against the others; a question needs users with different answers.

    Args:
        learner: The model, in evaluation mode.
        probe: What to ask whom.
        words: Vectors that hold `probe.wording` of its questions, in that order.
        rank: This process; it takes every `world`-th row.
        world: Number of processes.

    Returns:
        The AUC under the probe's name, if any question allows one, and how many did.
    """
    model, data = learner.model, probe.data
    suffixes = [model.suffix(probe.wording(one)) for one in probe.questions]
    closed = [data.questions[one].answers for one in probe.questions]
    answers = [model.answer_embeddings([model.answer_ids(data.answers[one]) for one in own]) for own in closed]
    score_VA = np.zeros((len(probe.rows), sum(map(len, closed))))
    size = max(1, learner.settings.users_per_step // world)
    mine = np.arange(rank, len(probe.rows), world)
    mine = mine[np.argsort(data.history.num_tokens[probe.rows[mine]], kind="stable")]
    starts = np.cumsum([0, *map(len, closed)])
    for users in (mine[start : start + size] for start in range(0, len(mine), size)):
        history = data.history.take(probe.rows[users])
        for first in range(0, len(suffixes), _QUESTIONS_PER_PASS):
            part = np.arange(first, min(first + _QUESTIONS_PER_PASS, len(suffixes)))
            own = [suffixes[one] for one in part]
            wording_BK = np.tile(part, (len(users), 1))
            user_BKE = embed(model, words, history, [own] * len(users), wording_BK).embeddings
            for column, one in enumerate(part):
                score_VA[users, starts[one] : starts[one + 1]] = (user_BKE[:, column] @ answers[one].T).cpu().numpy()
    if world > 1:
        total = torch.from_numpy(score_VA).to(model.device)
        dist.all_reduce(total)
        score_VA = total.cpu().numpy()
    truth_VQ = _truth(probe)
    found = [
        question_auc(score_VA[:, starts[one] : starts[one + 1]], truth_VQ[:, one], closed[one])
        for one in range(len(closed))
    ]
    known = [one for one in found if one is not None]
    return {probe.name: float(np.mean(known)), f"{probe.name}_questions": len(known)} if known else {}


def _truth(probe: Probe) -> Ints:
    """`[V, Q]` answer ids, -1 where a user was not asked."""
    data = probe.data
    column = np.full(len(data.questions), -1)
    column[probe.questions] = np.arange(len(probe.questions))
    truth_VQ = np.full((len(probe.rows), len(probe.questions)), -1, np.int64)
    for place, row in enumerate(probe.rows):
        pairs = np.arange(*data.offsets[row : row + 2])
        asked = column[data.question_P[pairs]]
        truth_VQ[place, asked[asked >= 0]] = data.answer_P[pairs[asked >= 0]]
    return truth_VQ


def question_auc(score_VA: npt.NDArray[np.float64], truth_V: Ints, answers: tuple[int, ...]) -> float | None:
    """Mean AUC of each answer against the others; `None` if all users who were asked answered alike.

    Example:
        >>> score = np.array([[0.9, 0.1], [0.2, 0.3], [0.5, 0.5]])
        >>> question_auc(score, np.array([7, 8, -1]), (7, 8))
        1.0
    """
    asked = truth_V >= 0
    scores, truth = score_VA[asked], truth_V[asked]
    found = []
    for place, answer in enumerate(answers):
        is_answer = truth == answer
        if is_answer.any() and not is_answer.all():
            others = np.delete(scores, place, axis=1).mean(1) if len(answers) > 1 else 0.0
            found.append(roc_auc_score(is_answer, scores[:, place] - others))
    return float(np.mean(found)) if found else None
