"""SQLite as the online store: Feast's own tables and bytes, written in bulk, never backwards, always in UTC."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from feast import Entity, FeatureView, RepoConfig
from feast.infra.key_encoding_utils import serialize_entity_key
from feast.infra.online_stores.helpers import extract_text_and_num
from feast.infra.online_stores.sqlite import SqliteOnlineStore, SqliteOnlineStoreConfig, _initialize_conn
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.type_map import feast_value_type_to_python_type

from instructue_feast.feature_store.online import (
    VectorStorageConfig,
    WireRows,
    expired,
    to_micros,
    versioned_name,
)
from instructue_feast.feature_store.wire import (
    KEY_VERSION,
    as_stock_value,
    entity_keys,
)

FeastRow = tuple[EntityKey, dict[str, Value], datetime, datetime | None]
_SECOND = 1_000_000
_LAST = np.iinfo(np.int64).max
_VARIABLES = 10_000  # in one statement; SQLite's default limit is 32,766
_PAGE = 16_384  # bytes; a vector of 256 floats wastes a quarter of a page of 4,096, and the log has a header per page
MAPPED_BYTES = 1 << 30
"""Of a database file, which reads then take from the page cache without copying pages."""
_CACHE_KIB = 65_536  # of the writing connection while it writes: an index falls out of the usual 2 MiB
_ROWS = 20  # in one INSERT: a statement costs about as much as storing a row


class InstructueSqliteOnlineStoreConfig(VectorStorageConfig, SqliteOnlineStoreConfig):  # type: ignore[misc]
    """Feast's options for SQLite, and how vectors are stored."""

    type: Literal["instructue_feast.feature_store.sqlite.InstructueSqliteOnlineStore"] = (
        "instructue_feast.feature_store.sqlite.InstructueSqliteOnlineStore"
    )


