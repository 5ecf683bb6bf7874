"""The plan of every pass: which users are asked which questions, in which words. A pure function of seed and index.

Nothing is remembered between passes, so any process may plan any pass, in any order, and a resumed run goes on exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from instructue_feast.errors import DataError, LeakageError
from instructue_feast.history.pack import PackedHistory
from instructue_feast.history.variants import thinned
from instructue_feast.training.settings import TrainingSettings
from instructue_feast.user_qa.dataset import UserQA

# U = (user, as_of) rows, P = pairs, Q = questions, A = answers, B = users of a pass, K = questions per user,
# W = wordings

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_LENGTH_POOL = 8
"""Passes whose users are sorted by length together: less padding, and still random company."""


@dataclass(frozen=True, slots=True)
class PassPlan:
    """One pass, over all processes.

    Attributes:
        index: Number of the pass.
        row_B: Row of each user's answers.
        history_B: Row of the history that is shown; another user's in the shuffled control.
        pair_BK: Pair asked; of users with fewer than K pairs some stand twice, then without weight.
        wording_BK: Position in `Sampler.wordings`.
        weight_BK: Weight in the contrastive loss.
        spoken_BK: Whether the pair gets the next-token loss.
    """

    index: int
    row_B: Ints
    history_B: Ints
    pair_BK: Ints
    wording_BK: Ints
    weight_BK: npt.NDArray[np.float32]
    spoken_BK: npt.NDArray[np.bool_]


class Sampler:
    """Draws the passes of a data set.

    Args:
        data: The data set.
        rows: Rows that train; the others are held out.
        settings: Sizes, caps, and the seed.
        lengths: `[U]` lengths by which users share passes; those of the histories for `None`. Ablations keep those of
            the whole histories, so that their passes have the same users.

    Attributes:
        wordings: The empty text, then every wording of every question.
        chance_Q: Contrastive loss of whoever knows the question and nothing of the user: the weighted entropy of its
            answers. For balanced yes/no it is log 2.

    Raises:
        DataError: There are no pairs, one user only, or no question with two answers.
        LeakageError: A question that is never to be trained on has pairs.
    """

    def __init__(self, data: UserQA, rows: Ints, settings: TrainingSettings, lengths: Ints | None = None) -> None:
        self._lengths = data.history.num_tokens if lengths is None else lengths
        self._data, self._settings = data, settings
        owner_P = np.repeat(np.arange(len(data)), np.diff(data.offsets))
        trained_P = np.isin(owner_P, rows) & (data.weight_P > 0)
        if not trained_P.any():
            raise DataError("the data set has no pairs to train on", "build it again with more users or as_ofs")
        if len({data.history.user_ids[row] for row in np.unique(owner_P[trained_P])}) < 2:
            raise DataError("the data set has one user to train on", "contrast needs at least two users")
        held_out = np.array([one.held_out for one in data.questions])
        if held_out[data.question_P[trained_P]].any():
            raise LeakageError(
                "the training split has pairs of held-out subjects", "train on the `train` split of the data set"
            )
        mass_QA = _answer_mass(data, trained_P)
        self.chance_Q, usable_Q = _entropies(data, mass_QA)
        if not usable_Q.any():
            raise DataError(
                f"none of the {len(np.unique(data.question_P[trained_P]))} questions has two different answers",
                "ask questions that users answer differently, or about more users",
            )
        self.unusable = int((~usable_Q[np.unique(data.question_P[trained_P])]).sum())
        self._usable_P = trained_P & usable_Q[data.question_P]
        asked_Q = np.zeros(len(data.questions), bool)
        asked_Q[np.unique(data.question_P[self._usable_P])] = True
        self._share_Q = question_shares(
            [one.family for one in data.questions], asked_Q, settings.family_exponent, settings.family_cap
        )
        self.question_indices: Ints = np.flatnonzero(asked_Q)
        self.wordings = ["", *(text for one in data.questions for text in one.wordings)]
        sizes = np.array([len(one.wordings) for one in data.questions])
        self._first_wording_Q: Ints = 1 + np.cumsum(sizes) - sizes
        self._num_wordings_Q: Ints = sizes
        self._rows = rows[np.isin(rows, owner_P[self._usable_P])]
        _, self._user_U = np.unique(np.array(data.history.user_ids, dtype=object).astype(str), return_inverse=True)
        as_of = data.history.as_of_us[self._rows]
        self._by_as_of = self._rows[np.argsort(as_of, kind="stable")]
        self._batches_per_epoch = -(-len(self._rows) // settings.users_per_step)
        self._epoch: tuple[int, Ints, Ints] | None = None  # the order of one epoch, which most plans share

    def _rng(self, stream: int, index: int) -> np.random.Generator:
        return np.random.default_rng([self._settings.seed, stream, index])

    def plan(self, index: int) -> PassPlan:
        """The pass of a number, from 0."""
        settings, data = self._settings, self._data
        rng = self._rng(1, index)
        row_B = self._users(index)
        own = [np.arange(*data.offsets[row : row + 2]) for row in row_B]
        own = [pairs[self._usable_P[pairs]] for pairs in own]
        pool = self._pool(own, rng)
        shape = (len(row_B), settings.questions_per_user)
        spoken = int(settings.autoregressive_pairs + rng.random())  # rounds up as often as the fraction says
        pair_BK = np.empty(shape, np.int64)
        weight_BK = np.zeros(shape, np.float32)
        spoken_BK = np.zeros(shape, bool)
        for user, pairs in enumerate(own):
            inside = pairs[pool[data.question_P[pairs]]]
            chosen = rng.permutation(inside if len(inside) else pairs)[: shape[1]]
            pair_BK[user] = np.resize(chosen, shape[1])
            weight_BK[user, : len(chosen)] = data.weight_P[chosen]
            spoken_BK[user, : len(chosen)] = _few(data.weight_P[chosen], spoken, rng)
        question_BK = data.question_P[pair_BK]
        # One wording per question and pass: instructions are read once per pass, so each further one costs everybody.
        pick_Q = (rng.random(len(self._num_wordings_Q)) * self._num_wordings_Q).astype(np.int64)
        wording_BK = self._first_wording_Q[question_BK] + pick_Q[question_BK]
        wording_BK[rng.random(shape) < settings.instruction_dropout] = 0
        history_B = self._strangers(row_B, rng) if settings.shuffle_users else row_B
        if not settings.autoregressive_weight:
            spoken_BK[:] = False
        return PassPlan(index, row_B, history_B, pair_BK, wording_BK, weight_BK, spoken_BK)

    def shown(self, plan: PassPlan) -> PackedHistory:
        """The histories of a pass, over all processes, with what it leaves out of them."""
        settings = self._settings
        return thinned(
            self._data.history.take(plan.history_B),
            self._rng(3, plan.index),
            event_dropout=settings.event_dropout,
            number_dropout=settings.number_dropout,
        )

    def _users(self, index: int) -> Ints:
        """Users of a pass: of about one `as_of`, and of about one length. Every user once per epoch."""
        size = self._settings.users_per_step
        epoch, place = divmod(index, self._batches_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, *self._order(epoch))
        _, shuffled, starts = self._epoch
        return np.take(shuffled, np.arange(starts[place], starts[place] + size), mode="wrap")

    def _order(self, epoch: int) -> tuple[Ints, Ints]:
        """Rows of an epoch, and where each of its passes starts in them."""
        size = self._settings.users_per_step
        rng = self._rng(2, epoch)
        shuffled = rng.permutation(self._rows)
        as_of = self._data.history.as_of_us[shuffled]
        shuffled = shuffled[np.argsort(as_of, kind="stable")]
        as_of = np.sort(as_of)
        pool = (np.arange(len(shuffled)) - np.searchsorted(as_of, as_of)) // (size * _LENGTH_POOL)
        shuffled = shuffled[np.lexsort((self._lengths[shuffled], pool, as_of))]
        return shuffled, rng.permutation(self._batches_per_epoch) * size

    def _pool(self, own: list[Ints], rng: np.random.Generator) -> npt.NDArray[np.bool_]:
        """The distinct questions of a pass, drawn by share among those its users answered."""
        count_Q = np.bincount(np.concatenate([self._data.question_P[one] for one in own]), minlength=len(self._share_Q))
        wanted = self._settings.questions_per_step
        share_Q = self._share_Q * count_Q
        pool_Q = share_Q > 0
        if wanted and wanted < pool_Q.sum():
            pool_Q[:] = False
            pool_Q[rng.choice(len(share_Q), wanted, replace=False, p=share_Q / share_Q.sum())] = True
        return pool_Q

    def _strangers(self, row_B: Ints, rng: np.random.Generator) -> Ints:
        """Another user's row of the same `as_of` for each row, drawn anew each time, so that none can be learned."""
        as_of_us = self._data.history.as_of_us
        as_of_sorted = as_of_us[self._by_as_of]
        strangers = row_B.copy()
        for place, row in enumerate(row_B):
            first = np.searchsorted(as_of_sorted, as_of_us[row], "left")
            last = np.searchsorted(as_of_sorted, as_of_us[row], "right")
            for candidates in (self._by_as_of[first:last], self._by_as_of):
                others = candidates[self._user_U[candidates] != self._user_U[row]]
                if len(others):
                    strangers[place] = rng.choice(others)
                    break
        return strangers


