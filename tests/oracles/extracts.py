"""Reading a finished extract back, in the shape the history oracle speaks of."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pyarrow.parquet as pq
import xxhash

from instructue_feast import schema
from instructue_feast.config import InstructueConfig
from instructue_feast.history.pack import PackedHistory
from instructue_feast.runs.manifest import ExtractManifest, from_json
from instructue_feast.runs.store import OutputStore
from tests.oracles.history import Expected


def read_extract(config: InstructueConfig, extract_id: str) -> Expected:
    """The extract, after checking what every reader relies on: schemas, order, buckets."""
    folder = Path(config.output.path) / "extracts" / extract_id
    result = Expected()
    for bucket in sorted((folder / "history").glob("bucket=*")):
        number = int(bucket.name.removeprefix("bucket="))
        for file in bucket.glob("*.parquet"):
            table = pq.ParquetFile(file).read()
            PackedHistory.from_arrow(
                table, num_sources=len(config.sources), num_numeric=len(config.numeric_columns), where=bucket.name
            )
            users = table.column("user_id").to_pylist()
            assert users == sorted(users, key=str.encode)
            for row in table.to_pylist():
                user = row.pop("user_id")
                assert _signed(xxhash.xxh64_intdigest(user.encode(), seed=42)) % config.output.buckets == number
                assert user not in result.users
                result.users[user] = row
    book = ds.dataset(folder / "phrasebook").to_table()
    schema.check(book, schema.PHRASEBOOK, "phrasebook")
    for row in book.to_pylist():
        assert row["text_id"] not in result.phrasebook
        result.phrasebook[row["text_id"]] = (row["source"], row["text"])
    refused = ds.dataset(folder / "quarantine").to_table()
    schema.check(refused, schema.QUARANTINE, "quarantine")
    result.quarantine = Counter((row["source"], row["reason"], row["user_id"]) for row in refused.to_pylist())
    document = OutputStore(config.output.path).read_json("extracts", extract_id, "manifest.json")
    result.counts = from_json(ExtractManifest, document, "manifest").counts
    return result


def comparable(value: Any) -> Any:
    """NaN as a word, because NaN is not equal to itself."""
    if isinstance(value, dict):
        return {key: comparable(one) for key, one in value.items()}
    if isinstance(value, list):
        return [comparable(one) for one in value]
    return "NaN" if isinstance(value, float) and math.isnan(value) else value


def assert_same(actual: Expected, expected: Expected) -> None:
    """Equal in every value; says the first user that differs."""
    assert actual.counts == expected.counts
    assert actual.quarantine == expected.quarantine
    assert actual.phrasebook == expected.phrasebook
    assert sorted(actual.users) == sorted(expected.users)
    for user, row in expected.users.items():
        assert comparable(actual.users[user]) == comparable(row), user


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
