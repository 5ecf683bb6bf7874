"""The documents that make an extract and a run complete: small, JSON, written last."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeVar

from instructue_feast.errors import ConfigError, SchemaError

_T = TypeVar("_T")


def parse_as_of(text: str, *, now: datetime | None = None) -> datetime:
    """Parses an `as_of`: ISO 8601 with a time zone, not in the future.

    Raises:
        ConfigError: Not a timestamp, without time zone, or in the future.

    Example:
        >>> parse_as_of("2017-10-01T02:00:00+02:00").isoformat()
        '2017-10-01T00:00:00+00:00'
    """
    try:
        as_of = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"as_of {text!r} is not an ISO 8601 timestamp", "write it as 2017-10-01T00:00:00Z") from None
    if as_of.tzinfo is None:
        raise ConfigError(
            f"as_of {text!r} has no time zone", f"write {as_of:%Y-%m-%dT%H:%M:%S}Z for UTC, or give an offset"
        )
    if as_of > (now or datetime.now(UTC)):
        raise ConfigError(f"as_of {text!r} is in the future", "events up to as_of must have happened already")
    return as_of.astimezone(UTC)


_ID = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")


def check_id(kind: str, name: str) -> str:
    """Returns the id of an extract or run if it can be a folder's name.

    Raises:
        ConfigError: It cannot.
    """
    if not _ID.match(name):
        raise ConfigError(
            f"{kind} id {name!r}", "use letters, digits, dots, dashes and underscores, a letter or digit first"
        )
    return name


def new_id(as_of: datetime, *parts: str) -> str:
    """Readable id of an extract or run: `20171001T000000-<8 hex>`; the same inputs give the same id."""
    digest = hashlib.sha256("\x00".join((as_of.isoformat(), *parts)).encode()).hexdigest()[:8]
    return f"{as_of:%Y%m%dT%H%M%S}-{digest}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceCounts:
    """What became of the raw rows of one source; `read` is the sum of the others and of `quarantined`'s values."""

    read: int = 0
    kept: int = 0
    duplicates: int = 0
    at_or_after_as_of: int = 0
    before_window: int = 0
    quarantined: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractManifest:
    """An extract: the packed histories and the phrasebook of one `as_of`."""

    extract_id: str
    as_of: str
    created: str
    history_digest: str
    sources: list[str]
    buckets: int
    users: int
    events: int
    distinct_texts: int
    tokens: int
    counts: dict[str, SourceCounts]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInstruction:
    """An instruction as a run used it."""

    id: str
    text: str
    content_hash: str
    embedding_version: str

    @property
    def view(self) -> str:
        """Name of the feature view: `<instruction>__<version8>`."""
        return f"{self.id}__{self.embedding_version[:8]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketMarker:
    """One finished bucket of a run; of its rows, `carried` are a base run's and `empty` have no history at all."""

    bucket: int
    rows: int
    digest: str
    tokens: int
    seconds: float
    carried: int = 0
    empty: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunManifest:
    """A finished run.

    `model_loads` counts how often a worker loaded the model: once per Python worker at most, and not at all when it has
    it from the run before. Of the users, `carried` have the vectors of `base_run`, because nothing about them had
    changed, and `empty` have no history at all; once a user was erased, both are upper bounds.
    """

    run_id: str
    project: str
    as_of: str
    created: str
    extract_id: str
    history_digest: str
    model_version: str
    trained: bool
    embedding_dim: int
    instructions: list[RunInstruction]
    buckets: list[BucketMarker]
    users: int
    tokens: int
    texts_encoded: int
    distinct_texts: int
    digest: str
    seconds: float
    model_loads: int = 0
    base_run: str | None = None
    carried: int = 0
    empty: int = 0


def to_json(value: Any) -> dict[str, Any]:
    """A manifest as JSON-ready values."""
    return dataclasses.asdict(value)


def from_json(cls: type[_T], value: dict[str, Any], where: str) -> _T:
    """Reads a manifest back.

    Raises:
        SchemaError: It was written by another version, with other keys.
    """
    try:
        data = dict(value)
        if cls is ExtractManifest:
            data["counts"] = {name: SourceCounts(**one) for name, one in data["counts"].items()}
        if cls is RunManifest:
            data["instructions"] = [RunInstruction(**one) for one in data["instructions"]]
            data["buckets"] = [BucketMarker(**one) for one in data["buckets"]]
        return cls(**data)
    except (TypeError, KeyError) as error:
        raise SchemaError(f"{where} is not a {cls.__name__}: {error}", "was it written by another release?") from None