class InstructueSqliteOnlineStore(SqliteOnlineStore):  # type: ignore[misc]
    """Feast's SQLite store; stock Feast reads what it writes and the reverse.

    What differs: an older event time never replaces a newer one; a batch is seen whole or not at all, also by other
    threads of the process; times are kept in UTC whatever the process's time zone; a value of ours that has outlived
    its view's ttl is not served. Each thread has its own connection.
    """

    def __init__(self) -> None:
        self._local = threading.local()
        self._generation = 0

    def _get_conn(self, config: RepoConfig) -> sqlite3.Connection:
        owner = (os.getpid(), self._generation)
        if getattr(self._local, "owner", None) != owner:
            path = Path(self._get_db_path(config))
            path.parent.mkdir(parents=True, exist_ok=True)
            connection = _initialize_conn(str(path))
            connection.execute(f"PRAGMA page_size = {_PAGE}")  # of a file that is still empty
            connection.execute(f"PRAGMA mmap_size = {MAPPED_BYTES}")
            # Readers go on reading while a batch is written; the setting stays with the file.
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("PRAGMA busy_timeout = 30000")
            self._local.connection, self._local.owner = connection, owner
        connection = self._local.connection
        assert isinstance(connection, sqlite3.Connection)
        return connection

    def update(
        self,
        config: RepoConfig,
        tables_to_delete: Sequence[FeatureView],
        tables_to_keep: Sequence[FeatureView],
        entities_to_delete: Sequence[Entity],
        entities_to_keep: Sequence[Entity],
        partial: bool,
    ) -> None:
        """Makes and removes tables as Feast does, without its second index, which repeats the primary key's start."""
        super().update(config, tables_to_delete, tables_to_keep, entities_to_delete, entities_to_keep, partial)
        connection = self._get_conn(config)
        for view in tables_to_keep:
            connection.execute(f"DROP INDEX IF EXISTS {_quoted(f'{config.project}_{versioned_name(config, view)}_ek')}")

    def teardown(self, config: RepoConfig, tables: Sequence[FeatureView], entities: Sequence[Entity]) -> None:
        """Removes the database file."""
        if getattr(self._local, "owner", None) == (os.getpid(), self._generation):
            self._local.connection.close()
        self._generation += 1  # other threads open the next file
        super().teardown(config, tables, entities)
        for suffix in ("-wal", "-shm"):
            Path(f"{self._get_db_path(config)}{suffix}").unlink(missing_ok=True)

    def online_read(
        self,
        config: RepoConfig,
        table: FeatureView,
        entity_keys: list[EntityKey],
        requested_features: list[str] | None = None,
    ) -> list[tuple[datetime | None, dict[str, Value] | None]]:
        """Feast's own read, in UTC, without what has outlived the ttl of a view of ours."""
        now = datetime.now(UTC)
        rows: list[tuple[datetime | None, dict[str, Value] | None]] = []
        for time, values in super().online_read(config, table, entity_keys, requested_features):
            if time is not None:  # Feast turned the stored number into local time and called that UTC
                time = datetime.fromtimestamp(time.replace(tzinfo=None).timestamp(), UTC)
            if values is None or expired(table, time, now):
                rows.append((None, None))
            else:
                rows.append((time, {name: as_stock_value(value) for name, value in values.items()}))
        return rows

    def write_rows(self, config: RepoConfig, view: FeatureView, rows: WireRows) -> int:
        """Stores rows in one transaction, except where something newer is stored and `rows.overwrite` is not set.

        Returns:
            How many rows were stored.
        """
        connection = self._get_conn(config)
        table = f"{config.project}_{versioned_name(config, view)}"
        self._ensure_revision(connection, table)
        columns = ["entity_key", "feature_name", "value", "event_ts", "created_ts", "revision"]
        order = sorted(range(len(rows.keys)), key=rows.keys.__getitem__)  # that of the index: its pages are neighbours
        keys = [rows.keys[place] for place in order]
        event = (rows.event_micros[order] // _SECOND).tolist()
        created: list[int | None] = [None] * len(event)
        if rows.created_micros is not None:
            created = (rows.created_micros[order] // _SECOND).tolist()
        revision = rows.revision[order].tolist()
        vectors = config.online_store.vector_enabled
        if vectors:
            columns.append("vector_value")
        stored = 0
        with _large_cache(connection), _transaction(connection):
            for feature, unordered in rows.values.items():
                values = [unordered[place] for place in order]
                parts: list[Any] = [keys, [feature] * len(event), values, event, created, revision]
                if vectors:
                    parts.append([_vector_value(as_stock_value(Value.FromString(value))) for value in values])
                stored = max(stored, _insert(connection, table, columns, parts, guarded=not rows.overwrite))
        return stored

    def online_write_batch(
        self,
        config: RepoConfig,
        table: FeatureView,
        data: list[FeastRow],
        progress: Callable[[int], Any] | None,
    ) -> None:
        """Feast's own write, for whatever does not come from our engine, with the same rules about what is newer."""
        connection = self._get_conn(config)
        name = f"{config.project}_{versioned_name(config, table)}"
        self._ensure_revision(connection, name)
        numbers = config.online_store.enable_openai_compatible_store and self._check_table_has_value_num(
            connection, name
        )
        columns = ["entity_key", "feature_name", "value", "event_ts", "created_ts", "revision", "value_text"]
        columns += ["value_num"] * numbers + ["vector_value"] * config.online_store.vector_enabled
        rows = []
        for entity_key, values, event, created in data:
            key = serialize_entity_key(entity_key, entity_key_serialization_version=KEY_VERSION)
            revision = to_micros(created) if created else None
            times = (to_micros(event) // _SECOND, None if revision is None else revision // _SECOND, revision)
            for feature, value in values.items():
                text, number = extract_text_and_num(value, numbers)
                row = [key, feature, value.SerializeToString(), *times, text]
                row += [number] * numbers + [_vector_value(value)] * config.online_store.vector_enabled
                rows.append(row)
        with _transaction(connection):
            connection.executemany(_upsert(name, columns), rows)
        if progress:
            progress(len(data))

    def delete_entities(self, config: RepoConfig, views: Sequence[FeatureView], ids: Sequence[str]) -> int:
        """Removes users from views, their bytes included: freed pages are overwritten and the log is emptied.

        Returns:
            How many rows there were.
        """
        connection = self._get_conn(config)
        removed = 0
        connection.execute("PRAGMA secure_delete = ON")
        for view in views:
            table = _quoted(f"{config.project}_{versioned_name(config, view)}")
            with _transaction(connection):
                for part in _parts(entity_keys(view.entity_columns[0].name, ids)):
                    removed += connection.execute(
                        f"DELETE FROM {table} WHERE entity_key IN ({_marks(len(part))})",  # noqa: S608
                        part,
                    ).rowcount
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        return removed

    def _ensure_revision(self, connection: sqlite3.Connection, table: str) -> None:
        """Adds our column to a table that stock Feast made; it names its columns, so it does not mind.

        Looked at for every batch: another process may have removed the view and made it again.
        """
        with closing(connection.execute(f"PRAGMA table_info({_quoted(table)})")) as cursor:
            names = {row[1] for row in cursor}
        if names and "revision" not in names:
            try:
                connection.execute(f"ALTER TABLE {_quoted(table)} ADD COLUMN revision INTEGER")
            except sqlite3.OperationalError as error:
                if "duplicate column" not in str(error):  # another process was faster
                    raise


def _insert(
    connection: sqlite3.Connection, table: str, columns: Sequence[str], parts: Sequence[list[Any]], *, guarded: bool
) -> int:
    """Stores rows given by the column, many with each statement; returns how many."""
    rows = list(zip(*parts, strict=True))
    whole = len(rows) - len(rows) % _ROWS
    many = (tuple(chain.from_iterable(rows[start : start + _ROWS])) for start in range(0, whole, _ROWS))
    stored = connection.executemany(_upsert(table, columns, rows=_ROWS, guarded=guarded), many).rowcount
    rest = connection.executemany(_upsert(table, columns, guarded=guarded), rows[whole:]).rowcount
    return max(stored, 0) + max(rest, 0)  # of no statement at all it is -1


def _upsert(table: str, columns: Sequence[str], *, rows: int = 1, guarded: bool = True) -> str:
    name = _quoted(table)
    changed = ", ".join(f"{one} = excluded.{one}" for one in columns[2:])
    values = ", ".join([f"({_marks(len(columns))})"] * rows)
    statement = (
        f"INSERT INTO {name} ({', '.join(columns)}) VALUES {values} "  # noqa: S608
        f"ON CONFLICT (entity_key, feature_name) DO UPDATE SET {changed}"
    )
    if not guarded:
        return statement
    return (
        f"{statement} WHERE (excluded.event_ts, coalesce(excluded.revision, {_LAST})) "
        f">= ({name}.event_ts, coalesce({name}.revision, 0))"
    )


@contextmanager
def _large_cache(connection: sqlite3.Connection) -> Iterator[None]:
    """Room for the index of a large table, given back at the end: every reading thread has a connection of its own."""
    before = connection.execute("PRAGMA cache_size").fetchone()[0]
    connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
    try:
        yield
    finally:
        connection.execute(f"PRAGMA cache_size = {before}")


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Takes the write lock at once, so that what is read in it is what is overwritten."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.commit()
    except BaseException:
        connection.rollback()
        raise


def _parts(keys: list[bytes]) -> Iterator[list[bytes]]:
    for start in range(0, len(keys), _VARIABLES):
        yield keys[start : start + _VARIABLES]


def _marks(count: int) -> str:
    return ",".join("?" * count)


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _vector_value(value: Value) -> Any:
    """What Feast keeps a second time for its vector search; always float32."""
    if value.HasField("float_list_val"):
        return np.asarray(value.float_list_val.val, dtype="<f4").tobytes()
    return feast_value_type_to_python_type(value)
