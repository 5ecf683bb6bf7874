"""Further questions, worded by a generator from facts about a few users."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from instructue_feast.question_specs import GeneratorConfig
from instructue_feast.user_qa.proposals import (
    Fact,
    Generator,
    Proposal,
    counter_answers,
    question_id,
    refusal,
)
from instructue_feast.user_qa.questions import Draft

FAMILY = "generated"
_Place = tuple[str, int]


@dataclass(slots=True)
class Generated:
    """What a generator added.

    Attributes:
        drafts: New questions.
        counts: Per question, how often each answer occurs.
        pairs: `(user, i, place of the question, place of the answer)`.
        dropped: Proposals refused, by reason.
    """

    drafts: list[Draft] = field(default_factory=list)
    counts: list[list[int]] = field(default_factory=list)
    pairs: list[tuple[str, int, int, int]] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)


def generate(labels: DataFrame, drafts: Sequence[Draft], config: GeneratorConfig, generator: Generator) -> Generated:
    """Shows facts about some users to a generator and keeps what the data support.

    Only answers of the train split are shown, so nothing about a held-out subject can come back. The rows are chosen by
    a hash, the facts of a row evenly over families.

    Args:
        labels: `user_id, i, train, held_out`.
        drafts: The known questions, by index.
        config: How many users and facts.
        generator: Words the questions.

    Raises:
        StorageError: The generator's endpoint cannot be reached.
    """
    first = np.cumsum([0, *(len(draft.answers) for draft in drafts)])
    order = F.xxhash64("user_id", "i", F.lit("generate"))
    chosen = labels.where(F.size("train") > 0).orderBy(order, "user_id", "i").limit(config.users)
    rows = chosen.select("user_id", "i", "train").collect()
    facts = [_facts(row["train"], drafts, first, config.facts, np.random.default_rng(n)) for n, row in enumerate(rows)]
    with ThreadPoolExecutor(generator.parallel) as pool:
        replies = list(pool.map(generator.propose, facts))
    dropped: Counter[str] = Counter()
    taken = {text.lower() for draft in drafts for text in (*draft.wordings, *draft.held_out_wordings)}
    kept: dict[str, dict[_Place, tuple[Proposal, Sequence[Fact]]]] = defaultdict(dict)
    for row, known, proposals in zip(rows, facts, replies, strict=True):
        dropped["reply without a proposal"] += not proposals
        for proposal in proposals:
            why = refusal(proposal, known)
            if why is None and proposal.question.lower() in taken:
                why = "wording of a known question"
            if why is None and (row["user_id"], row["i"]) in kept[proposal.question.lower()]:
                why = "same question twice"
            if why is None:
                kept[proposal.question.lower()][row["user_id"], row["i"]] = (proposal, known)
            else:
                dropped[why] += 1
    by_id = {draft.id: draft for draft in drafts}
    result = Generated(dropped={why: number for why, number in dropped.items() if number})
    for proposals_of in kept.values():
        _add(result, proposals_of, by_id)
    return result


def _add(result: Generated, proposals: dict[_Place, tuple[Proposal, Sequence[Fact]]], by_id: dict[str, Draft]) -> None:
    """Makes one question of all proposals that ask the same."""
    if not proposals:
        return
    answers = list(dict.fromkeys(proposal.answer for proposal, _ in proposals.values()))
    proposal, facts = next(iter(proposals.values()))
    if len(answers) < 2:  # somebody must be able to answer otherwise
        answers += [one for one in counter_answers(proposal, facts) if one not in answers]
    if len(answers) < 2:
        result.dropped["one answer only"] = result.dropped.get("one answer only", 0) + len(proposals)
        return
    about = by_id[proposal.claims[0][0]]
    counts = Counter(one.answer for one, _ in proposals.values())
    place = len(result.drafts)
    result.pairs += [(user, i, place, answers.index(one.answer)) for (user, i), (one, _) in proposals.items()]
    result.counts.append([counts[one] for one in answers])
    result.drafts.append(
        Draft(
            id=question_id(proposal.question),
            family=FAMILY,
            kind=FAMILY,
            source=about.source,
            days=about.days,
            subject=about.subject,
            wordings=(proposal.question,),
            held_out_wordings=(),
            answers=tuple(answers),
        )
    )


def _facts(
    pairs: Sequence[Any], drafts: Sequence[Draft], first: Any, number: int, rng: np.random.Generator
) -> list[Fact]:
    """Some of a user's answers, evenly over families."""
    families: dict[str, list[Any]] = defaultdict(list)
    for place in rng.permutation(len(pairs)).tolist():
        families[drafts[pairs[place]["question"]].family].append(pairs[place])
    chosen: list[Any] = []
    while len(chosen) < min(number, len(pairs)):
        chosen += [mine.pop() for mine in families.values() if mine]
    facts = []
    for pair in chosen[:number]:
        draft = drafts[pair["question"]]
        answer = draft.answers[pair["answer"] - int(first[pair["question"]])]
        others = tuple(one for one in draft.answers if one != answer)
        facts.append(Fact(draft.id, draft.wordings[0], answer, others))
    return facts
