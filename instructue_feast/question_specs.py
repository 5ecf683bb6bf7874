"""`user_qa:` of `instructue.yaml`: which questions are asked about users, over which source and window.

A spec is a *family* of questions. `occurs` with a subject column asks one question per frequent value; every other
kind asks a single question. Nothing here reads data; the Spark job measures rates and levels.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from zoneinfo import available_timezones

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from instructue_feast.errors import ConfigError, did_you_mean, listed

_STRICT = ConfigDict(extra="forbid")
_ID = re.compile(r"^[a-z][a-z0-9_]{0,62}$")
_PLACE = re.compile(r"\{([^{}]*)\}")
WORDING_PLACES = ("subject", "days", "source")
"""What a wording, a yes and a no may name in braces."""

VALUE_PLACES = ("value", "days", "source")
"""What an answer that names a value may name in braces."""

Measure = Literal["count", "sum", "mean", "share", "distinct", "sum_per"]
_NEEDS: dict[str, tuple[str, ...]] = {
    "count": (), "sum": ("column",), "mean": ("column",), "share": ("condition",), "distinct": ("column",),
    "sum_per": ("column", "per"),
}  # fmt: skip


def fill(template: str, **values: object) -> str:
    """Puts values into `{name}` places; other braces are refused when the config is read.

    >>> fill("{subject} in {days} days", subject="tea", days=7)
    'tea in 7 days'
    """
    return _PLACE.sub(lambda match: str(values[match.group(1)]), template)


def places(template: str) -> set[str]:
    """The names in braces.

    >>> sorted(places("{subject} in {days} days"))
    ['days', 'subject']
    """
    return set(_PLACE.findall(template))


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class _Spec:
    """What all kinds share.

    Attributes:
        id: Name of the family.
        source: Source the questions are about.
        window: `future` is `[as_of, as_of + days)`, `past` is `[as_of - days, as_of)`.
        days: Length of the window.
        wordings: Templates, the canonical one first; the kind's own when left out.
        held_out_wordings: Templates for tests only.
    """

    id: str
    source: str
    window: Literal["past", "future"] = "future"
    days: int = Field(default=30, ge=1, le=3660)
    wordings: tuple[str, ...] = ()
    held_out_wordings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not _ID.match(self.id):
            raise ConfigError(f"question family id {self.id!r}", "use lower-case letters, digits and underscores")
        allowed = set(WORDING_PLACES) - (set() if _has_subject(self) else {"subject"})
        for template in (*self.wordings, *self.held_out_wordings):
            _check_template(self.id, template, allowed)
        if len(set(self.wordings + self.held_out_wordings)) < len(self.wordings + self.held_out_wordings):
            raise ConfigError(f"question family {self.id}: a wording stands there twice", "remove the copy")

    @property
    def signed_days(self) -> int:
        """The window as tables hold it: negative looks back, 0 is a fact known at `as_of`."""
        return -self.days if self.window == "past" else self.days


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class OccursSpec(_Spec):
    """Yes or no: is there any event in the window? With `subject`: any event whose column has that value.

    Attributes:
        subject: Column; one question per frequent value, compared in lower case.
        max_subjects: How many values at most, the most frequent first.
        min_rate: Lowest share of yes over all asked users and `as_of`s.
        max_rate: Highest such share.
        yes: Answer template.
        no: Answer template.
    """

    kind: Literal["occurs"]
    subject: str | None = None
    max_subjects: int = Field(default=200, ge=1, le=10_000)
    min_rate: float = Field(default=0.02, ge=0, le=1)
    max_rate: float = Field(default=0.98, ge=0, le=1)
    yes: str = ""
    no: str = ""

    def __post_init__(self) -> None:
        _Spec.__post_init__(self)
        allowed = set(WORDING_PLACES) - (set() if self.subject else {"subject"})
        for template in filter(None, (self.yes, self.no)):
            _check_template(self.id, template, allowed)
        _check_apart(self.id, self.yes, self.no)
        if self.min_rate >= self.max_rate:
            raise ConfigError(f"question family {self.id}: min_rate is not below max_rate", "widen the range")


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class InactiveSpec(_Spec):
    """Yes or no: is there no event at all in the window?"""

    kind: Literal["inactive"]
    yes: str = ""
    no: str = ""

    def __post_init__(self) -> None:
        _Spec.__post_init__(self)
        for template in filter(None, (self.yes, self.no)):
            _check_template(self.id, template, {"days", "source"})
        _check_apart(self.id, self.yes, self.no)


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class _Measured(_Spec):
    """What is measured over the events of a window.

    Attributes:
        measure: `count` of events; `sum` or `mean` of `column`; `share` of the events that meet `condition`;
            number of `distinct` values of `column`; `sum_per`: sum of `column` per distinct value of `per`.
        column: Column of the raw table.
        per: Column of the raw table, for `sum_per`.
        condition: SQL condition, for `share`.
    """

    measure: Measure = "count"
    column: str | None = None
    per: str | None = None
    condition: str | None = None

    def __post_init__(self) -> None:
        _Spec.__post_init__(self)
        needed = _NEEDS[self.measure]
        for name in ("column", "per", "condition"):
            if (getattr(self, name) is not None) != (name in needed):
                raise ConfigError(
                    f"question family {self.id}: measure {self.measure} {'needs' if name in needed else 'takes no'} "
                    f"`{name}`",
                    f"measure {self.measure} takes {listed(needed) if needed else 'nothing else'}",
                )


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class AmountSpec(_Measured):
    """Which level a measure has in the window; levels are cut at quantiles, or at `edges`.

    Attributes:
        levels: Answers, the lowest level first.
        edges: Lowest value of each level but the first; quantiles of the data when left out.
    """

    kind: Literal["amount"]
    levels: tuple[str, ...] = ()
    edges: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _Measured.__post_init__(self)
        _check_levels(self.id, self.levels, None)
        if self.edges and (len(self.edges) != (len(self.levels) or 3) - 1 or sorted(set(self.edges)) != [*self.edges]):
            raise ConfigError(f"question family {self.id}: edges", "give one ascending edge less than there are levels")


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class ChangeSpec(_Measured):
    """A measure in `[as_of, as_of + days)` against `[as_of - days, as_of)`: down, about the same, or up.

    Attributes:
        threshold: Relative change that counts as down or up.
        levels: Three answers: down, about the same, up; or two: down, not down.
    """

    kind: Literal["change"]
    threshold: float = Field(default=0.3, gt=0, lt=1)
    levels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _Measured.__post_init__(self)
        _check_levels(self.id, self.levels, (2, 3))
        if self.window != "future":
            raise ConfigError(f"question family {self.id}: change looks ahead", "leave out `window`")


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class FavouriteSpec(_Measured):
    """The value with the highest measure in the window, out of the most common such values.

    Values that are held-out subjects are not among the answers; users whose highest they are are not asked.

    Attributes:
        subject: Column whose values compete, in lower case.
        clock: In place of `subject`: the local time of the event as part of the day, weekday, or weekend or not.
        zone: Zone of that local time, such as `Europe/Berlin`; the source's `time_zone` when left out.
        exclude: Values that do not compete.
        max_values: Size of the closed set of answers.
        answer: Template with `{value}`.
    """

    kind: Literal["favourite"]
    subject: str | None = None
    clock: Literal["part_of_day", "weekday", "weekend"] | None = None
    zone: str | None = None
    exclude: tuple[str, ...] = ()
    max_values: int = Field(default=12, ge=2, le=1000)
    answer: str = ""

    def __post_init__(self) -> None:
        _Measured.__post_init__(self)
        if (self.subject is None) == (self.clock is None):
            raise ConfigError(f"question family {self.id}", "give exactly one of `subject` and `clock`")
        if self.zone is not None and self.zone not in available_timezones():
            hint = did_you_mean(self.zone, available_timezones())
            raise ConfigError(f"question family {self.id}: unknown time zone {self.zone!r}", hint)
        _check_value_template(self.id, self.answer)


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class AttributeSpec(_Spec):
    """The value of a column of a tabular source at `as_of`; users without one are not asked.

    Attributes:
        column: Column of the raw table.
        max_values: Size of the closed set of answers, the most common first.
        answer: Template with `{value}`.
    """

    kind: Literal["attribute"]
    column: str
    max_values: int = Field(default=12, ge=2, le=1000)
    answer: str = ""

    def __post_init__(self) -> None:
        _Spec.__post_init__(self)
        _check_value_template(self.id, self.answer)

    @property
    def signed_days(self) -> int:
        """A fact known at `as_of`."""
        return 0


QuestionSpec = OccursSpec | InactiveSpec | AmountSpec | ChangeSpec | FavouriteSpec | AttributeSpec
MeasuredSpec = AmountSpec | ChangeSpec | FavouriteSpec
AnySpec = Annotated[QuestionSpec, Field(discriminator="kind")]
KINDS: dict[str, type] = {
    "occurs": OccursSpec, "inactive": InactiveSpec, "amount": AmountSpec, "change": ChangeSpec,
    "favourite": FavouriteSpec, "attribute": AttributeSpec,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class GeneratorConfig:
    """What words questions beside the templates: a chat model that sees facts about single users.

    Attributes:
        kind: `templates` asks no model; `hf` loads a Hugging Face chat model; `openai` calls an endpoint that speaks
            the OpenAI chat protocol.
        model: Folder or name of the model.
        base_url: Address of the endpoint, up to and with `/v1`.
        key_env: Environment variable that holds the endpoint's key; left out, no key is sent.
        users: Users and `as_of`s that it gets to see.
        facts: Answered questions it sees of each; none of them of a held-out subject.
        max_new_tokens: Upper bound of one reply.
        timeout_seconds: How long one reply of an endpoint may take.
        retries: How often a busy or failing endpoint is asked again.
    """

    kind: Literal["templates", "hf", "openai"] = "templates"
    model: str = ""
    base_url: str = ""
    key_env: str | None = None
    users: int = Field(default=200, ge=1)
    facts: int = Field(default=12, ge=1, le=200)
    max_new_tokens: int = Field(default=512, ge=1)
    timeout_seconds: float = Field(default=60.0, gt=0)
    retries: int = Field(default=3, ge=0)

    def __post_init__(self) -> None:
        if self.kind != "templates" and not self.model:
            raise ConfigError(f"`user_qa.generator`: {self.kind} needs a `model`", "name the chat model")
        if self.kind == "openai" and not self.base_url.startswith(("http://", "https://")):
            raise ConfigError("`user_qa.generator`: openai needs a `base_url`", "write it as https://host/v1")


@dataclass(frozen=True, slots=True, kw_only=True, config=_STRICT)
class UserQAConfig:
    """The questions of a project.

    Attributes:
        questions: The families.
        min_events: A user is asked about at an `as_of` only with this many events in the packed history.
        sample: Share of the users that is asked about, chosen by a hash of the user id.
        generator: What words further questions.
    """

    questions: tuple[AnySpec, ...]
    min_events: int = Field(default=1, ge=1)
    sample: float = Field(default=1.0, gt=0, le=1)
    generator: GeneratorConfig = Field(default_factory=GeneratorConfig)

    def __post_init__(self) -> None:
        if not self.questions:
            raise ConfigError("`user_qa.questions` is empty", "declare at least one question family")
        ids = [spec.id for spec in self.questions]
        twice = sorted({one for one in ids if ids.count(one) > 1})
        if twice:
            raise ConfigError(f"question families {listed(twice)} stand there twice", "give each its own id")


def _has_subject(spec: Any) -> bool:
    return isinstance(spec, OccursSpec) and spec.subject is not None


def _check_template(family: str, template: str, allowed: set[str]) -> None:
    if not template.strip():
        raise ConfigError(f"question family {family}: an empty template", "write a sentence or leave it out")
    wrong = sorted(places(template) - allowed)
    if wrong or "{" in _PLACE.sub("", template) or "}" in _PLACE.sub("", template):
        raise ConfigError(
            f"question family {family}: template {template!r} names {listed(wrong)}",
            f"in braces these are known there: {listed(allowed)}",
        )


def _check_apart(family: str, yes: str, no: str) -> None:
    if yes and yes.strip().lower() == no.strip().lower():
        raise ConfigError(f"question family {family}: `yes` and `no` are the same answer", "word them differently")


def _check_value_template(family: str, template: str) -> None:
    if template:
        _check_template(family, template, set(VALUE_PLACES))
        if "value" not in places(template):
            raise ConfigError(f"question family {family}: answer {template!r} does not name the value", "add {value}")


def _check_levels(family: str, levels: tuple[str, ...], numbers: tuple[int, ...] | None) -> None:
    for template in levels:
        _check_template(family, template, {"days", "source"})
    if levels and (len(levels) not in numbers if numbers else len(levels) < 2):
        raise ConfigError(f"question family {family}: {len(levels)} levels", "give two or three, the lowest first")
    if len(set(levels)) < len(levels):
        raise ConfigError(f"question family {family}: two levels have the same answer", "tell them apart")
