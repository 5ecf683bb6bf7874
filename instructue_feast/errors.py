"""One tree of errors. Every message says what happened, where, and how to mend it.

Messages never contain event texts or raw user ids. All errors pickle, because they cross process borders between Spark
workers, the driver and the command line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InstructueError(Exception):
    """Base of all errors a user can mend.

    Attributes:
        message: What happened, and where.
        hint: What to do next; empty if the message says it all.
        exit_code: What the command line exits with.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        self.message = message
        self.hint = hint
        super().__init__(message, hint)

    def __str__(self) -> str:
        return f"{self.message}\nHint: {self.hint}" if self.hint else self.message


class ConfigError(InstructueError):
    """`instructue.yaml` or a command-line argument is wrong."""

    exit_code = 2


class DataError(InstructueError):
    """A raw table is missing, empty, unreadable or of the wrong shape."""

    exit_code = 3


class SchemaError(DataError):
    """A table does not have the columns or types its place on the data path demands."""


class LeakageError(InstructueError):
    """Something from at or after `as_of` would influence an embedding."""

    exit_code = 4


class VersionMismatchError(InstructueError):
    """A model, run or view belongs to another embedding version."""

    exit_code = 5


class UnsafeArtifactError(InstructueError):
    """An artefact could execute code when loaded (pickle weights, remote code)."""

    exit_code = 6


class RunConflictError(InstructueError):
    """Another process owns the run, or the run exists already."""

    exit_code = 7


class PublishConflictError(RunConflictError):
    """Another publisher moved the pointer first."""


class InvalidEmbeddingError(InstructueError):
    """An embedding is NaN, infinite, not unit-norm, or of the wrong size."""

    exit_code = 8


class StorageError(InstructueError):
    """The disk is full or a location cannot be read or written."""

    exit_code = 9


class MissingDependencyError(InstructueError):
    """An optional dependency or program is not installed."""

    exit_code = 10


class QualityError(InstructueError):
    """A quality gate found a run unfit to be published."""

    exit_code = 11


class StoppedError(InstructueError):
    """The job was told to stop."""

    exit_code = 143


def listed(names: Iterable[str], limit: int = 30) -> str:
    """Formats the names that do exist, for an error message.

    >>> listed(["b", "a"])
    '[a, b]'
    """
    ordered = sorted(names)
    shown = ", ".join(ordered[:limit])
    return f"[{shown}, and {len(ordered) - limit} more]" if len(ordered) > limit else f"[{shown}]"


def did_you_mean(wrong: str, existing: Iterable[str]) -> str:
    """Says what exists, and the closest match if there is one.

    >>> did_you_mean("chrun", ["churn", "taste"])
    'did you mean churn? These exist: [churn, taste]'
    """
    names = list(existing)
    close = difflib.get_close_matches(wrong, names, n=1)
    prefix = f"did you mean {close[0]}? " if close else ""
    return f"{prefix}These exist: {listed(names)}"


_BY_NAME: dict[str, type[InstructueError]] = {}


def error_from_name(name: str, message: str, hint: str = "") -> InstructueError:
    """Rebuilds an error that a child process reported by class name."""
    if not _BY_NAME:
        pending: list[type[InstructueError]] = [InstructueError]
        while pending:
            cls = pending.pop()
            _BY_NAME[cls.__name__] = cls
            pending.extend(cls.__subclasses__())
    return _BY_NAME.get(name, InstructueError)(message, hint)
