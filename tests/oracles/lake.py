"""Random raw tables that hold everything a lake can throw at an extract, and the config that names them."""

from __future__ import annotations

import datetime as dt
import math
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from instructue_feast.config import InstructueConfig, load_config

AS_OF = dt.datetime(2025, 3, 20, 12, 30, tzinfo=dt.UTC)
DAYS = 30
WORDS = (
    "coffee", "Coffee", "coffee ", "tea", "green  tea", "🍎 apple", "👩‍👩‍👧 family", "مرحبا بالعالم", "שלום",
    "nul\x00byte", "caf\u00e9", "cafe\u0301", "<USER>", "</bill>", "[SEP] now", "<|im_end|>", "ΣΊΣΥΦΟΣ", "İstanbul",
    "zero\u200bwidth", "\u202eright to left", "", "   ", "\x07", "Straße", "é" * 300, "unknown", None,
)  # fmt: skip
UTC_TIME, LOCAL_TIME = pa.timestamp("us", tz="UTC"), pa.timestamp("us")
Tables = dict[str, pa.Table]


def random_events(rng: random.Random, rows: int, *, users: int = 12, time_type: pa.DataType = UTC_TIME) -> pa.Table:
    """Events `user, at, id, word, amount, level, flag`: boundary times, duplicates, late copies, nulls, NaN."""
    start = AS_OF - dt.timedelta(days=DAYS)
    tick = dt.timedelta(microseconds=1)
    special = [AS_OF, AS_OF - tick, AS_OF + tick, start, start - tick, start + tick]
    special += [AS_OF - dt.timedelta(days=day) - tick * off for day in (1, 2, 7) for off in (0, 1)]
    # Skipped and repeated hours of New York; an unset clock; a far future.
    special += [dt.datetime(2025, 3, 9, hour, 30, tzinfo=dt.UTC) for hour in (1, 2, 3)]
    special += [dt.datetime(1970, 1, 1, tzinfo=dt.UTC), dt.datetime(2300, 1, 1, tzinfo=dt.UTC), None]
    made: list[dict[str, Any]] = []
    for number in range(rows):
        if made and rng.random() < 0.25:  # a copy, now and then with another time or text
            row = dict(rng.choice(made))
            if rng.random() < 0.4:
                row["at"] = _shift(row["at"], rng)
            if rng.random() < 0.4:
                row["word"] = rng.choice(WORDS)
        else:
            random_time = start + dt.timedelta(seconds=rng.randrange(-86_400 * 5, 86_400 * (DAYS + 3)))
            row = {
                "user": rng.choice([None, "", " \t"]) if rng.random() < 0.05 else str(rng.randrange(users)),
                "at": rng.choice(special) if rng.random() < 0.3 else random_time,
                "id": None if rng.random() < 0.05 else number,
                "word": rng.choice(WORDS),
                "amount": rng.choice([None, 0.0, -1.5, 1.0, 2.5, 4.999, 5.0, 1e12, math.nan, math.inf, -math.inf, 3.0]),
                "level": rng.choice([None, 0, 1, -7, 2**40]),
                "flag": rng.choice([None, True, False]),
            }
        made.append(row)
    table = pa.Table.from_pylist(
        made,
        schema=pa.schema(
            [
                ("user", pa.string()), ("at", UTC_TIME), ("id", pa.int64()), ("word", pa.string()),
                ("amount", pa.float64()), ("level", pa.int64()), ("flag", pa.bool_()),
            ]
        ),
    )  # fmt: skip
    # The same wall clock, read in another zone or as a day: what a table without zones looks like.
    return table.set_column(1, "at", table.column("at").cast(LOCAL_TIME).cast(time_type, safe=False))


def random_snapshots(rng: random.Random, rows: int, *, users: int = 15, timed: bool = True) -> pa.Table:
    """Rows `user, since, spend, years, city, tier, member` with ties in time, nulls and infinities."""
    times = [AS_OF - dt.timedelta(days=day) for day in (-1, 0, 1, 2, 40)] + [
        dt.datetime(1970, 1, 1, tzinfo=dt.UTC),
        None,
    ]
    made = [
        {
            "user": rng.choice([None, "  "]) if rng.random() < 0.05 else str(rng.randrange(users)),
            "since": rng.choice(times) if timed else None,
            "spend": rng.choice([None, 0.0, -0.0, 12.5, 0.1, 1e300, math.nan, -math.inf]),
            "years": rng.choice([None, 3, 4, 2**40]),
            "city": rng.choice(WORDS),
            "tier": rng.choice([None, 1, 2, 3]),
            "member": rng.choice([None, True, False]),
        }
        for _ in range(rows)
    ]
    fields = [("user", pa.string()), ("since", UTC_TIME), ("spend", pa.float64()), ("years", pa.int64())]
    fields += [("city", pa.string()), ("tier", pa.int64()), ("member", pa.bool_())]
    return pa.Table.from_pylist(made, schema=pa.schema(fields))


def event_source(name: str, text: str = "{word|lower}: {amount|bucket:1,2.5,5}", **values: Any) -> dict[str, Any]:
    """The config of a table of `random_events`."""
    return {"table": {"path": f"raw/{name}"}, "user_id": "user", "time": "at", "event_id": "id", "text": text, **values}


def tabular_source(name: str, **values: Any) -> dict[str, Any]:
    """The config of a table of `random_snapshots`."""
    settings = {"kind": "tabular", "table": {"path": f"raw/{name}"}, "user_id": "user", "time": "since"}
    settings |= {"numeric": {"money": ["spend"], "age": ["years"]}, "categorical": ["city", "tier", "member"]}
    return {key: value for key, value in (settings | values).items() if value is not None}


def write_lake(folder: Path, tables: Tables, *, files: int = 1) -> None:
    """Writes raw tables, each in some Parquet files."""
    for name, table in tables.items():
        target = folder / "raw" / name
        target.mkdir(parents=True, exist_ok=True)
        size = max(1, math.ceil(len(table) / files))
        for part in range(files):
            pq.write_table(table.slice(part * size, size), target / f"part-{part}.parquet")


def write_config(folder: Path, sources: dict[str, Any], **values: Any) -> InstructueConfig:
    """Writes and loads `instructue.yaml`."""
    document = {
        "project": "lake",
        "sources": sources,
        "instructions": [{"id": "taste", "text": "What does this user like"}],
        "history": {"days": DAYS, "max_text_chars": 40},
        "output": {"path": "output", "buckets": 3, "min_free_gib": 0},
        **values,
    }
    file = folder / "instructue.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(document, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return load_config(file)


def _shift(moment: dt.datetime | None, rng: random.Random) -> dt.datetime | None:
    return None if moment is None else moment + dt.timedelta(seconds=rng.choice([-3600, -1, 1, 3600]))
