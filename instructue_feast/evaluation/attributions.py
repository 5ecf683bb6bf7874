"""Whether attributions can be trusted: `explain` against leaving texts out, and against what is known of made-up users.

Users are drawn by seed among those with at least `MIN_TEXTS` texts: the ranks of fewer say little. Each is asked about
under one instruction, so that a user counts once and intervals over users hold.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import spearmanr

from instructue_feast.evaluation.extracts import Phrasebook
from instructue_feast.evaluation.metrics import Estimate, bootstrap_weights
from instructue_feast.history.pack import PackedHistory
from instructue_feast.inference.embedder import UserEmbedder
from instructue_feast.inference.explain import explain
from instructue_feast.instructions import Instruction
from instructue_feast.model.layout import Ints

# U = users (those drawn, in what is measured), K = instructions, I = interests, N = texts, L = texts of a user,
# D = draws of the bootstrap

Floats = npt.NDArray[np.float64]
OnUsers = Callable[[int, int], None]
"""Called with users done and users in all."""

MIN_TEXTS = 10
"""Texts a user needs to be drawn."""

TOP = 5
"""Texts with the highest scores, as somebody who asks why would read them."""

_RANKED = ("focus", "gates")
"""What texts are ranked by to look for the instruction's own interest."""

HIGH = 0.6
"""A rank correlation above this counts as agreement."""

_AT_ONCE = 8
"""Users explained together: bounds what one backward pass keeps, and progress shows."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How well the quick scores agree with leaving each text out.

    Attributes:
        correlation_U: Rank correlation of the two scores of each user's texts; 0 where either scores all texts alike.
        instructions: How many different instructions the users were explained under.
        mean: Mean over users.
    """

    correlation_U: Floats
    instructions: int
    mean: Estimate

    def document(self) -> dict[str, Any]:
        """JSON-ready values; without users, their number alone."""
        users = len(self.correlation_U)
        if not users:
            return {"users": 0}
        return {
            **self.mean.as_dict("mean"),
            "median": round(float(np.median(self.correlation_U)), 5),
            f"share_above_{HIGH:g}": round(float((self.correlation_U > HIGH).mean()), 5),
            "users": users,
            "instructions": self.instructions,
        }


@dataclass(frozen=True, slots=True)
class OwnInterest:
    """Whether the texts that rank highest are about the interest that the instruction asks about.

    Attributes:
        share_U: By `focus` (share of the focus token) and by `gates` (score of moving the embedding away from the blank
            user): share of the `TOP` highest texts of each user that are about it. By `chance`: share of all texts of
            the user that are, what a random choice would find.
        shares: Their means.
        differences: Of `focus` and `gates` to `chance`, paired.
    """

    share_U: Mapping[str, Floats]
    shares: Mapping[str, Estimate]
    differences: Mapping[str, Estimate]

    def document(self) -> dict[str, Any]:
        """JSON-ready values; without users, their number alone."""
        users = len(self.share_U["chance"])
        if not users:
            return {"users": 0}
        shares: dict[str, Any] = {}
        for name, one in self.shares.items():
            shares |= one.as_dict(name)
        differences = {f"{name}-chance": one.as_dict("difference") for name, one in self.differences.items()}
        return {**shares, "differences": differences, "users": users, "texts": TOP}


@dataclass(frozen=True, slots=True)
class Attributions:
    """What a suite measured of `explain`.

    Attributes:
        agreement: With leaving texts out.
        own_interest: With what is known; `None` where nothing is.
    """

    agreement: Agreement
    own_interest: OwnInterest | None = None

    def document(self) -> dict[str, Any]:
        """JSON-ready values."""
        found = {"agreement": self.agreement.document()}
        if self.own_interest is not None:
            found["own_interest"] = self.own_interest.document()
        return found


@dataclass(frozen=True, slots=True)
class Asked:
    """Who is explained under which instruction.

    Attributes:
        row_U: Row of each drawn user in the history.
        instruction_U: Which of the instructions each gets.
    """

    row_U: Ints
    instruction_U: Ints


def measure_agreement(
    embedder: UserEmbedder,
    history: PackedHistory,
    texts: Sequence[str],
    *,
    users: int,
    seed: int = 0,
    on_users: OnUsers | None = None,
) -> Agreement:
    """Rank correlation of `explain` by `gates` and by `leave_one_out`, over the texts of each drawn user.

    Args:
        embedder: The embedder.
        history: Users to draw from.
        texts: Texts of the instructions, given to the users in turn; one that comes again counts once.
        users: How many users to draw.
        seed: Of the users, and of the bootstrap draws.
        on_users: Called as users are done.
    """
    distinct = list(dict.fromkeys(texts))
    asked = draw_in_turn(history, len(distinct), users, seed=seed)
    correlation_U = np.zeros(len(asked.row_U))
    for own, places in _together(asked, on_users):
        part, instruction = history.take(asked.row_U[places]), Instruction(f"i{own}", distinct[own])
        quick = explain(embedder, part, instruction, method="gates")
        exact = explain(embedder, part, instruction, method="leave_one_out")
        correlation_U[places] = [
            rank_correlation(one.scores, other.scores) for one, other in zip(quick, exact, strict=True)
        ]
    return Agreement(correlation_U, len(np.unique(asked.instruction_U)), mean_over_users(correlation_U, seed=seed))


