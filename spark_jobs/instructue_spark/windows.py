"""Which rows count for which `as_of`, when several are extracted in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from instructue_feast.config import InstructueConfig

ROSTER = -1
"""`src` of roster rows; sources count from 0 in config order."""

_DAY_US = 86_400_000_000
_ALWAYS = -(1 << 62)
"""Where the window of a snapshot begins."""


def to_micros(moment: datetime) -> int:
    """Microseconds since the epoch."""
    delta = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds


class Windows:
    """The windows `[as_of - days, as_of)` of each source for some `as_of`s.

    Their edges cut time into cells; inside a cell, all rows of a source count for the same `as_of`s.

    Args:
        config: The project.
        as_ofs: With time zones.
    """

    def __init__(self, config: InstructueConfig, as_ofs: Sequence[datetime]) -> None:
        self.as_of_us = tuple(to_micros(one) for one in as_ofs)
        self.start_us = tuple(
            tuple(
                at - config.source_days(name) * _DAY_US if name in config.event_sources else _ALWAYS
                for name in config.source_names
            )
            for at in self.as_of_us
        )
        self.end_us = max(self.as_of_us)

    def first_us(self, src: int) -> int:
        """Where the earliest window of a source begins."""
        return _ALWAYS if src == ROSTER else min(starts[src] for starts in self.start_us)

    def edges_us(self, src: int) -> tuple[int, ...]:
        """Where a cell ends and the next begins."""
        if src == ROSTER:
            return ()
        edges = {*self.as_of_us, *(starts[src] for starts in self.start_us)}
        return tuple(sorted(one for one in edges if self.first_us(src) < one < self.end_us))

    def status(self, moment: int, src: int, cell: int) -> int:
        """What the rows of a cell are for an `as_of`: 0 inside its window, 1 at or after it, 2 before the window."""
        low = (self.first_us(src), *self.edges_us(src))[cell]
        if low >= self.as_of_us[moment]:
            return 1
        return 2 if src != ROSTER and low < self.start_us[moment][src] else 0
