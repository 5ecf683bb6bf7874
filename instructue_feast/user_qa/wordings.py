"""How each kind of question is worded when a spec brings no wordings of its own."""

from __future__ import annotations

from dataclasses import dataclass

from instructue_feast.question_specs import (
    AmountSpec,
    AttributeSpec,
    ChangeSpec,
    FavouriteSpec,
    InactiveSpec,
    OccursSpec,
    QuestionSpec,
)


@dataclass(frozen=True, slots=True)
class Words:
    """Templates of one kind and window.

    Attributes:
        wordings: Canonical one first.
        held_out: For tests only.
        answers: Yes and no; the levels; or one template with `{value}`.
    """

    wordings: tuple[str, ...]
    held_out: tuple[str, ...]
    answers: tuple[str, ...]


_OCCURS = Words(
    (
        "Will this user have {subject} in {source} in the next {days} days?",
        "Is {subject} going to appear in this user's {source} within {days} days?",
        "Over the coming {days} days, does this user's {source} record include {subject}?",
    ),
    ("Looking {days} days ahead, should {subject} be expected in this user's {source}?",),
    ("Yes, {source} with {subject}.", "No {source} with {subject}."),
)
_OCCURRED = Words(
    (
        "Did this user have {subject} in {source} in the last {days} days?",
        "Has {subject} appeared in this user's {source} within the past {days} days?",
        "Looking back {days} days, does this user's {source} record include {subject}?",
    ),
    ("Is there any trace of {subject} in this user's {source} since {days} days ago?",),
    ("Yes, there was {source} with {subject}.", "There was no {source} with {subject}."),
)
_ANY = Words(
    (
        "Will this user have any {source} activity in the next {days} days?",
        "Is there going to be {source} activity of this user within {days} days?",
        "Does this user come back to {source} over the coming {days} days?",
    ),
    ("Looking {days} days ahead, should any {source} activity be expected of this user?",),
    ("Yes, there will be {source} activity.", "No, there will be no {source} activity."),
)
_WAS_ANY = Words(
    (
        "Did this user have any {source} activity in the last {days} days?",
        "Has there been {source} activity of this user within the past {days} days?",
        "Looking back {days} days, is there any {source} activity of this user?",
    ),
    ("Was any {source} activity of this user seen since {days} days ago?",),
    ("Yes, there was {source} activity.", "No, there was no {source} activity."),
)
_INACTIVE = Words(
    (
        "Will this user have no {source} activity at all in the next {days} days?",
        "Is this user about to be absent from {source} for {days} days?",
        "Do the coming {days} days pass without any {source} activity of this user?",
    ),
    ("Should this user be expected to go silent in {source} for the {days} days ahead?",),
    ("Yes, this user will be inactive.", "No, this user will stay active."),
)
_WAS_INACTIVE = Words(
    (
        "Was this user without any {source} activity in the last {days} days?",
        "Has this user been absent from {source} for {days} days?",
        "Did the past {days} days go by without {source} activity of this user?",
    ),
    ("Has this user been silent in {source} for the {days} days behind us?",),
    ("Yes, this user was inactive.", "No, this user was active."),
)
_AMOUNT = Words(
    (
        "How much {source} activity will this user have in the next {days} days?",
        "What level of {source} activity is ahead for this user over {days} days?",
        "Compared with other users, how strong is this user's {source} activity in the coming {days} days?",
    ),
    ("Looking {days} days ahead, where does this user rank in {source} activity?",),
    ("Low {source} activity.", "Medium {source} activity.", "High {source} activity."),
)
_WAS_AMOUNT = Words(
    (
        "How much {source} activity did this user have in the last {days} days?",
        "What level of {source} activity did this user reach over the past {days} days?",
        "Compared with other users, how strong was this user's {source} activity in the last {days} days?",
    ),
    ("Looking back {days} days, where does this user rank in {source} activity?",),
    ("{source} activity was low.", "{source} activity was medium.", "{source} activity was high."),
)
_CHANGE = Words(
    (
        "How will this user's {source} activity change in the next {days} days?",
        "Against the last {days} days, does this user's {source} activity fall, hold or rise?",
        "Is this user's {source} activity of the coming {days} days below, near or above what it was before?",
    ),
    ("Which way is this user's {source} activity heading over {days} days?",),
    ("{source} activity falls.", "{source} activity holds.", "{source} activity rises."),
)
_FAVOURITE = Words(
    (
        "What will this user's {source} activity mostly be about in the next {days} days?",
        "Which kind of {source} activity comes first for this user over the coming {days} days?",
        "What leads this user's {source} activity in the {days} days ahead?",
    ),
    ("Looking {days} days ahead, what dominates this user's {source} activity?",),
    ("Mostly {value}.",),
)
_WAS_FAVOURITE = Words(
    (
        "What was this user's {source} activity mostly about in the last {days} days?",
        "Which kind of {source} activity came first for this user over the past {days} days?",
        "What led this user's {source} activity in the last {days} days?",
    ),
    ("Looking back {days} days, what dominated this user's {source} activity?",),
    ("It was mostly {value}.",),
)
_ATTRIBUTE = Words(
    (
        "What is this user's {source}?",
        "Which {source} does this user have?",
        "How would this user's {source} be described?",
    ),
    ("Into which group of {source} does this user fall?",),
    ("{value}.",),
)


def default_words(spec: QuestionSpec) -> Words:
    """The templates of a spec's kind and window.

    For `attribute`, `{source}` stands for the column.
    """
    past = spec.window == "past"
    if isinstance(spec, OccursSpec):
        if spec.subject is None:
            return _WAS_ANY if past else _ANY
        return _OCCURRED if past else _OCCURS
    if isinstance(spec, InactiveSpec):
        return _WAS_INACTIVE if past else _INACTIVE
    if isinstance(spec, AmountSpec):
        return _WAS_AMOUNT if past else _AMOUNT
    if isinstance(spec, ChangeSpec):
        return _CHANGE
    if isinstance(spec, FavouriteSpec):
        return _WAS_FAVOURITE if past else _FAVOURITE
    assert isinstance(spec, AttributeSpec)
    return _ATTRIBUTE
