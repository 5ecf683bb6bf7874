"""The extract, restated one row at a time in plain Python. Text rules and bucket edges are shared, nothing else.

Nothing here is clever. Where Spark hashes, cuts and aggregates columns, this loops over rows.
"""

from __future__ import annotations

import datetime as dt
import json
import math
import struct
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow.parquet as pq
import xxhash

from instructue_feast.config import EventSourceConfig, InstructueConfig, TabularSourceConfig
from instructue_feast.history.buckets import AGE_EDGES_DAYS, COUNT_EDGES, bucketize
from instructue_feast.history.render import categorical_text, normalise, text_id
from instructue_feast.runs.manifest import SourceCounts
from instructue_feast.template import MISSING_TEXT, bucket_labels, parse_template

Row = dict[str, Any]
EARLIEST, LATEST = dt.datetime(1971, 1, 1, tzinfo=dt.UTC), dt.datetime(2201, 1, 1, tzinfo=dt.UTC)
REASONS = ("null_user", "null_time", "impossible_time", "broken_value")


@dataclass
class Expected:
    """What an extract must hold."""

    users: dict[str, Row] = field(default_factory=dict)
    phrasebook: dict[int, tuple[str, str]] = field(default_factory=dict)
    counts: dict[str, SourceCounts] = field(default_factory=dict)
    quarantine: Counter[tuple[str, str, str | None]] = field(default_factory=Counter)


def expected_extract(
    config: InstructueConfig, as_of: dt.datetime, where: Mapping[str, Callable[[Row], bool]] | None = None
) -> Expected:
    """Reads the raw Parquet tables and does what the extract does.

    Args:
        config: The project.
        as_of: Exclusive upper bound of event times.
        where: The sources' conditions as Python functions.
    """
    result = Expected()
    tokens: dict[str, list[tuple[int, int, int, int, int]]] = defaultdict(list)
    num_events: dict[str, dict[int, int]] = defaultdict(dict)
    numeric: dict[str, dict[int, list[float]]] = defaultdict(dict)
    for index, (name, source) in enumerate(config.sources.items()):
        keep = (where or {}).get(name, lambda row: True)
        rows = [row for row in pq.read_table(source.table.path).to_pylist() if keep(row)]
        if isinstance(source, EventSourceConfig):
            _events(result, config, as_of, name, index, source, rows, tokens, num_events)
        else:
            _tabular(result, config, as_of, name, index, source, rows, tokens, num_events, numeric)
    roster = _roster(result, config)
    for user in {*roster, *tokens, *num_events}:
        mine = sorted(tokens.get(user, []))
        result.users[user] = {
            "as_of": as_of,
            "source_index": [token[0] for token in mine],
            "text_id": [token[2] for token in mine],
            "count_bucket": [token[3] for token in mine],
            "age_bucket": [token[4] for token in mine],
            "num_events": [num_events.get(user, {}).get(index, 0) for index in range(len(config.sources))],
            "tabular_numeric": [
                value
                for index, source in enumerate(config.sources.values())
                if isinstance(source, TabularSourceConfig)
                for value in numeric.get(user, {}).get(index, [math.nan] * len(_numeric_columns(source)))
            ],
        }
    return result


def _events(result, config, as_of, name, index, source, rows, tokens, num_events) -> None:
    start = as_of - dt.timedelta(days=source.days or config.history.days)
    quarantined: Counter[str] = Counter()
    late = early = in_window = 0
    best: dict[tuple[str, str], tuple[dt.datetime, int]] = {}
    for row in rows:
        user, time = _user(row[source.user_id]), _time(row[source.time], source.time_zone)
        reason = _reason(user, time) or ("broken_value" if _has_broken_value(source.text, row) else None)
        if reason:
            quarantined[reason] += 1
            result.quarantine[name, reason, user] += 1
        elif time >= as_of:
            late += 1
        elif time < start:
            early += 1
        else:
            in_window += 1
            text = normalise(_render(source.text, row, config.history.max_text_chars))
            number = text_id(name, text)
            result.phrasebook[number] = (name, text)
            declared = source.event_id_columns
            named = any(row[column] is not None for column in declared)
            columns = declared if named else source.columns if declared else sorted(row)
            identity = json.dumps([named, [row[column] for column in columns]], default=repr)
            known = best.get((user, identity))
            if known is None or time > known[0] or (time == known[0] and number < known[1]):
                best[user, identity] = (time, number)
    seen: dict[str, dict[int, list[dt.datetime]]] = defaultdict(lambda: defaultdict(list))
    for (user, _), (time, number) in best.items():
        seen[user][number].append(time)
    for user, texts in seen.items():
        num_events[user][index] = sum(len(times) for times in texts.values())
        rows = [(number, len(times), _micros(max(times))) for number, times in texts.items()]
        if source.rank == "recency":
            rows.sort(key=lambda one: (-one[2], -one[1], one[0]))
        else:
            rows.sort(key=lambda one: (-one[1], -one[2], one[0]))
        for number, count, last in rows[: source.max_texts]:
            days = (_micros(as_of) - last) // 86_400_000_000
            count_bucket = int(bucketize([count], COUNT_EDGES)[0])
            age_bucket = int(bucketize([days], AGE_EDGES_DAYS)[0])
            tokens[user].append((index, last, number, count_bucket, age_bucket))
    result.counts[name] = SourceCounts(
        read=sum(quarantined.values()) + late + early + in_window,
        kept=len(best),
        duplicates=in_window - len(best),
        at_or_after_as_of=late,
        before_window=early,
        quarantined=dict(quarantined),
    )


