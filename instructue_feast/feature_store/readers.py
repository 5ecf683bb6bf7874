"""Reading stored values straight from an online store: entity keys out, wire bytes and event times back.

Feast's own read builds protobuf objects for every vector, time and status. Here the bytes a store holds are handed on
as they are, so that a whole answer becomes one NumPy matrix. Stock SQLite and Redis, and stores derived from them, are
read this way; any other store through its own `online_read`.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from feast import FeatureStore, FeatureView
from feast.infra.online_stores.helpers import _mmh3
from feast.infra.online_stores.redis import RedisClient, RedisOnlineStore
from feast.infra.online_stores.sqlite import SqliteOnlineStore
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from instructue_feast.errors import ConfigError, StorageError
from instructue_feast.feature_store.online import to_micros, versioned_name
from instructue_feast.feature_store.sqlite import MAPPED_BYTES, InstructueSqliteOnlineStore
from instructue_feast.feature_store.wire import KEY_VERSION, decode_time, entity_keys

_SQLITE_KEYS = 4096  # keys of one statement; SQLite takes 32,766 parameters


@dataclass(frozen=True, slots=True)
class Column:
    """One feature of the users that have it.

    Attributes:
        rows: Positions among the users asked for.
        values: The serialised `feast.types.Value` of each.
        times_us: Event time of each, microseconds since the epoch in UTC.
    """

    rows: list[int]
    values: list[bytes]
    times_us: list[int]


@dataclass(frozen=True, slots=True)
class StoredFeature:
    """A feature of a view, as a store names it."""

    view: str
    feature: str
    versioned: str


class Reader(Protocol):
    """Reads features of distinct users; safe to call from several threads."""

    def read(self, features: Sequence[StoredFeature], user_ids: Sequence[str]) -> list[Column]:
        """One column per feature; users a store does not know are simply not there."""


def stored_feature(store: FeatureStore, view: FeatureView) -> StoredFeature:
    """The one feature of one of this project's views."""
    return StoredFeature(view=view.name, feature=view.features[0].name, versioned=versioned_name(store.config, view))


def reader_of(store: FeatureStore, join_key: str) -> Reader:
    """The fastest reader that fits a repo's online store."""
    online = store._get_provider().online_store
    plain_keys = store.config.entity_key_serialization_version == KEY_VERSION
    if plain_keys and isinstance(online, SqliteOnlineStore):
        return SqliteReader(store, join_key)
    if plain_keys and isinstance(online, RedisOnlineStore):
        return RedisReader(store, join_key)
    return StockReader(store, join_key)


def keys_of(join_key: str, user_ids: Sequence[str]) -> list[bytes]:
    """Serialised entity keys.

    Raises:
        ConfigError: An id has no UTF-8 form; the message gives its position.
    """
    try:
        return entity_keys(join_key, user_ids)
    except UnicodeEncodeError:
        position = next(row for row, one in enumerate(user_ids) if one != one.encode(errors="ignore").decode())
        raise ConfigError(
            f"user id at position {position} has no UTF-8 form", "pass ids as the run was computed with"
        ) from None


