"""UserQA, restated one user and one event at a time in plain Python.

Templates, text rules, the hash of held-out subjects and the quantiles (which Spark approximates) are shared; windows,
copies, measures, subjects, answers, weights and splits are not.
"""

from __future__ import annotations

import datetime as dt
import json
import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any
from zoneinfo import ZoneInfo

import pyarrow.parquet as pq

from instructue_feast.config import InstructueConfig
from instructue_feast.question_specs import QuestionSpec, fill
from instructue_feast.user_qa.questions import is_held_out, subject_text
from instructue_feast.user_qa.tables import MAX_WEIGHT
from tests.oracles.history import (
    _as_text,
    _has_broken_value,
    _reason,
    _time,
    _user,
    expected_extract,
    normalise,
    spark_hash,
)

BLANK = " \t\n\r\x0b\x0c"
Row = dict[str, Any]
Key = tuple[str, dt.datetime]


@dataclass
class ExpectedQA:
    """What a data set must hold.

    Attributes:
        answers: Answer text by user and `as_of`, then question id.
        closed: The closed set of answers by question id, in order.
        weights: Weight by question id, then answer text.
        held_out: Ids of questions that are never trained on.
        last: End of the last window any question was asked over.
    """

    answers: dict[Key, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    closed: dict[str, tuple[str, ...]] = field(default_factory=dict)
    weights: dict[str, dict[str, float]] = field(default_factory=dict)
    held_out: set[str] = field(default_factory=set)
    last: dt.datetime | None = None


def expected_user_qa(
    config: InstructueConfig, as_ofs: list[dt.datetime], cut: dt.datetime, edges: dict[str, list[float]]
) -> ExpectedQA:
    """Reads the raw tables and answers every question. Every spec must bring its own templates.

    Args:
        config: The project.
        as_ofs: When to ask.
        cut: Exclusive bound of everything.
        edges: Lowest value of each level but the first, of `amount` families that were cut at quantiles.
    """
    result = ExpectedQA()
    asked = []
    for as_of in as_ofs:
        for user, row in expected_extract(config, as_of).users.items():
            names = enumerate(config.sources)
            events = sum(row["num_events"][place] for place, name in names if name in config.event_sources)
            if events >= config.user_qa.min_events:
                asked.append((user, as_of))
    raw = {name: pq.read_table(source.table.path).to_pylist() for name, source in config.sources.items()}
    rows = {name: _usable(config, name, raw[name], cut) for name in config.event_sources}
    sources = {spec.source for spec in config.user_qa.questions} & set(rows)
    lasts = [row["t"] for name in sources for row in rows[name]]
    data_end = _day(max(lasts)) + dt.timedelta(days=1) if lasts else None
    for spec in config.user_qa.questions:
        if spec.kind == "attribute":
            moments = [(user, as_of) for user, as_of in asked]
            found = {key: _attribute(config, spec, raw[spec.source], key) for key in moments}
            values = {key: value for key, value in found.items() if value is not None}
            _closed(result, spec, values, {value: normalise(value) for value in values.values()})
            continue
        mine = rows[spec.source]
        if not mine:
            continue
        first, days = _day(min(row["t"] for row in mine)), dt.timedelta(days=spec.days)
        windows = {}
        for as_of in as_ofs:
            past_known = first <= as_of - days and as_of <= data_end
            future_known = first <= as_of and as_of + days <= min(cut, data_end)
            if spec.kind == "change" and past_known and future_known:
                windows[as_of] = (as_of, as_of + days)
            elif spec.kind != "change" and spec.window == "past" and past_known:
                windows[as_of] = (as_of - days, as_of)
            elif spec.kind != "change" and spec.window == "future" and future_known:
                windows[as_of] = (as_of, as_of + days)
        keys = [key for key in asked if key[1] in windows]
        if windows and keys:
            _family(result, config, spec, mine, keys, windows, edges)
    return result


def _family(result, config, spec, rows, keys, windows, edges) -> None:
    by_user = defaultdict(list)
    for row in rows:
        by_user[row["user"]].append(row)
    zone = ZoneInfo(getattr(spec, "zone", None) or config.event_sources[spec.source].time_zone)
    inside = {key: _window(spec, by_user[key[0]], *windows[key[1]], zone) for key in keys}
    before = len(result.closed)
    if spec.kind == "occurs" and spec.subject is not None:
        seen = {key: {row["subject"] for row in mine} - {None} for key, mine in inside.items()}
        counts = Counter(subject for subjects in seen.values() for subject in subjects)
        total = len(keys)
        good = [one for one in counts if spec.min_rate * total <= counts[one] <= spec.max_rate * total]
        good = sorted((one for one in good if counts[one] < total), key=lambda one: (-counts[one], one.encode()))
        texts = defaultdict(set)
        for subject in good[: spec.max_subjects]:
            texts[subject_text(subject)].add(subject)
        for text, spellings in texts.items():
            answers = tuple(fill(one, subject=text, days=spec.days, source=spec.source) for one in (spec.yes, spec.no))
            places = {key: int(not (seen[key] & spellings)) for key in keys}
            _question(result, f"{spec.id}:{text}", text, answers, places)
    elif spec.kind in ("occurs", "inactive"):
        yes = spec.kind == "occurs"
        _question(result, spec.id, spec.id, (spec.yes, spec.no), {key: int(bool(inside[key]) != yes) for key in keys})
    elif spec.kind == "amount":
        levels = list(spec.edges or edges.get(spec.id, []))
        values = {key: _measure(spec, mine) for key, mine in inside.items()}
        values = {key: x for key, x in values.items() if x is not None}
        places = {key: sum(x >= edge for edge in levels) for key, x in values.items()}
        # Quantiles must leave somebody in every level; edges of the config need not.
        if len(set(levels)) == len(spec.levels) - 1 and (spec.edges or {0, len(levels)} <= set(places.values())):
            _question(result, spec.id, spec.id, spec.levels, places)
    elif spec.kind == "change":
        places = {}
        for key in keys:
            start = key[1] - dt.timedelta(days=spec.days)
            old = _measure(spec, _window(spec, by_user[key[0]], start, key[1], zone))
            new = _measure(spec, inside[key])
            if old is not None and new is not None and old > 0:
                ratio = round(new / old, 6)
                down, up = ratio <= 1 - spec.threshold, ratio >= 1 + spec.threshold
                places[key] = 0 if down else 2 if up and len(spec.levels) == 3 else 1
        _question(result, spec.id, spec.id, spec.levels, places)
    else:
        values = {}
        for key, mine in inside.items():
            groups = defaultdict(list)
            for row in mine:
                if row["subject"] is not None and row["subject"] not in {one.lower() for one in spec.exclude}:
                    groups[row["subject"]].append(row)
            scores = {subject: _measure(spec, group) for subject, group in groups.items()}
            ranked = sorted((-x, subject.encode(), subject) for subject, x in scores.items() if x is not None)
            if ranked:
                values[key] = ranked[0][2]
        texts = {one: one if spec.clock else subject_text(one) for one in values.values()}
        if not spec.clock:  # an answer must not name a held-out subject
            values = {key: value for key, value in values.items() if not is_held_out(texts[value])}
        _closed(result, spec, values, texts)
    if len(result.closed) > before:
        end = max(window[1] for window in windows.values())
        result.last = max(result.last or end, end)


def _closed(result, spec, values: dict[Key, str], texts: dict[str, str]) -> None:
    common = Counter(values.values())
    kept = sorted(common, key=lambda one: (-common[one], one.encode()))[: spec.max_values]
    options = list(dict.fromkeys(texts[one] for one in kept))
    answers = tuple(_sentence(fill(spec.answer, value=one, days=spec.days, source=spec.source)) for one in options)
    if len(options) > 1:
        places = {key: options.index(texts[one]) for key, one in values.items() if one in kept}
        _question(result, spec.id, spec.id, answers, places)


def _question(result, name: str, subject: str, answers: tuple[str, ...], places: dict[Key, int]) -> None:
    counts = Counter(places.values())
    if len(counts) < 2:
        return
    answers = tuple(_sentence(one) for one in answers)
    result.closed[name] = answers
    result.weights[name] = {
        answers[place]: min(MAX_WEIGHT, len(places) / len(counts) / number) for place, number in counts.items()
    }
    if is_held_out(subject):
        result.held_out.add(name)
    for key, place in places.items():
        result.answers[key][name] = answers[place]


def _usable(config, name: str, raw: list[Row], cut: dt.datetime) -> list[Row]:
    source = config.event_sources[name]
    usable = []
    for row in raw:
        user, time = _user(row[source.user_id]), _time(row[source.time], source.time_zone)
        if _reason(user, time) or _has_broken_value(source.text, row) or time >= cut:
            continue
        declared = source.event_id_columns
        named = any(row[column] is not None for column in declared)
        columns = declared if named else source.columns if declared else sorted(row)
        identity = json.dumps([named, [row[column] for column in columns]], default=repr)
        usable.append({"user": user, "t": time, "id": identity, "raw": row})
    return usable


def _window(spec: QuestionSpec, rows: list[Row], start: dt.datetime, end: dt.datetime, zone: ZoneInfo) -> list[Row]:
    """The events of one user inside a window; of copies the last, then the one with the greatest values."""
    best: dict[str, tuple[Any, Row]] = {}
    for row in rows:
        if start <= row["t"] < end:
            seen = {"subject": _subject(spec, row, zone), "value": _value(spec, row), "key": _key(spec, row)}
            order = [(one is not None, one.encode() if isinstance(one, str) else one or 0) for one in seen.values()]
            rank = (row["t"], order)
            if row["id"] not in best or rank > best[row["id"]][0]:
                best[row["id"]] = (rank, seen)
    return [seen for _, seen in best.values()]


def _subject(spec, row: Row, zone: ZoneInfo) -> str | None:
    clock = getattr(spec, "clock", None)
    if clock is not None:
        local = row["t"].astimezone(zone)
        if clock == "part_of_day":
            return ("night", "morning", "afternoon", "evening")[local.hour // 6]
        return f"{local:%A}" if clock == "weekday" else ("weekdays", "the weekend")[local.weekday() >= 5]
    if getattr(spec, "subject", None) is None or row["raw"][spec.subject] is None:
        return None
    return _as_text(row["raw"][spec.subject])[:120].strip(BLANK).lower() or None


def _value(spec, row: Row) -> float | None:
    measure = getattr(spec, "measure", "count")
    if measure == "share":
        column, least = spec.condition.split(" >= ")  # the only condition the tests use
        value = row["raw"][column]
        return float(value is not None and (math.isnan(value) or value >= float(least)))
    if measure not in ("sum", "mean", "sum_per"):
        return None
    value = row["raw"][spec.column]
    return None if value is None or not math.isfinite(value) else float(value)


def _key(spec, row: Row) -> int | None:
    measure = getattr(spec, "measure", "count")
    name = {"distinct": "column", "sum_per": "per"}.get(measure)
    value = row["raw"][getattr(spec, name)] if name else None
    return None if value is None else spark_hash([value])


def _measure(spec, rows: list[Row]) -> float | None:
    values = [row["value"] for row in rows if row["value"] is not None]
    keys = {row["key"] for row in rows} - {None}
    if spec.measure == "count":
        return float(len(rows))
    if spec.measure == "distinct":
        return float(len(keys))
    if spec.measure == "sum":
        return round(math.fsum(values), 6)
    if spec.measure == "sum_per":
        return round(math.fsum(values) / len(keys), 6) if keys and values else None
    return round(math.fsum(values) / len(values), 6) if values else None


def _attribute(config, spec, raw: list[Row], key: Key) -> str | None:
    source = config.tabular_sources[spec.source]
    best = None
    for row in raw:
        user = _user(row[source.user_id])
        time = _time(row[source.time], source.time_zone) if source.time else dt.datetime(1971, 1, 1, tzinfo=dt.UTC)
        if user != key[0] or _reason(user, time) or time >= key[1]:
            continue
        rank = (time, -spark_hash([row[column] for column in source.columns]))
        if best is None or rank > best[0]:
            best = (rank, row[spec.column])
    text = None if best is None or best[1] is None else _as_text(best[1])[:120].strip(BLANK)
    return text or None


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _day(moment: dt.datetime) -> dt.datetime:
    return moment.replace(hour=0, minute=0, second=0, microsecond=0)