def measure_own_interest(
    embedder: UserEmbedder,
    history: PackedHistory,
    book: Phrasebook,
    texts: Sequence[str],
    words: Sequence[Sequence[str]],
    strength_UI: Floats,
    *,
    users: int,
    seed: int = 0,
    on_users: OnUsers | None = None,
) -> OwnInterest:
    """Share of the top texts that are about the instruction's interest, beside the share of all texts.

    Drawn are users who have that interest and another one, so that there is something to choose between.

    Args:
        embedder: The embedder.
        history: Users to draw from.
        book: Their texts.
        texts: `[I]` texts of the instructions; instruction `i` asks about interest `i`.
        words: `[I]` words of each interest; nobody is asked about an interest without words.
        strength_UI: Strength of each interest; 0 for none.
        users: How many users to draw, spread over the interests.
        seed: Of the users, and of the bootstrap draws.
        on_users: Called as users are done.

    Raises:
        DataError: A text of a history is not in the phrasebook.
    """
    with_words = [interest for interest, own in enumerate(words) if own]
    asked = draw_by_interest(history, strength_UI, with_words, users, seed=seed)
    share_U = {name: np.zeros(len(asked.row_U)) for name in (*_RANKED, "chance")}
    about_N: dict[int, npt.NDArray[np.bool_]] = {}
    for own, places in _together(asked, on_users):
        if own not in about_N:
            about_N[own] = is_about(book.texts, words[own])
        part, instruction = history.take(asked.row_U[places]), Instruction(f"i{own}", texts[own])
        for place, found in zip(places, explain(embedder, part, instruction, method="gates"), strict=True):
            about_L = about_N[own][book.rows(found.text_ids)]
            for name, score_L in zip(_RANKED, (found.focus_weights, found.scores), strict=True):
                share_U[name][place] = about_L[np.argsort(-score_L, kind="stable")[:TOP]].mean()
            share_U["chance"][place] = about_L.mean()
    return OwnInterest(
        share_U,
        {name: mean_over_users(one, seed=seed) for name, one in share_U.items()},
        {name: mean_over_users(share_U[name] - share_U["chance"], seed=seed) for name in _RANKED},
    )


def rank_correlation(one_L: npt.NDArray[np.float32], other_L: npt.NDArray[np.float32]) -> float:
    """Spearman's, with ties; 0 where one side is all alike and so ranks nothing.

    >>> rank_correlation(np.float32([1, 2, 3]), np.float32([0, 5, 9]))
    1.0
    >>> rank_correlation(np.float32([1, 2, 3]), np.float32([4, 4, 4]))
    0.0
    """
    if np.ptp(one_L) == 0 or np.ptp(other_L) == 0:
        return 0.0
    return float(spearmanr(one_L, other_L).statistic)


def is_about(texts: Sequence[str], words: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Which texts contain a word, whatever their case.

    >>> is_about(["Pet Hotel, 30-100", "bakery, 10-30"], ["hotel", "airline"]).tolist()
    [True, False]
    """
    pattern = re.compile("|".join(re.escape(word.lower()) for word in words))
    return np.array([pattern.search(text.lower()) is not None for text in texts], bool)


def draw_in_turn(history: PackedHistory, instructions: int, users: int, *, seed: int = 0) -> Asked:
    """Draws users with enough texts; user `i` of the draw gets instruction `i` modulo their number."""
    enough = np.flatnonzero(history.num_tokens >= MIN_TEXTS)
    row_U = np.random.default_rng(seed).permutation(enough)[:users]
    return Asked(row_U, np.arange(len(row_U)) % instructions)


def draw_by_interest(
    history: PackedHistory, strength_UI: Floats, interests: Sequence[int], users: int, *, seed: int = 0
) -> Asked:
    """Draws users with enough texts and two interests or more, one interest after the other, nobody twice.

    Args:
        history: Users to draw from.
        strength_UI: Above 0 where a user has an interest.
        interests: Those to ask about.
        users: How many; fewer when they run out.
        seed: Of the draw.
    """
    fit_U = (history.num_tokens >= MIN_TEXTS) & ((strength_UI > 0).sum(1) > 1)
    order = np.random.default_rng(seed).permutation(np.flatnonzero(fit_U))
    waiting = {interest: deque(order[strength_UI[order, interest] > 0].tolist()) for interest in interests}
    interest_of: dict[int, int] = {}
    while len(interest_of) < users and any(waiting.values()):
        for interest, queue in waiting.items():
            while queue and queue[0] in interest_of:
                queue.popleft()
            if queue and len(interest_of) < users:
                interest_of[queue.popleft()] = interest
    return Asked(np.array(list(interest_of), np.int64), np.array(list(interest_of.values()), np.int64))


def mean_over_users(value_U: Floats, *, seed: int = 0) -> Estimate:
    """Mean with its bootstrap interval; NaN without users."""
    if not len(value_U):
        return Estimate.of(float("nan"), value_U)
    return Estimate.of(float(value_U.mean()), bootstrap_weights(len(value_U), seed=seed) @ value_U / len(value_U))


def _together(asked: Asked, on_users: OnUsers | None) -> Iterator[tuple[int, Ints]]:
    """An instruction and the places of some users who get it, until all had their turn."""
    done = 0
    for instruction in np.unique(asked.instruction_U).tolist():
        members = np.flatnonzero(asked.instruction_U == instruction)
        for first in range(0, len(members), _AT_ONCE):
            places = members[first : first + _AT_ONCE]
            yield instruction, places
            done += len(places)
            if on_users is not None:
                on_users(done, len(asked.row_U))