class SqliteReader:
    """Reads the tables of `SqliteOnlineStore`: one statement, hence one snapshot, for all features.

    Every thread has a connection of its own, so a reader never waits for another one, and never sees half of a commit.
    """

    def __init__(self, store: FeatureStore, join_key: str) -> None:
        self._config, self._online = store.config, store._get_provider().online_store
        self._path = SqliteOnlineStore._get_db_path(store.config)
        self._ours = isinstance(self._online, InstructueSqliteOnlineStore)
        self._join_key = join_key
        self._local = threading.local()
        self._times: dict[Any, int] = {}
        self._statements: dict[tuple[int, tuple[str, ...]], str] = {}

    def read(self, features: Sequence[StoredFeature], user_ids: Sequence[str]) -> list[Column]:
        """See `Reader`."""
        keys = keys_of(self._join_key, user_ids)
        position = dict(zip(keys, range(len(keys)), strict=True))
        columns = [Column([], [], []) for _ in features]
        for start in range(0, len(keys), _SQLITE_KEYS):
            self._read_chunk(features, keys[start : start + _SQLITE_KEYS], position, columns)
        return columns

    def _read_chunk(
        self, features: Sequence[StoredFeature], keys: list[bytes], position: dict[bytes, int], columns: list[Column]
    ) -> None:
        keys = keys + keys[-1:] * (_statement_keys(len(keys)) - len(keys))
        try:
            rows = self._connection().execute(self._statement(features, len(keys)), keys).fetchall()
        except sqlite3.Error as error:
            self._local.pid = None  # the file may be another one by now
            raise _unreadable(error) from None
        if len(features) == 1:
            found = [rows]
        else:
            found = [[] for _ in features]
            for row in rows:
                found[row[3]].append(row)
        for column, own in zip(columns, found, strict=True):
            if own:
                stored, values, times, *_ = zip(*own, strict=True)
                column.rows.extend([position[key] for key in stored])
                column.values.extend(values)
                column.times_us.extend([self._times[one] if one in self._times else self._time(one) for one in times])

    def _statement(self, features: Sequence[StoredFeature], keys: int) -> str:
        key = keys, tuple([one.versioned for one in features])
        if key not in self._statements:
            listed = ",".join(f"?{number}" for number in range(1, keys + 1))
            # Our connection has Feast's converters, which would make local time of the number.
            time = "event_ts + 0" if self._ours else "event_ts"
            parts = [
                f"SELECT entity_key, value, {time}, {number} FROM {_quoted(self._config.project, one)} "  # noqa: S608 - quoted names
                f"WHERE feature_name = {_text(one.feature)} AND entity_key IN ({listed})"
                for number, one in enumerate(features)
            ]
            self._statements[key] = " UNION ALL ".join(parts)
        return self._statements[key]

    def _connection(self) -> sqlite3.Connection:
        if self._ours:
            own: sqlite3.Connection = self._online._get_conn(self._config)
            return own
        local = self._local
        if getattr(local, "pid", None) != os.getpid():  # a connection must not cross a fork
            local.connection = sqlite3.connect(
                f"{Path(self._path).absolute().as_uri()}?mode=rw", uri=True, isolation_level=None, timeout=30
            )
            local.connection.execute(f"PRAGMA mmap_size = {MAPPED_BYTES}")
            local.pid = os.getpid()
        connection: sqlite3.Connection = local.connection
        return connection

    def _time(self, stored: Any) -> int:
        if self._ours and isinstance(stored, int):
            self._times[stored] = stored * 1_000_000
            return self._times[stored]
        # Stock Feast stores the UTC clock as if it were local time, and reads it back the same way.
        is_number = isinstance(stored, int)
        naive = datetime.fromtimestamp(stored) if is_number else datetime.fromisoformat(str(stored))
        self._times[stored] = to_micros(naive)
        return self._times[stored]