def _few(weights: npt.NDArray[np.float32], count: int, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Marks `count` of the pairs, drawn by weight."""
    chosen = np.zeros(len(weights), bool)
    if count and len(weights):
        share = weights.astype(np.float64) / weights.sum(dtype=np.float64)
        chosen[rng.choice(len(weights), min(count, len(weights)), replace=False, p=share)] = True
    return chosen


def _answer_mass(data: UserQA, trained_P: npt.NDArray[np.bool_]) -> Floats:
    """`[A]` total weight of each answer."""
    mass_A: Floats = np.bincount(
        data.answer_P[trained_P], weights=data.weight_P[trained_P], minlength=len(data.answers)
    ).astype(np.float64)
    return mass_A


def _entropies(data: UserQA, mass_A: Floats) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """`[Q]` entropy of the answers of each question in nats, and whether two of them occur."""
    entropy_Q = np.zeros(len(data.questions))
    usable_Q = np.zeros(len(data.questions), bool)
    for index, question in enumerate(data.questions):
        mass = mass_A[list(question.answers)]
        share = mass[mass > 0] / max(mass.sum(), 1e-30)
        entropy_Q[index] = -(share * np.log(share)).sum()
        usable_Q[index] = len(share) > 1
    return entropy_Q, usable_Q


def question_shares(families: list[str], asked_Q: npt.NDArray[np.bool_], exponent: float, cap: float) -> Floats:
    """`[Q]` sampling shares: a family's is its size to the exponent, but no family is above `cap` unless all are.

    Example:
        >>> question_shares(["a", "a", "a", "b"], np.ones(4, bool), 1.0, 0.5).round(3).tolist()
        [0.167, 0.167, 0.167, 0.5]
    """
    names, family_Q = np.unique(np.array(families, dtype=object).astype(str), return_inverse=True)
    size_F = np.bincount(family_Q, weights=asked_Q, minlength=len(names))
    share_F = np.where(size_F > 0, size_F**exponent, 0.0)
    share_F /= share_F.sum()
    present = share_F > 0
    limit = max(cap, 1 / present.sum())
    capped = np.zeros(len(names), bool)
    while (over := (share_F > limit + 1e-12) & ~capped).any():
        capped |= over
        free = present & ~capped
        share_F[capped] = limit
        if free.any():
            share_F[free] *= (1 - limit * capped.sum()) / share_F[free].sum()
    share_Q = np.where(asked_Q, share_F[family_Q] / np.maximum(size_F[family_Q], 1), 0.0)
    shares: Floats = share_Q / share_Q.sum()
    return shares