def _tabular(result, config, as_of, name, index, source, rows, tokens, num_events, numeric) -> None:
    quarantined: Counter[str] = Counter()
    late = eligible = 0
    best: dict[str, tuple[tuple[dt.datetime, int], Row]] = {}
    for row in rows:
        user = _user(row[source.user_id])
        time = _time(row[source.time], source.time_zone) if source.time else EARLIEST
        reason = _reason(user, time)
        if reason:
            quarantined[reason] += 1
            result.quarantine[name, reason, user] += 1
        elif source.time and time >= as_of:
            late += 1
        else:
            eligible += 1
            rank = (time, -spark_hash([row[column] for column in source.columns]))
            if user not in best or rank > best[user][0]:
                best[user] = (rank, row)
    for user, (_, row) in best.items():
        numbers = [_float32(row[column]) for column in _numeric_columns(source)]
        words = [(place, column) for place, column in enumerate(source.categorical) if row[column] is not None]
        for place, column in words:
            value = _as_text(row[column])[: config.history.max_text_chars]
            text = normalise(categorical_text(column, value)[: config.history.max_text_chars])
            number = text_id(name, text)
            result.phrasebook[number] = (name, text)
            tokens[user].append((index, place, number, 0, 0))
        numeric[user][index] = numbers
        num_events[user][index] = len(words) + sum(not math.isnan(one) for one in numbers)
    result.counts[name] = SourceCounts(
        read=sum(quarantined.values()) + late + eligible,
        kept=len(best),
        duplicates=eligible - len(best),
        at_or_after_as_of=late,
        quarantined=dict(quarantined),
    )


def _roster(result: Expected, config: InstructueConfig) -> set[str]:
    if config.users is None:
        return set()
    users = [_user(row[config.users.user_id]) for row in pq.read_table(config.users.table.path).to_pylist()]
    named = [user for user in users if not _reason(user, EARLIEST)]
    blank = [user for user in users if _reason(user, EARLIEST)]
    for user in blank:
        result.quarantine["(roster)", "null_user", user] += 1
    result.counts["(roster)"] = SourceCounts(
        read=len(users),
        kept=len(set(named)),
        duplicates=len(named) - len(set(named)),
        quarantined={"null_user": len(blank)} if blank else {},
    )
    return set(named)


def _reason(user: str | None, time: dt.datetime | None) -> str | None:
    if user is None or not user.strip(" \t\n\r\x0b\x0c"):
        return "null_user"
    if time is None:
        return "null_time"
    return "impossible_time" if time < EARLIEST or time >= LATEST else None


def _user(value: Any) -> str | None:
    return None if value is None else _as_text(value)


def _time(value: Any, zone: str) -> dt.datetime | None:
    if value is None:
        return None
    if not isinstance(value, dt.datetime):
        value = dt.datetime.combine(value, dt.time())
    if value.tzinfo is None:
        value = value.replace(tzinfo=ZoneInfo(zone))
    return value.astimezone(dt.UTC)


def _render(template: str, row: Row, max_chars: int) -> str:
    text = ""
    for part in parse_template(template):
        if isinstance(part, str):
            text += part
        elif row[part.column] is None:
            text += MISSING_TEXT
        elif part.edges:
            text += bucket_labels(part.edges)[sum(row[part.column] >= edge for edge in part.edges)]
        else:
            value = _as_text(row[part.column])[:max_chars]
            text += value.lower() if part.lower else value
    return text[:max_chars]


def _has_broken_value(template: str, row: Row) -> bool:
    fields = [part for part in parse_template(template) if not isinstance(part, str) and part.edges]
    values = [row[one.column] for one in fields]
    return any(isinstance(value, float) and not math.isfinite(value) for value in values)


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _numeric_columns(source: TabularSourceConfig) -> list[str]:
    return [column for columns in source.numeric_groups.values() for column in columns]


def _float32(value: Any) -> float:
    with np.errstate(over="ignore"):
        number = math.nan if value is None else float(np.float32(value))
    return number if math.isfinite(number) else math.nan


def _micros(moment: dt.datetime) -> int:
    return (moment - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) // dt.timedelta(microseconds=1)


def spark_hash(values: list[Any]) -> int:
    """Spark's `xxhash64(v0, isnull(v0), v1, isnull(v1), ...)` of strings, longs, doubles, booleans and timestamps."""
    seed = 42
    for value in values:
        for piece in (value, value is None):
            if piece is None:
                continue
            if isinstance(piece, str):
                data = piece.encode()
            elif isinstance(piece, bool):
                data = struct.pack("<i", piece)
            elif isinstance(piece, dt.datetime):
                data = struct.pack("<q", _micros(piece if piece.tzinfo else piece.replace(tzinfo=dt.UTC)))
            elif isinstance(piece, float):
                data = struct.pack("<d", piece + 0.0 if not math.isnan(piece) else math.nan)
            else:
                data = struct.pack("<q", piece)
            seed = xxhash.xxh64_intdigest(data, seed=seed)
    return seed - (1 << 64) if seed >= 1 << 63 else seed