class RedisReader:
    """Reads the hashes of `RedisOnlineStore`: all features of a user in one HMGET, all users in one round trip."""

    def __init__(self, store: FeatureStore, join_key: str) -> None:
        self._config, self._online = store.config, store._get_provider().online_store
        self._join_key, self._project = join_key, store.project.encode()
        # Only the plain client lets many commands go out as one packet without an object for each. It is held here: a
        # store that makes another one would close this one's connections with it.
        client = self._online._get_client(self._config.online_store)
        plain = self._config.online_store.client == RedisClient.redis and isinstance(client, Redis)
        self._client: Any = client if plain else None
        self._fields: dict[StoredFeature, tuple[bytes, bytes]] = {}

    def read(self, features: Sequence[StoredFeature], user_ids: Sequence[str]) -> list[Column]:
        """See `Reader`."""
        keys = [key + self._project for key in keys_of(self._join_key, user_ids)]
        fields = [field for one in features for field in self._hash_fields(one)]
        answers = None if self._client is None else self._read_plain(self._client.connection_pool, keys, fields)
        if answers is None:
            try:
                answers = self._online._read_hash_fields(self._config, [(key, fields) for key in keys])
            except RedisError as error:
                raise _unreadable(error) from None
        columns = []
        for number in range(len(features)):
            rows, values, times = [], [], []
            for row, one in enumerate(answers):
                value, stamp = one[2 * number], one[2 * number + 1]
                if value is not None and stamp is not None:
                    rows.append(row)
                    values.append(value)
                    times.append(decode_time(stamp))
            columns.append(Column(rows, values, times))
        return columns

    def _read_plain(self, pool: Any, keys: list[bytes], fields: list[bytes]) -> list[list[bytes | None]] | None:
        """All HMGETs in one packet; `None` when the connection broke: redis-py's own way then mends or reports it."""
        head = b"*%d\r\n$5\r\nHMGET\r\n" % (2 + len(fields))
        tail = b"\r\n" + b"".join([b"$%d\r\n%b\r\n" % (len(one), one) for one in fields])
        packet = b"".join([b"%b$%d\r\n%b%b" % (head, len(key), key, tail) for key in keys])
        try:
            connection = pool.get_connection()  # with redis-py's own retries
        except RedisError as error:
            raise _unreadable(error) from None
        try:
            connection.send_packed_command([packet])
            read = connection.read_response
            return [read() for _ in keys]
        except BaseException as error:
            connection.disconnect()  # with answers still under way it must not serve anybody else
            if isinstance(error, RedisConnectionError | RedisTimeoutError):
                return None
            if isinstance(error, RedisError):
                raise _unreadable(error) from None
            raise
        finally:
            pool.release(connection)

    def _hash_fields(self, one: StoredFeature) -> tuple[bytes, bytes]:
        if one not in self._fields:
            self._fields[one] = (_mmh3(f"{one.versioned}:{one.feature}"), f"_ts:{one.versioned}".encode())
        return self._fields[one]


class StockReader:
    """Reads any store through its own `online_read`."""

    def __init__(self, store: FeatureStore, join_key: str) -> None:
        self._store, self._join_key = store, join_key

    def read(self, features: Sequence[StoredFeature], user_ids: Sequence[str]) -> list[Column]:
        """See `Reader`."""
        keys = [EntityKey(join_keys=[self._join_key], entity_values=[Value(string_val=user)]) for user in user_ids]
        columns = []
        for one in features:
            view = self._store.registry.get_feature_view(one.view, self._store.project, allow_cache=True)
            online = self._store._get_provider().online_store
            column = Column([], [], [])
            for row, (time, values) in enumerate(online.online_read(self._store.config, view, keys, [one.feature])):
                value = (values or {}).get(one.feature)
                if value is not None and value.WhichOneof("val") and time is not None:
                    column.rows.append(row)
                    column.values.append(value.SerializeToString())
                    column.times_us.append(to_micros(time))
            columns.append(column)
        return columns


def _unreadable(error: Exception) -> StorageError:
    return StorageError(
        f"the online store cannot be read: {error}",
        "is it up, and has `instructue materialize` written the current views?",
    )


def _statement_keys(keys: int) -> int:
    """The keys of the statement that `keys` are read with: few lengths, so that compiled statements are found again.

    Exact up to 16, then at most a quarter more: a key too many costs as much as a tenth of one that is read.

    >>> [_statement_keys(one) for one in (1, 10, 16, 17, 100, 4096)]
    [1, 10, 16, 20, 112, 4096]
    """
    if keys <= 16:
        return keys
    step = 1 << ((keys - 1).bit_length() - 3)
    return -(-keys // step) * step


def _quoted(project: str, feature: StoredFeature) -> str:
    return '"' + f"{project}_{feature.versioned}".replace('"', '""') + '"'


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
