"""Questions and answers that a chat model words, and the filter that keeps those which the data support.

A generator sees *facts*: answered questions of one user, whose id it never sees. What it proposes must name the facts
it rests on, as claims; a proposal with a claim that is not exactly what the data say is dropped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from instructue_feast.history.render import normalise

MAX_CHARS = 300
"""Longer questions and answers are dropped."""

_TASK = """\
Below are facts about one user of a service, one per line as: id | question | answer.
Write up to {number} new questions about this user with short answers, in other words than the facts use. Every answer
must follow from the facts alone. Reply with JSON lines only, one object per question:
{{"question": "...", "answer": "...", "claims": {{"<id of a fact>": "<its answer, word for word>"}}}}

Facts:
{facts}"""


@dataclass(frozen=True, slots=True)
class Fact:
    """An answered question of one user.

    Attributes:
        question_id: Which question.
        question: Its canonical wording.
        answer: Its answer.
        others: The other answers of its closed set.
    """

    question_id: str
    question: str
    answer: str
    others: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Proposal:
    """A question and an answer, and the facts they rest on.

    Attributes:
        question: New wording.
        answer: New wording.
        claims: `(question_id, answer)` of each fact.
    """

    question: str
    answer: str
    claims: tuple[tuple[str, str], ...]


class Generator(Protocol):
    """Words questions and answers.

    Attributes:
        name: What the manifest calls it.
        parallel: How many calls of `propose` may run at the same time.
    """

    name: str
    parallel: int

    def propose(self, facts: Sequence[Fact]) -> list[Proposal]:
        """Proposes questions with answers about one user."""
        ...


class TemplateGenerator:
    """Says what the templates say: every fact as it is. The default, and a model for other generators."""

    name = "templates"
    parallel = 1

    def propose(self, facts: Sequence[Fact]) -> list[Proposal]:
        """One proposal per fact.

        Example:
            >>> TemplateGenerator().propose([Fact("buys:tea", "Buys tea?", "Yes.", ("No.",))])
            [Proposal(question='Buys tea?', answer='Yes.', claims=(('buys:tea', 'Yes.'),))]
        """
        return [Proposal(one.question, one.answer, ((one.question_id, one.answer),)) for one in facts]


def render_facts(facts: Sequence[Fact]) -> str:
    """One line per fact, for a prompt."""
    return "\n".join(f"{one.question_id} | {one.question} | {one.answer}" for one in facts)


def chat_messages(facts: Sequence[Fact], number: int = 6) -> list[dict[str, str]]:
    """What a chat model is asked, in the form of Hugging Face chat templates and of OpenAI's protocol."""
    return [{"role": "user", "content": _TASK.format(number=number, facts=render_facts(facts))}]


def parse_proposals(reply: str) -> list[Proposal]:
    """Reads a chat model's reply; lines that are not what was asked for are passed over.

    Example:
        >>> parse_proposals('{"question": "Tea?", "answer": "Yes.", "claims": {"buys:tea": "Yes."}}')
        [Proposal(question='Tea?', answer='Yes.', claims=(('buys:tea', 'Yes.'),))]
    """
    found = []
    for line in reply.splitlines():
        value = _json(line.strip().rstrip(","))
        if isinstance(value, dict) and isinstance(value.get("claims"), dict):
            texts = [value.get("question"), value.get("answer"), *value["claims"].values()]
            if all(isinstance(one, str) for one in texts):
                claims = tuple((str(name), answer) for name, answer in value["claims"].items())
                found.append(Proposal(normalise(texts[0]), normalise(texts[1]), claims))
    return found


def refusal(proposal: Proposal, facts: Sequence[Fact]) -> str | None:
    """Why a proposal must be dropped; `None` when the data support it.

    Example:
        >>> facts = [Fact("buys:tea", "Buys tea?", "No.", ("Yes.",))]
        >>> refusal(Proposal("Tea?", "Sure.", (("buys:tea", "Yes."),)), facts)
        'claim not supported'
    """
    known = {one.question_id: one.answer for one in facts}
    if not proposal.claims:
        return "no claim"
    if any(name not in known for name, _ in proposal.claims):
        return "claim about an unknown question"
    if any(known[name] != answer for name, answer in proposal.claims):
        return "claim not supported"
    texts = (proposal.question, proposal.answer)
    if any(one in ("", "empty") for one in texts):
        return "empty text"
    return "text too long" if any(len(one) > MAX_CHARS for one in texts) else None


def counter_answers(proposal: Proposal, facts: Sequence[Fact]) -> tuple[str, ...]:
    """What would be said in the proposal's place of a user to whom its first claim does not apply."""
    first = proposal.claims[0][0]
    return next(one.others for one in facts if one.question_id == first)


def question_id(question: str) -> str:
    """Stable id of a generated question."""
    return f"generated:{hashlib.sha256(question.lower().encode()).hexdigest()[:12]}"


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None
