"""From a spec and what was measured to questions with their wordings and closed sets of answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import xxhash

from instructue_feast.errors import ConfigError
from instructue_feast.history.render import normalise
from instructue_feast.question_specs import (
    AmountSpec,
    AttributeSpec,
    ChangeSpec,
    FavouriteSpec,
    InactiveSpec,
    OccursSpec,
    QuestionSpec,
    fill,
)
from instructue_feast.user_qa.wordings import default_words

HELD_OUT_ONE_IN = 10
PARTS_OF_DAY = ("night", "morning", "afternoon", "evening")
"""Quarters of the local day, from midnight."""
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
WEEKEND = ("weekdays", "the weekend")


def is_held_out(subject: str) -> bool:
    """Whether questions about a subject are never trained on: a fixed tenth, by hash, whatever the project.

    >>> [name for name in ("tea", "coffee", "spend_level", "age") if is_held_out(name)]
    ['spend_level', 'age']
    """
    return xxhash.xxh64_intdigest(subject.lower().encode()) % HELD_OUT_ONE_IN == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A question before it is numbered.

    Attributes:
        id: Its name: `family:subject`, or the family alone.
        family: Id of its spec.
        kind: Kind of its spec.
        source: Source it is about.
        days: Window; negative looks back, 0 is a fact known at `as_of`.
        subject: Text it is about; the family's id where it has none.
        wordings: Canonical wording first.
        held_out_wordings: For tests only.
        answers: The closed set of answer texts.
    """

    id: str
    family: str
    kind: str
    source: str
    days: int
    subject: str
    wordings: tuple[str, ...]
    held_out_wordings: tuple[str, ...]
    answers: tuple[str, ...]

    @property
    def held_out(self) -> bool:
        """Whether its subject is never trained on."""
        return is_held_out(self.subject)


def draft_question(spec: QuestionSpec, *, subject: str | None = None, values: Sequence[str] = ()) -> Draft:
    """Words a question.

    Args:
        spec: The family.
        subject: Value of the subject column, for `occurs`.
        values: The closed set, for `favourite` and `attribute`.

    Example:
        >>> spec = OccursSpec(kind="occurs", id="buys", source="bill", subject="item", yes="Yes, {subject}.", no="No.")
        >>> draft_question(spec, subject="TEA").answers
        ('Yes, tea.', 'No.')
    """
    words = default_words(spec)
    source = spec.column if isinstance(spec, AttributeSpec) else spec.source
    names = {"days": spec.days, "source": source.replace("_", " ")}
    about = subject_text(subject) if subject is not None else spec.id
    if isinstance(spec, OccursSpec | InactiveSpec):
        answers = [
            fill(given or default, subject=about, **names)
            for given, default in zip((spec.yes, spec.no), words.answers, strict=True)
        ]
    elif isinstance(spec, AmountSpec | ChangeSpec):
        answers = [fill(template, **names) for template in spec.levels or words.answers]
    else:
        assert isinstance(spec, FavouriteSpec | AttributeSpec)
        answers = [fill(spec.answer or words.answers[0], value=value, **names) for value in values]
    return Draft(
        id=spec.id if subject is None else f"{spec.id}:{about}",
        family=spec.id,
        kind=spec.kind,
        source=spec.source,
        days=spec.signed_days,
        subject=about,
        wordings=tuple(fill(one, subject=about, **names) for one in spec.wordings or words.wordings),
        held_out_wordings=tuple(fill(one, subject=about, **names) for one in spec.held_out_wordings or words.held_out),
        answers=tuple(sentence(one) for one in answers),
    )


def require_distinct_wordings(drafts: Sequence[Draft]) -> None:
    """Refuses two questions that can be asked in the same words, held-out wordings included.

    One text would then have two answers, and a held-out wording or subject would be trained under another name.

    Raises:
        ConfigError: With the families' names.
    """
    owners: dict[str, Draft] = {}
    for draft in drafts:
        for text in dict.fromkeys((*draft.wordings, *draft.held_out_wordings)):
            owner = owners.setdefault(" ".join(text.lower().split()), draft)
            if owner is not draft:
                raise ConfigError(
                    f"question families {owner.family} and {draft.family} ask in the same words: {text!r}",
                    "give one of them other `wordings` and `held_out_wordings`",
                )


def subject_text(value: str) -> str:
    """A raw value as questions name it: lower case, without markup or control characters.

    >>> subject_text(" DOG  FOOD ")
    'dog food'
    """
    return normalise(value.lower())


def sentence(text: str) -> str:
    """Capitalises the first letter, so that `{value}` can stand first.

    >>> sentence("spend will fall.")
    'Spend will fall.'
    """
    return text[:1].upper() + text[1:]
